"""Windows of an image, and masks in them: cut out of a whole image's mask, or placed into one.

A mask here is a COCO run-length encoding, whose size depends on its outline: of a mask of 10,000 x 10,000 pixels, only
the part that a window shows is ever decoded.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from faster_coco_eval.core import mask as coco_mask
from numpy.typing import NDArray

from latentgnn.tasks.detection.segmentations import decode_counts, plain_rle


class Window(NamedTuple):
    """A part of an image, in pixels; right and bottom are exclusive.

    Example:
        >>> Window(0, 0, 100, 50) & Window(80, 10, 180, 60)
        Window(left=80, top=10, right=100, bottom=50)
    """

    left: int
    top: int
    right: int
    bottom: int

    @property
    def width(self) -> int:
        return self.right - self.left

    @property
    def height(self) -> int:
        return self.bottom - self.top

    def __and__(self, other: "Window") -> "Window":
        """Return the intersection; it has no width or height if the windows do not overlap."""
        left, top = max(self.left, other.left), max(self.top, other.top)
        return Window(left, top, max(left, min(self.right, other.right)), max(top, min(self.bottom, other.bottom)))

    def moved(self, across: int, down: int) -> "Window":
        return Window(self.left + across, self.top + down, self.right + across, self.bottom + down)


def cut_mask(rle: Mapping[str, Any], window: Window) -> NDArray[np.uint8]:
    """Return the part of a mask that a window shows, as 0 and 1, shape (height, width) of the window.

    Args:
        rle: a compressed run-length encoding, as `latentgnn.tasks.detection.segmentations.to_rle` gives it.
        window: a window within the encoding's image.
    """
    height = rle["size"][0]
    # Runs go down the columns. Only those of the window's columns are decoded.
    start = window.left * height
    ends = (np.cumsum(_runs(rle)) - start).clip(0, window.width * height)
    values = (np.arange(ends.size) % 2).astype(np.uint8)
    strip = np.repeat(values, np.diff(ends, prepend=0)).reshape(window.width, height)
    return np.ascontiguousarray(strip[:, window.top : window.bottom].T)


def place_mask(rle: Mapping[str, Any], window: Window, size: tuple[int, int]) -> dict[str, Any]:
    """Convert a window's mask to a mask of the whole image, with zeros outside the window.

    Args:
        rle: compressed encoding of the window's mask.
        window: its position in the image.
        size: (width, height) of the image.

    Returns:
        A compressed run-length encoding that JSON can store.
    """
    (width, height), tall = size, window.height
    ends = np.cumsum(_runs(rle))
    stops = ends[1::2]
    starts = ends[::2][: stops.size]
    starts, stops = starts[stops > starts], stops[stops > starts]
    # A run that continues in the next column is interrupted in the image, which is taller.
    first, last = starts // tall, (stops - 1) // tall
    pieces = last - first + 1
    columns = np.repeat(first, pieces) + np.arange(pieces.sum()) - np.repeat(np.cumsum(pieces) - pieces, pieces)
    tops = np.maximum(np.repeat(starts, pieces), columns * tall) - columns * tall
    bottoms = np.minimum(np.repeat(stops, pieces), (columns + 1) * tall) - columns * tall
    offset = (window.left + columns) * height + window.top
    edges = np.stack([offset + tops, offset + bottoms], axis=1)
    # Pieces that touch again, because the window is as tall as the image, are one run.
    apart = edges[1:, 0] > edges[:-1, 1]
    edges = np.stack([edges[np.r_[True, apart], 0], edges[np.r_[apart, True], 1]], axis=1) if len(edges) else edges
    counts = np.diff(edges.reshape(-1), prepend=0, append=width * height).tolist()
    # If the mask includes the last pixel, there is no final run of zeros.
    counts = counts if counts[-1] else counts[:-1]
    return plain_rle(coco_mask.frPyObjects({"counts": counts, "size": [height, width]}, height, width))


def united(rles: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the union of masks of one image."""
    return rles[0] if len(rles) == 1 else plain_rle(coco_mask.merge(rles))


def _runs(rle: Mapping[str, Any]) -> NDArray[np.int64]:
    counts = rle["counts"]
    return decode_counts(counts.decode("ascii") if isinstance(counts, bytes) else counts)
