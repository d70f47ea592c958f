"""Sets without faults: a split with faulty records is refused, or the records are removed."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

from latentgnn.errors import UserError
from latentgnn.files.stored_lists import part_of
from latentgnn.tasks.checks import SHOWN
from latentgnn.tasks.detection.check import Report, check
from latentgnn.tasks.detection.coco import CocoAnnotations
from latentgnn.tasks.detection.formats.coco_files import read_coco
from latentgnn.tasks.detection.formats.records import Reading


def load_split(
    annotation_path: Path | str,
    image_folder: Path | str,
    on_fault: Literal["stop", "skip"] = "stop",
    *,
    whole: bool = True,
) -> CocoAnnotations:
    """Call `load` for a COCO JSON file and the folder that its file names are relative to."""
    return load(read_coco(Path(annotation_path), Path(image_folder)), on_fault, whole=whole)


def load(reading: Reading, on_fault: Literal["stop", "skip"] = "stop", *, whole: bool = True) -> CocoAnnotations:
    """Check what was read of a split, and make a set of it.

    Args:
        reading: what was read, in any format.
        on_fault: ``stop`` refuses a set with faults; ``skip`` leaves the faulty records out, and the result's
            ``skipped`` says which and how many.
        whole: see `latentgnn.tasks.detection.check.check_split`.

    Raises:
        UserError: with the first faults; also if leaving out records does not help: no JSON, no image folder, faulty
            categories (every label depends on them), or no image left.
    """
    report = check(reading, whole=whole)
    dataset = reading.dataset
    if not report.faults:
        return CocoAnnotations(dataset, reading.image_folder)
    if any(fault.fatal for fault in report.faults):
        raise UserError(report.text(SHOWN))
    if on_fault == "stop":
        raise UserError(f"{report.text(SHOWN)}\nmend these records, or leave them out with --data.on_fault skip")
    sound = sound_part(reading, report)
    if sound is None:
        raise UserError(f"{report.text(SHOWN)}\nno image is left without these records")
    return sound


def sound_part(reading: Reading, report: Report) -> CocoAnnotations | None:
    """Return a split without its faulty records; ``None`` if nothing is left."""
    dataset, lost = reading.dataset, reading.lost
    if any(fault.fatal for fault in report.faults):
        return None
    sound = _without_faults(dataset, report)
    if not sound["images"]:
        return None
    images = len(dataset["images"]) - len(sound["images"]) + lost["images"]
    annotations = len(dataset["annotations"]) - len(sound["annotations"]) + lost["annotations"]
    return CocoAnnotations(
        sound,
        reading.image_folder,
        skipped_images=images,
        skipped_annotations=annotations,
        skipped=f"{report.text(SHOWN)}\nleft out: images {images}, annotations {annotations}",
    )


def _without_faults(dataset: dict[str, Any], report: Report) -> dict[str, Any]:
    def sound(records: Sequence[Any], bad: set[int]) -> Iterator[tuple[int, dict[str, Any]]]:
        for index, record in enumerate(records):
            if isinstance(record, dict) and type(id := record.get("id")) is int and id >= 0 and id not in bad:
                yield index, record

    images, annotations = dataset["images"], dataset["annotations"]
    kept = {image["id"]: index for index, image in sound(images, report.bad_images)}
    theirs = [index for index, record in sound(annotations, report.bad_annotations) if record["image_id"] in kept]
    return {
        **dataset,
        "images": part_of(images, list(kept.values())),
        "annotations": part_of(annotations, theirs),
    }
