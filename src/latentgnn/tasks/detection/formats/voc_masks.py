"""Pascal VOC's segmentation pictures: ``SegmentationObject`` colours objects, ``SegmentationClass`` colours classes.

Pictures have a palette, gray values or colours. 0 and black are the background; 255 and VOC's own light gray, the edge
around objects, belong to nothing. Classes are those of ``labelmap.txt``, or VOC's 20.
"""

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from latentgnn.errors import UserError
from latentgnn.files.reading import regular_file
from latentgnn.tasks.detection.formats.folders import Images, by_split, files_below
from latentgnn.tasks.detection.formats.image_sets import named_in_sets
from latentgnn.tasks.detection.formats.labelmap import BACKGROUND, Labelmap, read_labelmap
from latentgnn.tasks.detection.formats.records import Categories, Reading
from latentgnn.tasks.detection.formats.runs import encoded
from latentgnn.tasks.detection.formats.sheets import Item, Sheet, assemble
from latentgnn.tasks.images import open_image
from latentgnn.tasks.voc import VOC_CLASSES, voc_color

OBJECTS, CLASSES = "SegmentationObject", "SegmentationClass"
_EDGE, _EDGE_COLOUR = 255, 224 << 16 | 224 << 8 | 192
# More values than this are not objects but shades of a photograph.
_MOST_OBJECTS = 5000


def sign(root: Path) -> str | None:
    """Return the folder that identifies a folder as this format, relative to it."""
    found = next((path for path in _pictures(root)), None)
    return f"{found.parent.relative_to(root)}/" if found is not None else None


def read(root: Path, categories: Categories) -> dict[str, Reading]:
    """Read the splits: ``train`` and ``val``, or ``all`` if there are no splits."""
    files_of, notes = named_in_sets(root, "Segmentation", OBJECTS, ".png")
    if not files_of:
        files_of, notes = by_split(_pictures(root), root)
    labels = read_labelmap(root)
    if not categories.are_known:
        categories = Categories(labels.categories if labels is not None else enumerate(VOC_CLASSES, 1))
    sheets = {split: [_sheet(file, labels) for file in files] for split, files in files_of.items()}
    images = Images(root, without=(OBJECTS, CLASSES))
    return assemble(sheets, categories, file=root, root=root, format="voc_masks", images=images, notes=notes)


def _pictures(root: Path) -> list[Path]:
    return [path for path in files_below(root, {".png"}) if OBJECTS in path.relative_to(root).parts[:-1]]


def _sheet(file: Path, labels: Labelmap | None) -> Sheet:
    sheet = Sheet(file=file)
    parts = [CLASSES if part == OBJECTS else part for part in file.parts]
    try:
        objects_HW, is_in_colours = _values(file)
        classes_HW, is_coloured = _values(Path(*parts), coloured=labels is not None and bool(labels.name_of_colour))
    except UserError as error:
        sheet.lose("", str(error).removeprefix(f"{file}: "), "images")
        return sheet
    height, width = objects_HW.shape
    sheet.size = (width, height)
    if classes_HW.shape != objects_HW.shape:
        other = f"{classes_HW.shape[1]} x {classes_HW.shape[0]}"
        sheet.lose("", f"it is {width} x {height} pixels, but {Path(*parts)} is {other}", "images")
        return sheet
    # In column order, as in COCO's encoding.
    objects, classes = objects_HW.ravel(order="F"), classes_HW.ravel(order="F")
    order = np.argsort(objects, kind="stable")
    values, starts = np.unique(objects[order], return_index=True)
    if len(values) > _MOST_OBJECTS:
        sheet.lose("", f"it has {len(values):,} colours; expected one an object, {_MOST_OBJECTS:,} at most", "images")
        return sheet
    for value, pixels in zip(values.tolist(), np.split(order, starts[1:]), strict=True):
        if value in (0, _EDGE_COLOUR if is_in_colours else _EDGE):
            continue
        record = f"object of colour #{value:06x}" if is_in_colours else f"object {value}"
        try:
            name = _class_of(classes[pixels], labels, is_coloured)
        except ValueError as error:
            sheet.lose(record, str(error))
            continue
        box, segmentation = encoded(pixels, width=width, height=height)
        sheet.items.append(Item(name=name, record=f"{record} ({name})", box=box, segmentation=segmentation))
    return sheet


def _values(path: Path, *, coloured: bool = False) -> tuple[NDArray[np.int64], bool]:
    """Pixel values (H, W) of a picture, and whether they are colours ``red << 16 | green << 8 | blue``."""
    regular_file(path, "picture")
    with open_image(path) as picture:
        try:
            picture.load()
            if picture.mode in ("P", "L", "1", "I", "I;16") and not (coloured and picture.mode == "P"):
                return np.asarray(picture).astype(np.int64), False
            colours_HWC = np.asarray(picture.convert("RGB")).astype(np.int64)
        except Exception as error:  # decoders raise all kinds of errors
            raise UserError(f"{path}: the picture cannot be read ({error})") from error
    return colours_HWC @ np.array([1 << 16, 1 << 8, 1]), True


def _class_of(values: NDArray[np.int64], labels: Labelmap | None, is_coloured: bool) -> str:
    """The class of an object, from the values of its pixels."""
    found, counts = np.unique(values, return_counts=True)
    pixels: dict[str, int] = {}
    for value, count in zip(found.tolist(), counts.tolist(), strict=True):
        name = _name(value, labels, is_coloured)
        if name != BACKGROUND:
            pixels[name] = count
    if len(pixels) != 1:
        came = " and ".join(f"{count} are {name}" for name, count in pixels.items()) or "all are background"
        raise ValueError(f"expected pixels of one class in {CLASSES}, but {came}")
    return next(iter(pixels))


def _name(value: int, labels: Labelmap | None, is_coloured: bool) -> str:
    if value in (0, _EDGE_COLOUR if is_coloured else _EDGE):
        return BACKGROUND
    if is_coloured:
        names = labels.name_of_colour if labels is not None and labels.name_of_colour else _VOC_COLOURS
    else:
        names = dict(labels.categories if labels is not None else enumerate(VOC_CLASSES, 1))
    if value not in names:
        called = f"the colour #{value:06x}" if is_coloured else f"{value}"
        raise ValueError(f"unknown class {called} in {CLASSES}; labelmap.txt names classes that are not VOC's")
    return names[value]


def _packed(red: int, green: int, blue: int) -> int:
    return red << 16 | green << 8 | blue


_VOC_COLOURS = {_packed(*voc_color(id)): name for id, name in enumerate(VOC_CLASSES, 1)}
