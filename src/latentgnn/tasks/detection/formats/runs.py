"""Run-length encodings of masks that are given as pixel indices."""

from typing import Any

import numpy as np
from numpy.typing import NDArray


def encoded(pixels: NDArray[Any], *, width: int, height: int) -> tuple[list[float], dict[str, Any]]:
    """Return the box (x, y, width, height) of a mask, and its uncompressed COCO encoding.

    Args:
        pixels: indices of the mask's pixels, counted down the columns: ``x * height + y``; in any order, without
            repetitions.
        width: width of the image.
        height: height of the image.

    Example:
        >>> encoded(np.array([4, 5, 7]), width=3, height=3)
        ([1.0, 1.0, 2.0, 2.0], {'size': [3, 3], 'counts': [4, 2, 1, 1, 1]})
    """
    total = width * height
    if not len(pixels):
        return [0.0, 0.0, 0.0, 0.0], {"size": [height, width], "counts": [total]}
    order = np.sort(pixels)
    starts = order[np.flatnonzero(np.diff(order, prepend=order[0] - 2) != 1)]
    ends = order[np.flatnonzero(np.diff(order, append=order[-1] + 2) != 1)] + 1
    edges = np.stack([starts, ends], axis=1).ravel()
    counts = np.diff(edges, prepend=0, append=total).tolist()
    if ends[-1] == total:
        counts.pop()
    xs, ys = order // height, order % height
    left, top = int(xs.min()), int(ys.min())
    box = [float(left), float(top), float(xs.max() + 1 - left), float(ys.max() + 1 - top)]
    return box, {"size": [height, width], "counts": counts}
