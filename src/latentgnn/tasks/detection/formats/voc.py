"""Pascal VOC: one XML file per image, with boxes; the split is given by ``ImageSets/Main`` or by folders.

Pixels are counted from 1, and a box includes its last pixels, as in VOC's own development kit: (xmin, ymin, xmax, ymax)
covers xmin - 1 to xmax. ``difficult`` objects become crowds: they are not trained on, and finding them is neither right
nor wrong. A ``polygon`` beside the box, which some tools write, is the object's mask.
"""

import math
from pathlib import Path

from latentgnn.files.reading import UnreadableError
from latentgnn.tasks.detection.formats.folders import Images, by_split, files_below
from latentgnn.tasks.detection.formats.image_sets import named_in_sets
from latentgnn.tasks.detection.formats.labelmap import read_labelmap
from latentgnn.tasks.detection.formats.records import Categories, Reading
from latentgnn.tasks.detection.formats.sheets import Item, Sheet, assemble
from latentgnn.tasks.detection.formats.xml_files import Element, read_xml

PICTURES = ("SegmentationClass", "SegmentationObject")
_SIDES = ("xmin", "ymin", "xmax", "ymax")
_OPENING = 4096  # number of bytes that contain an annotation's first tag, including comments before it


def sign(root: Path) -> str | None:
    """Return the file that identifies a folder as this format, relative to the folder."""
    for path in files_below(root, {".xml"}):
        if path.is_file():
            with path.open("rb") as file:
                if b"<annotation" in file.read(_OPENING):
                    return str(path.relative_to(root))
    return None


def read(root: Path, categories: Categories) -> dict[str, Reading]:
    """Read the splits: ``train`` and ``val``, or ``all`` if there are no splits."""
    files_of, notes = named_in_sets(root, "Main", "Annotations", ".xml")
    if not files_of:
        files_of, notes = by_split(files_below(root, {".xml"}), root)
    if not categories.are_known and (labels := read_labelmap(root)) is not None:
        categories = Categories(labels.categories)
    images = Images(root, without=PICTURES)
    if images.left_out:
        notes.append("there are segmentation pictures too; with --data.format voc_masks, their masks are read")
    sheets = {split: [_sheet(file) for file in files] for split, files in files_of.items()}
    return assemble(sheets, categories, file=root, root=root, format="voc", images=images, notes=notes)


def _sheet(file: Path) -> Sheet:
    sheet = Sheet(file=file)
    try:
        tree = read_xml(file)
    except UnreadableError as error:
        sheet.lose(error.place, error.message, "images")
        return sheet
    if tree.name != "annotation":
        sheet.lose(f"line {tree.line}", f"expected <annotation> at the top, but it is <{tree.name}>", "images")
        return sheet
    sheet.named = tree.text_of("filename")
    if tree.first("size") is not None:
        sheet.size = (_whole(tree.text_of("size", "width")), _whole(tree.text_of("size", "height")))
    for number, element in enumerate(tree.all("object"), 1):
        record = f"object {number}, line {element.line}"
        try:
            sheet.items.append(_item(element, record))
        except ValueError as error:
            sheet.lose(record, str(error))
    return sheet


def _item(element: Element, record: str) -> Item:
    name = element.text_of("name")
    if not name:
        raise ValueError("it has no name")
    box = element.first("bndbox")
    if box is None:
        raise ValueError("it has no bndbox")
    left, top, right, bottom = (_number(box, side) for side in _SIDES)
    if right <= left or bottom <= top:
        raise ValueError(
            f"the box from ({left:g}, {top:g}) to ({right:g}, {bottom:g}) has no area: "
            "expected xmax above xmin and ymax above ymin"
        )
    return Item(
        name=name,
        record=f"{record} ({name})",
        box=[left - 1, top - 1, right - left + 1, bottom - top + 1],
        segmentation=_polygon(element),
        crowd=element.text_of("difficult") == "1",
    )


def _polygon(element: Element) -> list[list[float]] | None:
    """The points x1, y1, x2, y2, ... of ``polygon``."""
    polygon = element.first("polygon")
    if polygon is None:
        return None
    names = [f"{axis}{number}" for number in range(1, len(polygon.children) // 2 + 1) for axis in "xy"]
    return [[_number(polygon, name) - 1 for name in names]]


def _number(element: Element, name: str) -> float:
    text = element.text_of(name)
    try:
        number = float(text or "")
    except ValueError:
        number = math.nan
    if not abs(number) < 1e12:
        came = "missing" if text is None else repr(text[:40])
        raise ValueError(f"expected a number as {name} of its {element.name}, but it is {came}")
    return number


def _whole(text: str | None) -> int | str | None:
    """A whole number, or the text unchanged; the check of the records says what is wrong with it."""
    return int(text) if text is not None and text.isdecimal() and len(text) < 10 else text
