"""What the readers of all formats make of a set: records as COCO has them, and for each where it was read."""

from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from latentgnn.stored_lists import part_of

Kind = Literal["images", "annotations", "categories"]

_NAMED = 20  # categories that an error lists


@dataclass(frozen=True, kw_only=True, slots=True)
class Fault:
    """Something wrong in a set.

    Args:
        file: where it is: a file of annotations, or an image.
        record: which record, for example ``annotations[12], id 345``.
        message: what is wrong.
        fatal: whether leaving out records cannot mend it.
    """

    file: Path
    record: str
    message: str
    fatal: bool = False

    def __str__(self) -> str:
        return f"{self.file}: {self.record}: {self.message}" if self.record else f"{self.file}: {self.message}"

    def to_json(self) -> dict[str, Any]:
        """As plain data."""
        return {"file": str(self.file), "record": self.record, "message": self.message, "fatal": self.fatal}


@dataclass(frozen=True, slots=True)
class Place:
    """Where a record was read.

    Args:
        file: the file.
        record: where in it.
    """

    file: Path
    record: str = ""


@dataclass(kw_only=True, slots=True)
class Reading:
    """A set, or one split of it, as it was read and before it is checked.

    Args:
        file: what stands for all of it in messages: a file of annotations, or a folder.
        image_folder: where the file names of its images point.
        format: the format's name.
        dataset: the COCO dict; images and annotations may be lists that stay in a file.
        faults: of records that could not be made.
        places: of each kind, from a record's id to its place, where that is not ``file``.
        lost: how many images and annotations could not be made.
        notes: what a person should know and is no fault.
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
        """A fault that leaving out records cannot mend."""
        self.faults.append(Fault(file=file or self.file, record=record, message=message, fatal=True))

    def lose(self, kind: Kind, place: Place, message: str) -> None:
        """A record that cannot be made, and why."""
        self.faults.append(Fault(file=place.file, record=place.record, message=message))
        self.lost[kind] += 1

    def part(self, names: Collection[str], *, inside: bool) -> "Reading":
        """The images whose file names are among ``names``, or all others, with what belongs to them.

        Faults of records that could not be made, and records that belong to no image, go with the others.
        """
        images = self.dataset["images"]
        # Numbers of records and not the records, which may be too many to be held.
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
    """Adds records to a `Reading`: ids are given in the order of the calls.

    Args:
        reading: to add to.
    """

    def __init__(self, reading: Reading) -> None:
        self.reading = reading
        self._annotations = 0

    def image(self, path: Path, size: tuple[Any, Any], place: Place) -> int:
        """Add an image of a (width, height); its id."""
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
    """Names of classes and their ids: those given, and no others; or those met, by name.

    Args:
        known: id and name of every category; ``None`` takes what comes.
    """

    def __init__(self, known: Iterable[tuple[int, str]] | None = None) -> None:
        self._ids = None if known is None else {name: id for id, name in known}

    @property
    def are_known(self) -> bool:
        """Whether they were given."""
        return self._ids is not None

    def meet(self, names: Iterable[str]) -> None:
        """Give ids from 1 on to the names in a set, in the order of the alphabet, unless they were given."""
        if self._ids is None:
            self._ids = {name: id for id, name in enumerate(sorted(set(names)), 1)}

    def id_of(self, name: str) -> int | None:
        """The id of a name, or ``None`` where there is no such category."""
        return (self._ids or {}).get(name)

    def unknown(self, name: str) -> str:
        """What to say about a name that is not among them."""
        names = list(self._ids or ())
        others = f" and {len(names) - _NAMED} others" if len(names) > _NAMED else ""
        return f"unknown category {name!r}; expected one of {', '.join(names[:_NAMED])}{others}"

    def records(self) -> list[dict[str, Any]]:
        """As COCO has them."""
        return [{"id": id, "name": name} for name, id in sorted((self._ids or {}).items(), key=lambda item: item[1])]


def relative(path: Path, folder: Path) -> str:
    """A path as it is named from a folder, or as it is where it lies elsewhere."""
    return (path.relative_to(folder) if path.is_relative_to(folder) else path.absolute()).as_posix()


def box_of(xs: Sequence[float], ys: Sequence[float]) -> list[float]:
    """The smallest box (x, y, width, height) around points."""
    return [min(xs), min(ys), max(xs) - min(xs), max(ys) - min(ys)]


def _file_name(image: Any) -> str | None:
    name = image.get("file_name") if isinstance(image, dict) else None
    return name if isinstance(name, str) else None


def _id(record: Any, key: str = "id") -> int | None:
    id = record.get(key) if isinstance(record, dict) else None
    return id if type(id) is int else None
