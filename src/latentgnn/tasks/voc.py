"""Pascal VOC's classes and their colours."""

VOC_CLASSES = (
    *("aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow"),
    *("diningtable", "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor"),
)
"""The classes by their ids from 1; 0 is the background."""


def voc_color(id: int) -> tuple[int, int, int]:
    """Return the colour of a class id: bits of the id, lowest first, go to red, green and blue in turn, from the top.

    Example:
        >>> voc_color(1), voc_color(15), voc_color(255)
        ((128, 0, 0), (192, 128, 128), (224, 224, 192))
    """
    red, green, blue = (sum((id >> (3 * bit + part) & 1) << (7 - bit) for bit in range(8)) for part in range(3))
    return red, green, blue
