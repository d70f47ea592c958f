"""The formats of detection sets besides COCO's own, each read into COCO's records with the place of every record.

The libraries that read them were tried and do not fit what a check before training needs. supervision stops at the
first file that cannot be read and tells no line, lets boxes without area or outside the image pass, and holds an
image's size of pixels for each outlined object of the whole set. datumaro needs some twenty packages, among them
OpenCV, pandas, pyarrow and Pillow before 13. torchvision reads VOC's XML alone, as texts that are not looked at.
"""
