"""The classes of ScanNet and S3DIS."""

SCANNET_CLASSES = {
    1: "wall",
    2: "floor",
    3: "cabinet",
    4: "bed",
    5: "chair",
    6: "sofa",
    7: "table",
    8: "door",
    9: "window",
    10: "bookshelf",
    11: "picture",
    12: "counter",
    14: "desk",
    16: "curtain",
    24: "refrigerator",
    28: "shower curtain",
    33: "toilet",
    34: "sink",
    36: "bathtub",
    39: "other furniture",
}
"""The 20 classes that ScanNet v2 evaluates: NYU40 ids and names."""

_S3DIS = "ceiling floor wall beam column window door table chair sofa bookcase board clutter"
S3DIS_CLASSES = dict(enumerate(_S3DIS.split(" ")))
"""S3DIS's 13 classes, by the ids used for its objects here; all other objects, such as stairs, are clutter."""
