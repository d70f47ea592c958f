"""The check of a set of labelled images before training: every file, every pixel."""

import os
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from latentgnn.errors import UserError
from latentgnn.tasks.checks import Fault, Split, fault_lines, faults_left_out
from latentgnn.tasks.classes import IGNORE, class_names
from latentgnn.tasks.images import read_image
from latentgnn.tasks.segmentation.config import DataConfig
from latentgnn.tasks.segmentation.datasets import LabelledImages
from latentgnn.tasks.segmentation.labels import read_ids, to_labels, unknown_ids
from latentgnn.tasks.segmentation.layouts import Source, find_sources, resolve


@dataclass(kw_only=True, slots=True)
class Report:
    """The result of a check.

    Args:
        split: ``train`` or ``val``.
        class_names: in the order of the labels.
        counts: number of pixels of each class in sound images, int64, shape (K,).
        images: number of images.
        faults: all faults, in the order of the images.
        sound: the images without faults.
    """

    split: str
    class_names: tuple[str, ...]
    counts: NDArray[np.int64]
    images: int
    faults: list[Fault] = field(default_factory=list)
    sound: list[Source] = field(default_factory=list)

    def text(self, limit: int | None = None) -> str:
        """Return one line per fault, and one with counts.

        Args:
            limit: maximum number of faults to list; ``None`` lists all.
        """
        total = max(int(self.counts.sum()), 1)
        shares = zip(self.class_names, self.counts / total, strict=True)
        classes = ", ".join(f"{name} {share:.1%}" for name, share in shares)
        counts = f"images {self.images}, labelled pixels {self.counts.sum():,} ({classes}), faults {len(self.faults)}"
        return "\n".join([*fault_lines(self.faults, limit), f"{self.split}: {counts}"])

    def to_json(self) -> dict[str, Any]:
        """Return plain data."""
        classes = dict(zip(self.class_names, self.counts.tolist(), strict=True))
        counts = {"images": self.images, "pixels": int(self.counts.sum()), "pixels_of_class": classes}
        return {"counts": counts, "faults": [fault.to_json() for fault in self.faults]}


def check_split(config: DataConfig, split: Split) -> Report:
    """Read every image and every label picture of a split and look for faults.

    Faults are: an image without a label picture and vice versa; a file that is damaged; sizes that differ; ids that are
    neither classes nor ignored, and colours without an id; no labelled pixel; an image that is in both splits.

    Args:
        config: the configuration, which says where the files are.
        split: ``train`` or ``val``.

    Raises:
        UserError: if the files cannot even be listed.
    """
    config = resolve(config)
    sources = find_sources(config, split)
    names = class_names(config.classes)
    report = Report(split=split, class_names=names, counts=np.zeros(len(names), np.int64), images=len(sources))
    learnt: set[Path] = set()
    if split == "val":
        # To score a model, a folder with only validation images is enough.
        with suppress(UserError):
            learnt = {source.image.resolve() for source in find_sources(config, "train") if source.image is not None}
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        for source, (faults, counts) in zip(sources, pool.map(lambda one: _look(one, config), sources), strict=True):
            if source.image is not None and source.image.resolve() in learnt:
                faults.append(Fault(record=source.name, file=source.image, message="it is in the training set too"))
            report.faults += faults
            if not faults:
                report.sound.append(source)
                report.counts += counts
    return report


def load_set(config: DataConfig, split: Split) -> LabelledImages:
    """Check a split and return its images.

    Args:
        config: says where the images are; ``on_fault`` says what to do about faulty ones.
        split: ``train`` or ``val``.

    Raises:
        UserError: with the first faults; also if no image is without faults.
    """
    config = resolve(config)
    report = check_split(config, split)
    skipped = faults_left_out(report, "image", on_fault=config.on_fault, samples=report.images, sound=len(report.sound))
    return LabelledImages(report.sound, config, counts=report.counts, skipped=skipped)


def _look(source: Source, config: DataConfig) -> tuple[list[Fault], NDArray[np.int64]]:
    """The faults of an image, and its number of pixels of each class."""
    nothing = np.zeros(len(class_names(config.classes)), np.int64)
    name, image, label = source

    def fault(file: Path, message: str) -> Fault:
        return Fault(record=name, file=file, message=message)

    if image is None or label is None:
        present, what = (image, "label picture") if label is None else (label, "image")
        message = f"there is no {what} for {name}"
        return [fault(present or Path(config.root or ""), message)], nothing
    faults, counts = [], nothing
    size = None
    try:
        ids = read_ids(label, config)
        size = (ids.shape[1], ids.shape[0])
        labels, strange = to_labels(ids, config)
        counts = np.bincount(labels[labels != IGNORE], minlength=len(nothing)).astype(np.int64)
        if strange:
            faults.append(fault(label, unknown_ids(strange)))
        elif not counts.any():
            faults.append(fault(label, "no labelled pixel: none has a class that is named and not ignored"))
    except UserError as error:
        faults.append(fault(label, str(error)))
    try:
        read_image(image, size=size)
    except UserError as error:
        faults.append(fault(image, str(error)))
    return faults, counts
