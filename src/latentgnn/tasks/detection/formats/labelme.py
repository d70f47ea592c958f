"""LabelMe: one JSON file per image, with the shapes drawn on it.

Polygons, rectangles, circles and masks are objects; shapes with the same label and ``group_id`` are parts of one
object. If the set has other outlines, a rectangle is an outline too, as in LabelMe's own converter to COCO. A set with
only rectangles has boxes and no masks.
"""

import base64
import binascii
import io
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from latentgnn.errors import UserError
from latentgnn.files.plain_values import shown
from latentgnn.files.reading import UnreadableError, read_json, read_lines
from latentgnn.tasks.detection.formats.folders import Images, by_split, files_below
from latentgnn.tasks.detection.formats.records import Categories, Reading, box_of
from latentgnn.tasks.detection.formats.runs import encoded
from latentgnn.tasks.detection.formats.sheets import Item, Sheet, assemble
from latentgnn.tasks.images import size_fault

_KEYS = (b'"shapes"', b'"imagePath"', b'"imageData"')
_OPENING = 4096  # number of bytes at the beginning that contain one of the keys, whatever their order
_NOT_CLASSES = ("__ignore__", "_background_")
_SHAPES = ("polygon", "rectangle", "circle", "mask")


def sign(root: Path) -> str | None:
    """Return the file that identifies a folder as this format, relative to the folder."""
    for path in files_below(root, {".json"}):
        if path.is_file():
            with path.open("rb") as file:
                opening = file.read(_OPENING)
            if any(key in opening for key in _KEYS):
                return str(path.relative_to(root))
    return None


def read(root: Path, categories: Categories) -> dict[str, Reading]:
    """Read the splits: ``train`` and ``val``, or ``all`` if there are no splits."""
    if not categories.are_known and (root / "labels.txt").is_file():
        lines = [line.strip() for line in read_lines(root / "labels.txt", "list of classes")]
        names = [line for line in dict.fromkeys(lines) if line and line not in _NOT_CLASSES]
        categories = Categories(enumerate(names, 1))
    files_of, notes = by_split(files_below(root, {".json"}), root)
    sheets = {split: [_sheet(file) for file in files] for split, files in files_of.items()}
    if not any(has_outlines for some in sheets.values() for _, has_outlines in some):
        for some in sheets.values():
            for sheet, _ in some:
                sheet.items = [replace(item, segmentation=None) for item in sheet.items]
    return assemble(
        {split: [sheet for sheet, _ in some] for split, some in sheets.items()},
        categories,
        file=root,
        root=root,
        format="labelme",
        images=Images(root),
        notes=notes,
    )


def _sheet(file: Path) -> tuple[Sheet, bool]:
    """The content of a file, and whether it has outlines other than rectangles."""
    sheet = Sheet(file=file)
    try:
        content = read_json(file, "annotation file")
    except UnreadableError as error:
        sheet.lose(error.place, error.message, "images")
        return sheet, False
    if not isinstance(content, dict) or not isinstance(content.get("shapes"), list):
        sheet.lose("", f"expected LabelMe's object with a list of shapes, but it is {shown(content)}", "images")
        return sheet, False
    named = content.get("imagePath")
    sheet.named = named if isinstance(named, str) else None
    size = (content.get("imageWidth"), content.get("imageHeight"))
    sheet.size = None if size == (None, None) else size
    has_outlines = False
    groups: dict[tuple[str, Any], int] = {}
    for number, shape in enumerate(content["shapes"]):
        record = f"shapes[{number}]"
        try:
            item = _item(shape, sheet.size, record)
            group = shape.get("group_id")
            if group is not None and type(group) not in (int, str):
                raise ValueError(f"expected a whole number as group_id, but it is {shown(group)}")
            if group is None or (item.name, group) not in groups:
                groups[item.name, group] = len(sheet.items)
                sheet.items.append(item)
            else:
                position = groups[item.name, group]
                sheet.items[position] = _joined(sheet.items[position], item)
        except ValueError as error:
            sheet.lose(record, str(error))
        else:
            has_outlines = has_outlines or shape["shape_type"] != "rectangle"
    return sheet, has_outlines


