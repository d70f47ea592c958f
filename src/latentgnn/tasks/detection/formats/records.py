"""The common result of all format readers: COCO records, and the place where each was read."""

from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from latentgnn.files.stored_lists import part_of

Kind = Literal["images", "annotations", "categories"]

_NAMED = 20  # number of categories that an error lists


@dataclass(frozen=True, kw_only=True, slots=True)
class Fault:
    """An error in a set.

    Args:
        file: file with the error: an annotation file or an image.
        record: which record, for example ``annotations[12], id 345``.
        message: what is wrong.
        fatal: whether it cannot be fixed by leaving out records.
    """

    file: Path
    record: str
    message: str
    fatal: bool = False

    def __str__(self) -> str:
        return f"{self.file}: {self.record}: {self.message}" if self.record else f"{self.file}: {self.message}"

    def to_json(self) -> dict[str, Any]:
        """Return plain data."""
        return {"file": str(self.file), "record": self.record, "message": self.message, "fatal": self.fatal}


@dataclass(frozen=True, slots=True)
class Place:
    """The place where a record was read.

    Args:
        file: the file.
        record: the place in the file.
    """

    file: Path
    record: str = ""


@dataclass(kw_only=True, slots=True)
class Reading:
    """A set, or one split of it, as read and before it is checked.

    Args:
        file: path that stands for the set in messages: an annotation file or a folder.
        image_folder: folder that the images' file names are relative to.
        format: name of the format.
        dataset: the COCO dict; images and annotations may be lists that stay in a file.
        faults: faults of records that could not be made.
        places: for each kind, maps a record's id to its place, if that is not ``file``.
        lost: number of images and of annotations that could not be made.
        notes: notes for the user that are not faults.
    """

    file: Path
    image_folder: Path
    format: str
    dataset: dict[str, Any] = field(default_factory=lambda: {"images": [], "annotations": [], "categories": []})
    faults: list[Fault] = field(default_factory=list)
    places: dict[str, dict[int, Place]] = field(default_factory=lambda: {"images": {}, "annotations": {}})
    lost: Counter[str] = field(default_factory=Counter)
    notes: list[str] = field(default_factory=list)

    def fatal(self, message: str, *, record: str = "", file: Path | None = None) -> None:
        """Add a fault that cannot be fixed by leaving out records."""
        self.faults.append(Fault(file=file or self.file, record=record, message=message, fatal=True))

    def lose(self, kind: Kind, place: Place, message: str) -> None:
        """Add a fault for a record that cannot be made."""
        self.faults.append(Fault(file=place.file, record=place.record, message=message))
        self.lost[kind] += 1

    def part(self, names: Collection[str], *, inside: bool) -> "Reading":
        """Return the images whose file names are in ``names``, or all others, with everything that belongs to them.

        Faults of records that could not be made, and records without an image, go with all others.
        """
        images = self.dataset["images"]
        # Indices instead of records, which may be too many to hold in memory.
        chosen = [index for index, image in enumerate(images) if (_file_name(image) in names) == inside]
        ids = {_id(image) for image in images if _file_name(image) in names}
        annotations = self.dataset["annotations"]
        theirs = [index for index, record in enumerate(annotations) if (_id(record, "image_id") in ids) == inside]
        return Reading(
            file=self.file,
            image_folder=self.image_folder,
            format=self.format,
            dataset={**self.dataset, "images": part_of(images, chosen), "annotations": part_of(annotations, theirs)},
            faults=[] if inside else self.faults,
            places=self.places,
            lost=Counter() if inside else self.lost,
            notes=[] if inside else self.notes,
        )


class Builder:
    """Adds records to a `Reading`; ids are numbered in the order of the calls.

    Args:
        reading: the reading to add to.
    """

    def __init__(self, reading: Reading) -> None:
        self.reading = reading
        self._annotations = 0

    def image(self, path: Path, size: tuple[Any, Any], place: Place) -> int:
        """Add an image with its (width, height); return its id."""
        id = len(self.reading.dataset["images"]) + 1
        self.reading.dataset["images"].append(
            {"id": id, "file_name": relative(path, self.reading.image_folder), "width": size[0], "height": size[1]}
        )
        self.reading.places["images"][id] = place
        return id

    def annotation(
        self,
        image_id: int,
        category_id: int,
        place: Place,
        *,
        box: Sequence[float],
        segmentation: Any = None,
        crowd: bool = False,
    ) -> None:
        """Add an object with its box (x, y, width, height)."""
        self._annotations += 1
        record = {
            "id": self._annotations,
            "image_id": image_id,
            "category_id": category_id,
            "bbox": list(box),
            "iscrowd": int(crowd),
        }
        if segmentation is not None:
            record["segmentation"] = segmentation
        self.reading.dataset["annotations"].append(record)
        self.reading.places["annotations"][self._annotations] = place


class Categories:
    """Category names and their ids: only those given, or any that occur in the set.

    Args:
        known: id and name of every category; ``None`` accepts any name.
    """

    def __init__(self, known: Iterable[tuple[int, str]] | None = None) -> None:
        self._ids = None if known is None else {name: id for id, name in known}

    @property
    def are_known(self) -> bool:
        """Whether the categories were given."""
        return self._ids is not None

    def meet(self, names: Iterable[str]) -> None:
        """Number the names in a set from 1, in alphabetical order, unless categories were given."""
        if self._ids is None:
            self._ids = {name: id for id, name in enumerate(sorted(set(names)), 1)}

    def id_of(self, name: str) -> int | None:
        """Return the id of a name, or ``None`` if there is no such category."""
        return (self._ids or {}).get(name)

    def unknown(self, name: str) -> str:
        """Return the message for a name that is not a category."""
        names = list(self._ids or ())
        others = f" and {len(names) - _NAMED} others" if len(names) > _NAMED else ""
        return f"unknown category {name!r}; expected one of {', '.join(names[:_NAMED])}{others}"

    def records(self) -> list[dict[str, Any]]:
        """Return the categories in COCO's form."""
        return [{"id": id, "name": name} for name, id in sorted((self._ids or {}).items(), key=lambda item: item[1])]


def relative(path: Path, folder: Path) -> str:
    """Return a path relative to a folder, or unchanged if it is elsewhere."""
    return (path.relative_to(folder) if path.is_relative_to(folder) else path.absolute()).as_posix()


def box_of(xs: Sequence[float], ys: Sequence[float]) -> list[float]:
    """Return the smallest box (x, y, width, height) around points."""
    return [min(xs), min(ys), max(xs) - min(xs), max(ys) - min(ys)]


def _file_name(image: Any) -> str | None:
    name = image.get("file_name") if isinstance(image, dict) else None
    return name if isinstance(name, str) else None


def _id(record: Any, key: str = "id") -> int | None:
    id = record.get(key) if isinstance(record, dict) else None
    return id if type(id) is int else None
