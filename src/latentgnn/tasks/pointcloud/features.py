"""Inputs of a network for a scan's points: features, and labels of their classes."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from latentgnn.errors import UserError
from latentgnn.tasks.classes import IGNORE, class_names
from latentgnn.tasks.pointcloud.config import DataConfig, Feature
from latentgnn.tasks.pointcloud.raw import RawScan
from latentgnn.tasks.pointcloud.scans import Scan
from latentgnn.tasks.pointcloud.voxels import height_above_ground

COLOR_COLUMNS = ("red", "green", "blue")
NORMAL_COLUMNS = ("normal_x", "normal_y", "normal_z")
_COLUMNS_OF = {"color": COLOR_COLUMNS, "normal": NORMAL_COLUMNS}
# The columns of a scan that a feature is computed from, if they have other names.
_NEEDED: dict[str, tuple[str, ...]] = {
    "log_intensity": ("intensity",),
    "last_return": ("return_number", "number_of_returns"),
    "height": (),
}


def feature_columns(features: Sequence[Feature]) -> tuple[str, ...]:
    """Return names for the columns of `Scan.features`: ``color`` and ``normal`` have three each, all others one."""
    return tuple(column for feature in features for column in _COLUMNS_OF.get(feature, (feature,)))


def to_scan(
    path: Path, raw: RawScan, config: DataConfig, *, name: str = "", unknown: Literal["ignore", "refuse"] = "refuse"
) -> Scan:
    """Return a scan with the configured features and classes.

    Args:
        path: its file, for errors, and for its name if none is given.
        raw: content of the file.
        config: configuration with features and classes.
        name: name of the scan.
        unknown: whether class ids that the configuration does not name are ignored or refused.

    Raises:
        UserError: if it lacks a feature, or contains class ids without a name.
    """
    labels = None
    if raw.classes is not None:
        labels, strange = to_labels(raw.classes, config)
        if strange and unknown == "refuse":
            raise UserError(f"{path}: {unknown_ids(strange)}")
    return Scan(
        name=name or path.stem,
        points=raw.points,
        features=features_of(path, raw, config),
        labels=labels,
    )


def to_labels(classes: NDArray[np.int64], config: DataConfig) -> tuple[NDArray[np.int64], dict[int, int]]:
    """Return labels of class ids, and the number of points of each id that is neither a class nor ignored.

    ScanNet's files contain NYU40's classes and some invalid ids; all that are not evaluated are ignored.
    """
    label_of_name = {name: label for label, name in enumerate(class_names(config.classes))}
    label_of = {id: label_of_name[name] for id, name in (config.classes or {}).items()}
    ids, inverse, counts = np.unique(classes, return_inverse=True, return_counts=True)
    labels = np.array([label_of.get(id, IGNORE) for id in ids.tolist()], np.int64)[inverse.reshape(-1)]
    strange = {
        id: count
        for id, count in zip(ids.tolist(), counts.tolist(), strict=True)
        if id not in (*label_of, *config.ignored, IGNORE) and config.layout != "scannet"
    }
    return labels, strange


def unknown_ids(strange: Mapping[int, int]) -> str:
    """Return a message about ids that `to_labels` did not know."""
    told = ", ".join(f"{id} ({count} points)" for id, count in strange.items())
    return f"unknown class ids: {told}; name them in data.classes or leave them out with data.ignored"


def features_of(
    path: Path, raw: RawScan, config: DataConfig, *, low: NDArray[np.float64] | None = None
) -> NDArray[np.float32]:
    """Return the network's inputs for points besides coordinates, shape (N, F).

    Args:
        path: the scan's file, for errors.
        raw: a scan, or a part of one.
        config: configuration with ``features`` and ``height_radius``.
        low: the lowest corner of the whole scan, if this is a part of one.

    Raises:
        UserError: if it lacks a feature.
    """
    columns = [_feature(path, raw, feature, config, low).astype(np.float32) for feature in config.features]
    number = len(raw.points)
    return np.concatenate([column.reshape(number, -1) for column in columns] or [np.zeros((number, 0), np.float32)], 1)


def needed_columns(path: Path, raw: RawScan, config: DataConfig) -> dict[str, NDArray[Any]]:
    """Return the columns of a scan that its features are computed from.

    Raises:
        UserError: if it lacks one.
    """
    return {name: _column(path, raw, name) for feature in config.features for name in _NEEDED.get(feature, (feature,))}


def _feature(
    path: Path, raw: RawScan, feature: Feature, config: DataConfig, low: NDArray[np.float64] | None
) -> NDArray[Any]:
    if feature == "height":
        return height_above_ground(raw.points, config.height_radius, low=low)
    if feature == "log_intensity":
        return np.log1p(np.maximum(_column(path, raw, "intensity").astype(np.float32), 0))
    if feature == "last_return":
        return _column(path, raw, "return_number") == _column(path, raw, "number_of_returns")
    return _column(path, raw, feature)


def _column(path: Path, raw: RawScan, name: str) -> NDArray[Any]:
    if name not in raw.columns:
        present = ", ".join(raw.columns) or "coordinates alone"
        raise UserError(f"{path}: it has no {name}, which data.features asks for; it has {present}")
    return raw.columns[name]
