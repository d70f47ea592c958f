"""The check of a set of scans before training: every file, every point."""

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
from latentgnn.tasks.pointcloud.config import DataConfig
from latentgnn.tasks.pointcloud.datasets import ScanSet
from latentgnn.tasks.pointcloud.features import to_labels, to_scan, unknown_ids
from latentgnn.tasks.pointcloud.layouts import Source, find_scans, resolve
from latentgnn.tasks.pointcloud.scans import coordinate_fault


@dataclass(kw_only=True, slots=True)
class Report:
    """The result of a check.

    Args:
        split: ``train`` or ``val``.
        class_names: in the order of the labels.
        faults: all faults, in the order of the scans.
        sound: the scans without faults.
        scans: total number of scans.
        points: number of points in sound scans.
        counts: number of points of each class in sound scans, int64, shape (K,).
    """

    split: str
    class_names: tuple[str, ...]
    faults: list[Fault] = field(default_factory=list)
    sound: list[Source] = field(default_factory=list)
    scans: int = 0
    points: int = 0
    counts: NDArray[np.int64]

    def text(self, limit: int | None = None) -> str:
        """Return one line per fault, and one with counts.

        Args:
            limit: maximum number of faults to list; ``None`` lists all.
        """
        lines = fault_lines(self.faults, limit)
        classes = ", ".join(f"{name} {count}" for name, count in zip(self.class_names, self.counts, strict=True))
        counts = f"scans {self.scans}, points {self.points} ({classes}), faults {len(self.faults)}"
        return "\n".join([*lines, f"{self.split}: {counts}"])

    def to_json(self) -> dict[str, Any]:
        """Return plain data."""
        classes = dict(zip(self.class_names, self.counts.tolist(), strict=True))
        counts = {"scans": self.scans, "points": self.points, "points_of_class": classes}
        return {"counts": counts, "faults": [fault.to_json() for fault in self.faults]}


def check_split(config: DataConfig, split: Split) -> Report:
    """Read every scan of a split and look for faults.

    Faults are: a file that is missing, damaged or truncated; different numbers of points and labels; no points;
    coordinates or features that are not finite, or coordinates beyond 10^8 m; a feature that a scan lacks; class ids
    without a name; no labelled point; a scan's name that occurs twice; a file that is in both splits.

    Args:
        config: the configuration, which says where the scans are.
        split: ``train`` or ``val``.

    Raises:
        UserError: if the scans cannot even be listed.
    """
    config = resolve(config)
    sources = find_scans(config, split)
    report = Report(
        split=split,
        class_names=class_names(config.classes),
        scans=len(sources),
        counts=np.zeros(len(class_names(config.classes)), np.int64),
    )
    trained_on: set[Path] = set()
    if split == "val":
        # To score a model, a folder with only validation scans is enough.
        with suppress(UserError):
            trained_on = {source.path.resolve() for source in find_scans(config, "train")}
    first: dict[str, Path] = {}
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        for source, content in zip(sources, pool.map(lambda source: _look(source, config), sources), strict=True):
            messages = list(content.messages)
            if source.name in first:
                other = first[source.name]
                where = "it is listed twice" if other == source.path else f"{other} has it too"
                messages.append(f"duplicated scan name {source.name!r}: {where}")
            first.setdefault(source.name, source.path)
            if source.path.resolve() in trained_on:
                messages.append("it is in the training set too")
            report.faults += [Fault(record=source.name, file=source.path, message=message) for message in messages]
            if not messages:
                report.sound.append(source)
                report.points += content.points
                report.counts += content.counts
    return report


def load_set(config: DataConfig, split: Split) -> ScanSet:
    """Check a split and return its scans.

    Args:
        config: says where the scans are; ``on_fault`` says what to do about faulty ones.
        split: ``train`` or ``val``.

    Raises:
        UserError: with the first faults; also if no scan is without faults.
    """
    config = resolve(config)
    report = check_split(config, split)
    skipped = faults_left_out(report, "scan", on_fault=config.on_fault, samples=report.scans, sound=len(report.sound))
    return ScanSet(report.sound, config, counts=report.counts, skipped=skipped)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Content:
    messages: tuple[str, ...]
    points: int
    counts: NDArray[np.int64]


def _look(source: Source, config: DataConfig) -> _Content:
    """Read one scan; return its content and its faults."""
    nothing = np.zeros(len(class_names(config.classes)), np.int64)
    try:
        raw = source.read()
    except UserError as error:
        return _Content(messages=(str(error),), points=0, counts=nothing)
    messages = []
    if (fault := coordinate_fault(raw.points)) is not None:
        messages.append(fault)
    if not len(raw.points):
        return _Content(messages=tuple(messages), points=0, counts=nothing)
    if not messages:
        try:
            features = to_scan(source.path, raw, config, unknown="ignore").features
        except UserError as error:
            messages.append(str(error))
        else:
            number = int((~np.isfinite(features)).any(axis=1).sum())
            if number:
                messages.append(f"{number} of its {len(raw.points)} points have features that are not finite numbers")
    counts = nothing
    if raw.classes is None:
        messages.append("no labelled point: it has no labels")
    else:
        labels, strange = to_labels(raw.classes, config)
        if strange:
            messages.append(unknown_ids(strange))
        counts = np.bincount(labels[labels != IGNORE], minlength=len(nothing)).astype(np.int64)
        if not counts.any():
            messages.append("no labelled point: none has a class that is named and not ignored")
    return _Content(messages=tuple(messages), points=len(raw.points), counts=counts)
