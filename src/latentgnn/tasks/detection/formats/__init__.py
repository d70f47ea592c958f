"""Readers of the other detection formats; each makes COCO records and knows where every record came from.

Libraries that read them were tried and do not provide what a check before training needs. supervision stops at the
first file that it cannot read without naming the line, accepts boxes without area or outside the image, and keeps an
image-sized array of pixels for each outlined object of the whole set. datumaro needs some twenty packages, among them
OpenCV, pandas, pyarrow and Pillow below 13. torchvision only reads VOC's XML, as strings without checks.
"""