def _item(shape: Any, size: tuple[Any, Any] | None, record: str) -> Item:
    if not isinstance(shape, dict):
        raise ValueError(f"expected an object, but it is {shown(shape)}")
    name, kind = shape.get("label"), shape.setdefault("shape_type", "polygon")
    if not isinstance(name, str) or not name:
        raise ValueError(f"expected a label, but it is {shown(name)}")
    record = f"{record} ({name})"
    if kind not in _SHAPES:
        raise ValueError(f"a shape of the type {shown(kind)} is no object; expected {', '.join(_SHAPES)}")
    points = shape.get("points")
    least, most = (3, math.inf) if kind == "polygon" else (2, 2)
    if not isinstance(points, list) or not least <= len(points) <= most or not all(map(_is_point, points)):
        many = "3 or more" if kind == "polygon" else "2"
        raise ValueError(f"expected {many} points as [x, y] for a {kind}, but it is {shown(points)}")
    if kind == "mask":
        return _mask(shape, size, record)
    if kind == "circle":
        points = _circle(*points)
    xs, ys = [float(x) for x, _ in points], [float(y) for _, y in points]
    box = box_of(xs, ys)
    if kind == "rectangle":
        x, y, width, height = box
        points = [(x, y), (x + width, y), (x + width, y + height), (x, y + height)]
    outline = [float(value) for point in points for value in point]
    return Item(name=name, record=record, box=box, segmentation=[outline])


def _is_point(point: Any) -> bool:
    return isinstance(point, list) and len(point) == 2 and set(map(type, point)) <= {int, float}


def _circle(centre: list[float], edge: list[float]) -> list[tuple[float, float]]:
    """Points on a circle, as many as LabelMe's converter uses: the error is at most a pixel."""
    radius = math.dist(centre, edge)
    number = max(12, int(math.pi / math.acos(1 - 1 / radius))) if radius > 1 else 12
    if number > 100_000:
        raise ValueError(f"the circle has a radius of {radius:g} pixels")
    angles = [2 * math.pi * step / number for step in range(number)]
    return [(centre[0] + radius * math.sin(angle), centre[1] + radius * math.cos(angle)) for angle in angles]


def _mask(shape: dict[str, Any], size: tuple[Any, Any] | None, record: str) -> Item:
    """A mask given as a base64 PNG of its bounding box, from the first to the last pixel."""
    if size is None or not all(type(side) is int and side >= 1 for side in size) or size_fault(*size) is not None:
        raise ValueError("a mask needs the image's size: imageWidth and imageHeight")
    (left, top), (right, bottom) = [[round(value) for value in point] for point in shape["points"]]
    if not (0 <= left <= right < size[0] and 0 <= top <= bottom < size[1]):
        raise ValueError(f"the mask lies outside the image of {size[0]} x {size[1]}: {shown(shape['points'])}")
    try:
        content = base64.b64decode(shape.get("mask") or "", validate=True)
        with Image.open(io.BytesIO(content), formats=["PNG"]) as picture:
            if picture.size != (right - left + 1, bottom - top + 1):
                raise UserError(f"it is {picture.width} x {picture.height}, its box {shown(shape['points'])}")
            pixels = np.asarray(picture.convert("L")) > 0
    except (binascii.Error, TypeError) as error:
        raise ValueError(f"the mask is not in base64 ({error})") from None
    except Exception as error:  # decoders raise all kinds of errors
        raise ValueError(f"the mask cannot be read ({error})") from None
    rows, columns = np.nonzero(pixels)
    box, segmentation = encoded((columns + left) * size[1] + rows + top, width=size[0], height=size[1])
    return Item(name=shape["label"], record=record, box=box, segmentation=segmentation)


def _joined(first: Item, second: Item) -> Item:
    """Join two parts of one object."""
    if not isinstance(first.segmentation, list) or not isinstance(second.segmentation, list):
        raise ValueError("a mask cannot be one of several parts of an object; give it a group_id of its own, or none")
    (x, y, w, h), (left, top, width, height) = first.box, second.box
    xs, ys = [x, x + w, left, left + width], [y, y + h, top, top + height]
    return replace(first, box=box_of(xs, ys), segmentation=first.segmentation + second.segmentation)
