"""The check of a detection set of any format before training: every record and every image file."""

import itertools
import os
import threading
from array import array
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from latentgnn.files.plain_values import shown
from latentgnn.files.stored_lists import part_of
from latentgnn.tasks.checks import fault_lines
from latentgnn.tasks.detection.formats.coco_files import read_coco
from latentgnn.tasks.detection.formats.records import Fault, Kind, Reading
from latentgnn.tasks.detection.record_faults import box_faults, field_text, image_fault, image_record_faults, is_number
from latentgnn.tasks.detection.segmentations import segmentation_fault
from latentgnn.tasks.tars import is_folder

# The masks of a training image are decoded together, with one byte per pixel and object.
_MOST_MASK_BYTES = 2 * 2**30

# Threads decode in parallel, but only a few images at a time that are larger than this (64 MB as RGB).
_LARGE_PIXELS = 2**24
_MOST_LARGE = 2
# Number of images whose files are checked before the next records are read.
_FILES_AT_A_TIME = 4096


@dataclass(kw_only=True, slots=True)
class Report:
    """The result of a check.

    Args:
        file: the annotation file, or the path that stands for the set.
        faults: all faults in the order of the file; ids that occur twice come after the other faults of their kind, and
            faults of image files come last.
        bad_images: ids of images to leave out, with their annotations.
        bad_annotations: ids of annotations to leave out.
        counts: number of records of each kind; empty if the file could not be parsed.
    """

    file: Path
    faults: list[Fault] = field(default_factory=list)
    bad_images: set[int] = field(default_factory=set)
    bad_annotations: set[int] = field(default_factory=set)
    counts: dict[str, int] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Return plain data."""
        return {"file": str(self.file), "counts": self.counts, "faults": [fault.to_json() for fault in self.faults]}

    def text(self, limit: int | None = None) -> str:
        """Return one line per fault and one with counts.

        Args:
            limit: maximum number of faults to list, the fatal ones first; ``None`` lists all.
        """
        fatal_first = sorted(self.faults, key=lambda fault: not fault.fatal)
        lines = fault_lines(fatal_first, limit)
        counts = {**self.counts, "faults": len(self.faults)}
        return "\n".join([*lines, f"{self.file}: " + ", ".join(f"{what} {count}" for what, count in counts.items())])


def check_split(annotation_path: Path | str, image_folder: Path | str, *, whole: bool = True) -> Report:
    """Check every annotation and every image file of a split.

    Faults are: a missing file or folder; malformed JSON; lists, records or fields that are missing or have the wrong
    type; an id used twice; an annotation of an unknown image or category; a box without area, or more than a pixel
    outside its image; a negative area; a mask that cannot be decoded, has no pixel, or is missing while other
    annotations have one; an image with more pixels or a longer side than is read, or with more masks than memory should
    hold; an image file that is missing, damaged, truncated, or of another size than its record says (both as stored and
    as its EXIF orientation turns it).

    JPEG files are decoded only if their end is missing: the decoder makes a picture even of a damaged file, so that
    decoding would not find more. All other files are decoded.

    Args:
        annotation_path: COCO JSON file.
        image_folder: folder that its file names are relative to.
        whole: whether images are used whole, not in crops or tiles, so that all masks of one must fit into memory
            together.
    """
    return check(read_coco(Path(annotation_path), Path(image_folder)), whole=whole)


def check(reading: Reading, *, whole: bool = True) -> Report:
    """Check the records that were read for a split, see `check_split`; faults found while reading come first."""
    report = Report(file=reading.file, faults=list(reading.faults))
    if not is_folder(reading.image_folder):
        report.faults.append(Fault(file=reading.image_folder, record="", message="no such image folder", fatal=True))
    if not any(fault.fatal for fault in report.faults):
        if not reading.dataset["images"] and not report.faults:
            report.faults.append(Fault(file=reading.file, record="", message="it has no image", fatal=True))
        _Checker(report, reading, whole).run()
    return report


_File = tuple[str, int, Path, tuple[int, int]]
"""A file to check: the record's name, its id, the path, and the (width, height) that the image should have."""


