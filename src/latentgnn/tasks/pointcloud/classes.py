"""Classes by the ids that files have for them; ids of the same name are one class."""

from collections.abc import Mapping

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
"""The 20 classes that ScanNet v2 evaluates: NYU40 id and name."""

_S3DIS = "ceiling floor wall beam column window door table chair sofa bookcase board clutter"
S3DIS_CLASSES = dict(enumerate(_S3DIS.split(" ")))
"""S3DIS's 13 classes, by the ids that its objects get here; all other objects, such as stairs, are clutter."""


def class_names(classes: Mapping[int, str] | None) -> tuple[str, ...]:
    """The names of classes in the order of their labels, each once.

    Example:
        >>> class_names({2: "ground", 3: "vegetation", 4: "vegetation", 6: "building"})
        ('ground', 'vegetation', 'building')
    """
    return tuple(dict.fromkeys((classes or {}).values()))


def first_ids(classes: Mapping[int, str] | None) -> tuple[int, ...]:
    """The id that each class gets in a file, in the order of the labels: of several, the one that is named first.

    Example:
        >>> first_ids({2: "ground", 3: "vegetation", 4: "vegetation", 6: "building"})
        (2, 3, 6)
    """
    ids = {name: id for id, name in reversed(list((classes or {}).items()))}
    return tuple(ids[name] for name in class_names(classes))
