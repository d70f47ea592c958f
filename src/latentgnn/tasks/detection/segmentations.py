"""Segmentations of COCO-format records: polygons and run-length encodings, checked and decoded."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from faster_coco_eval.core import mask as coco_mask
from numpy.typing import NDArray

from latentgnn.files.plain_values import shown


def to_rle(segmentation: Any, height: int, width: int) -> dict[str, Any]:
    """Convert a segmentation to COCO's compressed run-length encoding.

    Args:
        segmentation: polygons, or a run-length encoding with ``counts`` as a list or compressed.
        height: height of the image.
        width: width of the image.
    """
    if isinstance(segmentation, dict):
        if not isinstance(segmentation["counts"], list):
            return segmentation
        return dict(coco_mask.frPyObjects(segmentation, height, width))
    return dict(coco_mask.merge(coco_mask.frPyObjects(segmentation, height, width)))


def plain_rle(rle: Mapping[str, Any]) -> dict[str, Any]:
    """Return a compressed run-length encoding in a form that JSON can store."""
    counts = rle["counts"]
    return {"size": list(rle["size"]), "counts": counts.decode("ascii") if isinstance(counts, bytes) else counts}


def decode_masks(segmentations: Sequence[Any], height: int, width: int) -> NDArray[np.uint8]:
    """Decode segmentations, as `to_rle` takes them, to masks of 0 and 1, shape (n, height, width)."""
    if not segmentations:
        return np.zeros((0, height, width), np.uint8)
    masks_HWN = coco_mask.decode([to_rle(segmentation, height, width) for segmentation in segmentations])
    return np.ascontiguousarray(np.moveaxis(masks_HWN, -1, 0))


def decode_counts(counts: str) -> NDArray[np.int64]:
    """Return the run lengths of a compressed COCO run-length encoding.

    Each number is a little-endian sequence of 5-bit digits, the last one signed, shifted to printable characters with a
    bit that says whether more digits follow. From the fourth number on, it is the difference to the number two before
    (``rleToString`` of the COCO API). The native decoder does not check its input, so this one does.

    Raises:
        ValueError: if the string is not such an encoding.
    """
    try:
        codes = np.frombuffer(counts.encode("latin-1"), np.uint8).astype(np.int64) - 48
    except UnicodeEncodeError:
        raise ValueError("its compressed counts have characters outside the encoding's alphabet") from None
    if codes.size == 0:
        raise ValueError("its compressed counts are empty")
    if codes.min() < 0 or codes.max() > 63:
        raise ValueError("its compressed counts have characters outside the encoding's alphabet")
    is_last = (codes & 32) == 0
    if not is_last[-1]:
        raise ValueError("its compressed counts are cut short")
    ends = np.flatnonzero(is_last)
    starts = np.concatenate([[0], ends[:-1] + 1])
    lengths = ends - starts + 1
    if lengths.max() > 7:
        raise ValueError("its compressed counts hold a number of more than 32 bits")
    places = 5 * (np.arange(codes.size) - np.repeat(starts, lengths))
    runs: NDArray[np.int64] = np.add.reduceat((codes & 31) << places, starts)
    runs -= np.where(codes[ends] & 16, np.int64(1) << (5 * lengths), 0)
    runs[1::2] = np.cumsum(runs[1::2])
    runs[2::2] = np.cumsum(runs[2::2])
    return runs


def segmentation_fault(segmentation: Any, width: int, height: int, *, may_be_empty: bool) -> str | None:
    """Return what is wrong with a segmentation of an image of this size, or ``None``.

    Only segmentations without faults may be given to `to_rle` and `decode_masks`: the native decoder checks nothing.
    """
    if isinstance(segmentation, dict):
        fault = _rle_fault(segmentation, width, height, may_be_empty)
    elif isinstance(segmentation, list):
        fault = _polygons_fault(segmentation, width, height, may_be_empty)
    else:
        return f"expected polygons or a run-length encoding as segmentation, but it is {shown(segmentation)}"
    return fault and f"the mask does not decode: {fault}"


def _polygons_fault(polygons: list[Any], width: int, height: int, may_be_empty: bool) -> str | None:
    for number, polygon in enumerate(polygons):
        message = _polygon_fault(polygon, width, height)
        if message:
            return f"polygon {number} {message}"
    if not polygons:
        return "it has no polygon"
    if not may_be_empty and not coco_mask.area(to_rle(polygons, height, width)):
        return "its polygons enclose no pixel"
    return None


def _polygon_fault(polygon: Any, width: int, height: int) -> str | None:
    if not isinstance(polygon, list) or not set(map(type, polygon)) <= {int, float}:
        return f"is {shown(polygon)}, not a list of numbers"
    if len(polygon) < 6 or len(polygon) % 2:
        return f"has {len(polygon)} numbers; an even number of 6 or more is needed"
    # Points slightly outside are common and are clipped; the native decoder follows an outline however far it goes.
    near_x = all(-width <= x <= 2 * width for x in polygon[::2])
    near_y = all(-height <= y <= 2 * height for y in polygon[1::2])
    return None if near_x and near_y else f"reaches far outside the image of {width} x {height}"


def _rle_fault(encoding: dict[str, Any], width: int, height: int, may_be_empty: bool) -> str | None:
    size, counts = encoding.get("size"), encoding.get("counts")
    # A float may equal an integer, but the native decoder does not accept it.
    if size != [height, width] or set(map(type, size)) != {int}:
        came = shown(size) if "size" in encoding else "missing"
        return f"its size (height, width) is {came}, but the image's is {[height, width]}"
    if isinstance(counts, bytes):
        counts = counts.decode("latin-1")
    if isinstance(counts, str):
        try:
            runs = decode_counts(counts)
        except ValueError as error:
            return str(error)
        lowest, total, inside = int(runs.min()), int(runs.sum()), int(runs[1::2].sum())
    elif isinstance(counts, list) and set(map(type, counts)) == {int}:
        lowest, total, inside = min(counts), sum(counts), sum(counts[1::2])
    else:
        came = shown(counts) if "counts" in encoding else "missing"
        return f"expected counts as a string or a list of integers, but it is {came}"
    if lowest < 0:
        return f"it has a run of {lowest} pixels"
    if total != width * height:
        return f"its runs add up to {total} pixels, but the image has {width * height}"
    return None if inside or may_be_empty else "it has no pixel"