class _Checker:
    """One pass over a parsed file; faults go to the report."""

    def __init__(self, report: Report, reading: Reading, whole: bool) -> None:
        self.report = report
        self.dataset = dataset = reading.dataset
        self.image_folder = reading.image_folder
        self.places = reading.places
        self.whole = whole
        self.sizes: dict[int, tuple[int, int] | None] = {}
        self.objects: Counter[int] = Counter()
        self.crowds = 0
        self.categories: set[int] = set()
        self.has_masks = any(
            isinstance(annotation, dict) and annotation.get("segmentation") for annotation in dataset["annotations"]
        )

    def run(self) -> None:
        self._categories()
        sound = self._images()
        self._annotations()
        if self.has_masks and self.whole:
            self._mask_memory(sound)
        self._files(sound)
        self.report.counts = {
            "images": len(self.dataset["images"]),
            "objects": len(self.dataset["annotations"]) - self.crowds,
            "crowds": self.crowds,
            "categories": len(self.dataset["categories"]),
        }

    def _categories(self) -> None:
        for _, record, category, id in self._records("categories"):
            if not isinstance(category.get("name"), str) or not category["name"]:
                self._fault("categories", record, f"expected a name, but it is {field_text(category, 'name')}")
            self.categories.add(id)

    def _images(self) -> Sequence[int]:
        """Return the indices of the records without faults, whose files must be checked."""
        sound = array("q")
        sizes: dict[tuple[int, int], tuple[int, int]] = {}
        for index, record, image, id in self._records("images"):
            messages = list(image_record_faults(image))
            for message in messages:
                self._fault("images", record, message, id)
            if messages:
                self.sizes[id] = None
                continue
            # Cached: of a million images, many have the same size.
            size = image["width"], image["height"]
            self.sizes[id] = sizes.setdefault(size, size)
            sound.append(index)
        return sound

    def _annotations(self) -> None:
        for _, record, annotation, id in self._records("annotations"):
            for message in self._annotation_faults(annotation):
                self._fault("annotations", record, message, id)

    def _annotation_faults(self, annotation: dict[str, Any]) -> Iterator[str]:
        image_id, category_id = annotation.get("image_id"), annotation.get("category_id")
        size = None
        if type(image_id) is not int:
            yield f"expected an integer image_id, but it is {field_text(annotation, 'image_id')}"
        elif image_id not in self.sizes:
            yield f"unknown image: image_id {image_id} is not among the images"
        else:
            size = self.sizes[image_id]
            self.objects[image_id] += 1
        if type(category_id) is not int:
            yield f"expected an integer category_id, but it is {field_text(annotation, 'category_id')}"
        elif category_id not in self.categories:
            yield f"unknown category: category_id {category_id} is not among the categories"
        if type(annotation.get("iscrowd", 0)) is not int or annotation.get("iscrowd", 0) not in (0, 1):
            yield f"expected iscrowd of 0 or 1, but it is {field_text(annotation, 'iscrowd')}"
        if "area" in annotation and not (is_number(annotation["area"]) and annotation["area"] >= 0):
            yield f"expected an area of 0 or more, but it is {field_text(annotation, 'area')}"
        yield from box_faults(annotation, size)
        if annotation.get("segmentation"):
            if size is not None:
                fault = segmentation_fault(annotation["segmentation"], *size, may_be_empty=False)
                if fault is not None:
                    yield fault
        elif self.has_masks:
            yield "it has no segmentation, which other annotations have"

    def _mask_memory(self, sound: Sequence[int]) -> None:
        for record, id, _, (width, height) in self._files_of(sound):
            if (size := self.objects[id] * width * height) > _MOST_MASK_BYTES:
                message = (
                    f"the masks of its {self.objects[id]:,} objects take {size / 2**30:.1f} GiB when they are decoded; "
                    f"expected at most {_MOST_MASK_BYTES / 2**30:.0f} GiB: learn from crops "
                    "(--data.crop.size 1024), or cut the image up"
                )
                self._fault("images", record, message, id)

    def _files_of(self, sound: Sequence[int]) -> Iterator[_File]:
        chosen = part_of(self.dataset["images"], sound)
        for index, image in zip(sound, chosen, strict=True):
            size = image["width"], image["height"]
            yield _called("images", index, image), image["id"], self.image_folder / image["file_name"], size

    def _files(self, sound: Sequence[int]) -> None:
        few = threading.Semaphore(_MOST_LARGE)

        def fault(file: _File) -> str | None:
            _, _, path, (width, height) = file
            with few if width * height > _LARGE_PIXELS else nullcontext():
                return image_fault(path, (width, height))

        with ThreadPoolExecutor(min(32, (os.cpu_count() or 1) + 4)) as pool:
            remaining = self._files_of(sound)
            while files := list(itertools.islice(remaining, _FILES_AT_A_TIME)):
                for (record, id, path, _), message in zip(files, pool.map(fault, files), strict=True):
                    if message:
                        self._fault("images", record, message, id, path)

    def _records(self, kind: Kind) -> Iterator[tuple[int, str, dict[str, Any], int]]:
        """Yield the records of a list that are objects with an integer id: (index, name in messages, record, id)."""
        indices, ids = array("q"), array("q")
        for index, record in enumerate(self.dataset[kind]):
            called = f"{kind}[{index}]"
            if not isinstance(record, dict):
                self._fault(kind, called, f"expected an object, but it is {shown(record)}")
                continue
            if kind == "annotations":
                self.crowds += record.get("iscrowd") == 1
            if type(record.get("id")) is not int or record["id"] < 0:
                self._fault(kind, called, f"expected an integer id of 0 or more, but it is {field_text(record, 'id')}")
            else:
                indices.append(index)
                ids.append(record["id"])
                yield index, _called(kind, index, record), record, record["id"]
        for first, again in _repeated(ids):
            called, other = (_called(kind, indices[place], {"id": ids[place]}) for place in (again, first))
            self._fault(kind, called, f"duplicated id: {other} has it too", ids[again])

    def _fault(self, kind: Kind, record: str, message: str, id: int | None = None, file: Path | None = None) -> None:
        # Every label depends on the categories, so none of them can be left out.
        fatal = kind == "categories"
        place = self.places.get(kind, {}).get(-1 if id is None else id)
        if place is not None and file is None:
            file, record = place.file, place.record
        elif place is not None:
            record = f"annotated in {place.file}" if place.file != file else ""
        self.report.faults.append(Fault(file=file or self.report.file, record=record, message=message, fatal=fatal))
        if id is not None and not fatal:
            (self.report.bad_images if kind == "images" else self.report.bad_annotations).add(id)


def _called(kind: Kind, index: int, record: dict[str, Any]) -> str:
    return f"{kind}[{index}], id {record['id']}"


def _repeated(ids: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Yield the places of ids that occurred before, each with the place of the first occurrence."""
    order = np.argsort(np.array(ids, np.int64), kind="stable")
    ordered = np.array(ids, np.int64)[order]
    is_first = np.ones(len(order), bool)
    is_first[1:] = ordered[1:] != ordered[:-1]
    firsts = order[is_first][np.cumsum(is_first) - 1]
    pairs = zip(firsts[~is_first].tolist(), order[~is_first].tolist(), strict=True)
    yield from sorted(pairs, key=lambda pair: pair[1])
