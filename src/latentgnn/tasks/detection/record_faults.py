"""Faults of single records and of image files."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from latentgnn.errors import UserError
from latentgnn.files.plain_values import shown
from latentgnn.tasks.images import is_quarter_turned, open_image, read_image, size_fault
from latentgnn.tasks.tars import open_file

# Boxes drawn along the edge often end a fraction of a pixel outside; they are clamped when they are read.
_TOLERANCE = 1.0


def image_record_faults(image: dict[str, Any]) -> Iterator[str]:
    """Yield the faults of an image record."""
    for side in ("width", "height"):
        if type(image.get(side)) is not int or image[side] < 1:
            yield f"expected a {side} of 1 or more, but it is {field_text(image, side)}"
            return
    if (fault := size_fault(image["width"], image["height"])) is not None:
        yield fault
    if not isinstance(image.get("file_name"), str) or not image["file_name"]:
        yield f"expected a file_name, but it is {field_text(image, 'file_name')}"


def box_faults(annotation: dict[str, Any], size: tuple[int, int] | None) -> Iterator[str]:
    """Yield the faults of an annotation's box, in an image of the given size if that is known."""
    box = annotation.get("bbox")
    if not (isinstance(box, list) and len(box) == 4 and all(map(is_number, box))):
        yield f"expected a bbox of four numbers, but it is {field_text(annotation, 'bbox')}"
        return
    left, top, width, height = box
    if width <= 0 or height <= 0:
        yield f"the box {box} (x, y, width, height) has no area"
    elif size is not None:
        right, bottom = left + width, top + height
        overhang = max(-left, -top, right - size[0], bottom - size[1])
        if overhang > _TOLERANCE or right <= 0 or bottom <= 0 or left >= size[0] or top >= size[1]:
            yield f"the box {box} (x, y, width, height) lies outside the image of {size[0]} x {size[1]}"


def image_fault(path: Path, size: tuple[int, int]) -> str | None:
    """Return the fault of an image file that should have the given size, or ``None``."""
    try:
        if not _is_whole_jpeg(path, size):
            read_image(path, size=size)
    except UserError as error:
        return str(error).removeprefix(f"{path}: ")
    return None


def is_number(value: Any) -> bool:
    """Whether a value is a number within the range of coordinates and areas."""
    return type(value) in (int, float) and -1e12 < value < 1e12


def field_text(record: dict[str, Any], name: str) -> str:
    """Return a field of a record, for a message."""
    return shown(record[name]) if name in record else "missing"


def _is_whole_jpeg(path: Path, size: tuple[int, int]) -> bool:
    """Whether a file is a JPEG of the given size, as stored or upright, with a proper end.

    Encoded pixels never contain the two bytes of the end marker, so a file that was truncated within them has none.
    """
    try:
        with open_file(path) as file:
            if file.read(2) != b"\xff\xd8":
                return False
            file.seek(-64, os.SEEK_END)
            if b"\xff\xd9" not in file.read():
                return False
        with open_image(path) as image:
            return size == image.size or (is_quarter_turned(image) and size == image.size[::-1])
    except Exception:  # decoders raise all kinds of errors
        return False  # the caller then reads the whole file, whose error says what is wrong
