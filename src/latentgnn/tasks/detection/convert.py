"""``convert``: write a set of any format as a self-contained COCO-format folder."""

import json
from pathlib import Path
from typing import Any

from latentgnn.files.outputs import Results, quoted, say_end
from latentgnn.tasks.checks import SPLITS
from latentgnn.tasks.detection.coco import CocoAnnotations
from latentgnn.tasks.detection.config import DetectionConfig
from latentgnn.tasks.detection.sets import DetectionSet
from latentgnn.tasks.detection.sound_sets import load
from latentgnn.tasks.inputs import result_names
from latentgnn.tasks.tars import open_file


def convert(config: DetectionConfig, *, out: Path, overwrite: bool, with_images: bool) -> None:
    """Write ``annotations/instances_train.json`` and the images in ``train/``, and the same for ``val``.

    A set without splits, of which no validation part is to be drawn, is written as ``train``.

    Args:
        config: the configuration, which says where the set is, how it is split, and what to do about faults.
        out: output folder, new or empty.
        overwrite: replace the results of an earlier command in ``out``.
        with_images: copy the images; otherwise the file names point into the set's own folder.

    Raises:
        UserError: if the set has faults, see `latentgnn.tasks.detection.sound_sets.load`.
    """
    opened = DetectionSet(config.data)
    with Results(out, [_file(split) for split in SPLITS], overwrite=overwrite) as written:
        readings = {split: opened.reading(split) for split in SPLITS} if opened.is_split else {"train": opened.whole()}
        written.reads(reading.file for reading in readings.values())
        # Masks are not decoded together here.
        sets = {split: load(reading, config.data.on_fault, whole=False) for split, reading in readings.items()}
        for annotations in sets.values():
            written.reads(image.path for image in annotations.images)
        for split, annotations in sets.items():
            names = {image.id: image.file_name for image in annotations.images}
            if with_images:
                names = _copy(annotations, written, Path(split))
            dataset = _renamed(annotations.dataset, names)
            written.write(_file(split), json.dumps(dataset).encode() + b"\n")
            if annotations.skipped:
                print(annotations.skipped)
            print(f"{split}: {len(annotations)} images, {len(dataset['annotations'])} annotations")
    root = f"--data.root {quoted(out)}"
    if not with_images:
        root += "".join(f" --data.{split}_images {quoted(sets[split].folder.absolute())}" for split in sets)
    say_end(out, f"latentgnn check-data {root}")


def _file(split: str) -> Path:
    return Path("annotations") / f"instances_{split}.json"


def _copy(annotations: CocoAnnotations, written: Results, folder: Path) -> dict[int, str]:
    """Copy the images of a set; return their new names, relative to their common folder."""
    names: dict[int, str] = {}
    paths = [image.path for image in annotations.images]
    for image, name in zip(annotations.images, result_names(paths), strict=True):
        target = name.with_name(f"{name.name}{image.path.suffix}")
        written.write(folder / target, _content(image.path))
        names[image.id] = target.as_posix()
    return names


def _content(path: Path) -> bytes:
    with open_file(path) as file:
        return file.read()


def _renamed(dataset: dict[str, Any], names: dict[int, str]) -> dict[str, Any]:
    images = [{**image, "file_name": names[image["id"]]} for image in dataset["images"]]
    return {**dataset, "images": images, "annotations": list(dataset["annotations"])}
