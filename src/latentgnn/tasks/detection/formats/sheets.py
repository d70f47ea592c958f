"""Code common to formats with one annotation file per image: Pascal VOC, YOLO and LabelMe."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from latentgnn.errors import UserError
from latentgnn.tasks.detection.formats.folders import Images
from latentgnn.tasks.detection.formats.records import Builder, Categories, Kind, Place, Reading
from latentgnn.tasks.images import upright_size


@dataclass(frozen=True, kw_only=True, slots=True)
class Item:
    """An object in an image.

    Args:
        name: name of its category.
        record: its place in its file.
        box: x, y, width and height in pixels; validated later.
        segmentation: COCO segmentation, if there is one.
        crowd: neither trained on nor counted in scores.
    """

    name: str
    record: str
    box: Sequence[float]
    segmentation: Any = None
    crowd: bool = False


@dataclass(kw_only=True, slots=True)
class Sheet:
    """The content of one annotation file.

    Args:
        file: the annotation file.
        image: its image, if known; otherwise it is searched for.
        named: the image's name according to the file.
        size: (width, height) of the image according to the file; ``None`` to take it from the image.
        items: the objects.
        faults: faults of single objects or of the whole file: the kind that is lost, the place, and the message.
    """

    file: Path
    image: Path | None = None
    named: str | None = None
    size: tuple[Any, Any] | None = None
    items: list[Item] = field(default_factory=list)
    faults: list[tuple[Kind, str, str]] = field(default_factory=list)

    def lose(self, record: str, message: str, kind: Kind = "annotations") -> None:
        """Add a fault for an object that cannot be read or, with ``images``, for the whole file."""
        self.faults.append((kind, record, message))

    @property
    def is_lost(self) -> bool:
        """Whether nothing in the file can be read."""
        return any(kind == "images" for kind, _, _ in self.faults)


def assemble(
    sheets: Mapping[str, Iterable[Sheet]],
    categories: Categories,
    *,
    file: Path,
    root: Path,
    format: str,
    images: Images | None = None,
    notes: Iterable[str] = (),
) -> dict[str, Reading]:
    """Build the readings of all splits, with the same categories.

    Args:
        sheets: sheets of each split.
        categories: the categories; if they were not given, the names in all sheets are added.
        file: path that stands for the set in messages.
        root: its folder, to which image names are relative.
        format: name of the format.
        images: where the sheets' images are searched for; ``None`` if each sheet knows its own.
        notes: notes for the user.
    """
    of_split = {split: list(some) for split, some in sheets.items()}
    categories.meet(item.name for some in of_split.values() for sheet in some for item in sheet.items)
    readings: dict[str, Reading] = {}
    for split, some in of_split.items():
        reading = Reading(file=file, image_folder=root, format=format)
        reading.dataset["categories"] = categories.records()
        builder = Builder(reading)
        sheet_of: dict[Path, Path] = {}
        for sheet in some:
            _add(builder, sheet, categories, images, sheet_of)
        if not categories.records():
            reading.fatal("no object has a category")
        readings[split] = reading
    if readings:
        first = next(iter(readings.values()))
        first.notes += notes
        first.notes += _alike(record["name"] for record in categories.records())
        unused = list(images.unused()) if images is not None else []
        if unused:
            first.notes.append(
                f"{len(unused)} images have no file of annotations and are not used (such as {unused[0]})"
            )
    return readings


def _add(
    builder: Builder, sheet: Sheet, categories: Categories, images: Images | None, sheet_of: dict[Path, Path]
) -> None:
    reading = builder.reading
    for kind, record, message in sheet.faults:
        reading.lose(kind, Place(sheet.file, record), message)
    image, why = sheet.image, ""
    if image is None and images is not None:
        image, why = images.belonging_to(sheet.file, sheet.named)
    if sheet.is_lost:
        return
    if image is None:
        _lose_image(reading, sheet, Place(sheet.file), why)
        return
    if sheet_of.setdefault(image, sheet.file) != sheet.file:
        _lose_image(reading, sheet, Place(sheet.file), f"{image} is annotated twice: {sheet_of[image]} is for it too")
        return
    size = sheet.size
    if size is None:
        try:
            size = upright_size(image)
        except UserError as error:
            _lose_image(reading, sheet, Place(image), str(error).removeprefix(f"{image}: "))
            return
    image_id = builder.image(image, size, Place(sheet.file))
    for item in sheet.items:
        place = Place(sheet.file, item.record)
        category_id = categories.id_of(item.name)
        if category_id is None:
            reading.lose("annotations", place, categories.unknown(item.name))
        else:
            builder.annotation(
                image_id, category_id, place, box=item.box, segmentation=item.segmentation, crowd=item.crowd
            )


def _lose_image(reading: Reading, sheet: Sheet, place: Place, message: str) -> None:
    reading.lose("images", place, message)
    reading.lost["annotations"] += len(sheet.items)


def _alike(names: Iterable[str]) -> list[str]:
    """A note for each category name that differs from another only in case or spaces."""
    first: dict[str, str] = {}
    notes = []
    for name in names:
        other = first.setdefault("".join(name.casefold().split()), name)
        if other != name:
            notes.append(f"categories {other!r} and {name!r} differ only in case or spaces; are they the same?")
    return notes
