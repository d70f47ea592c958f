"""SemanticKITTI's files (Behley et al., ICCV 2019): ``.bin`` with a laser scan, ``.label`` with the points' classes."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from latentgnn.errors import UserError
from latentgnn.files.reading import regular_file

CLASSES = {
    10: "car",
    252: "car",
    11: "bicycle",
    15: "motorcycle",
    18: "truck",
    258: "truck",
    **dict.fromkeys((20, 13, 16, 256, 257, 259), "other-vehicle"),
    30: "person",
    254: "person",
    31: "bicyclist",
    253: "bicyclist",
    32: "motorcyclist",
    255: "motorcyclist",
    40: "road",
    60: "road",
    44: "parking",
    48: "sidewalk",
    49: "other-ground",
    50: "building",
    51: "fence",
    70: "vegetation",
    71: "trunk",
    72: "terrain",
    80: "pole",
    81: "traffic-sign",
}
"""The 19 classes of its single-scan task: moving objects count as their static class, and lane markings as road."""

IGNORED = (0, 1, 52, 99)
"""Unlabelled points, outliers, other structures and other objects."""

_VALIDATED = "08"
_FOLDERS = ("sequences", "dataset/sequences", "")


def sequences_folder(root: Path) -> Path | None:
    """Return the folder of the sequences ``NN/velodyne``, or ``None`` if there is none."""
    return next((root / folder for folder in _FOLDERS if any((root / folder).glob("[0-9][0-9]/velodyne"))), None)


def find_velodyne(root: Path, named: Sequence[str] | None, split: str) -> Iterator[tuple[str, Path]]:
    """Yield names and files of the scans of a split, sequence by sequence.

    Args:
        root: the data folder.
        named: sequences, such as ``08``; ``None`` takes the official ones: 08 for validation, and all others up to 10
            that exist for training.
        split: ``train`` or ``val``.

    Raises:
        UserError: if there is no such sequence.
    """
    folder = sequences_folder(root) or root
    present = sorted(path.parent.name for path in folder.glob("[0-9][0-9]/velodyne"))
    if named is None:
        named = [name for name in present if (name == _VALIDATED) == (split == "val") and name <= "10"]
    for sequence in named:
        if sequence not in present:
            raise UserError(
                f"{folder} has no {sequence}/velodyne, which data.{split} names; sequences: {', '.join(present)}"
            )
        for path in sorted((folder / sequence / "velodyne").glob("*.bin")):
            yield f"{sequence}_{path.stem}", path


def labels_of(path: Path) -> Path | None:
    """Return the file with a scan's labels, in ``labels`` beside its folder or beside the scan, or ``None``."""
    places = (path.parent.parent / "labels" / f"{path.stem}.label", path.with_suffix(".label"))
    return next((place for place in places if place.is_file()), None)


def read_velodyne(path: Path) -> tuple[NDArray[np.float64], NDArray[np.float32], NDArray[np.int64] | None]:
    """Return points in metres (N, 3), their remission (N,), and their classes (N,) if there are labels.

    Raises:
        UserError: if a file is truncated, or numbers of points and labels differ.
    """
    values = _values(path, "<f4", 4).reshape(-1, 4)
    points, remission = values[:, :3].astype(np.float64), values[:, 3].astype(np.float32)
    labels = labels_of(path)
    if labels is None:
        return points, remission, None
    # The upper half of a label is an object id.
    classes = (_values(labels, "<u4", 1) & 0xFFFF).astype(np.int64)
    if len(classes) != len(points):
        raise UserError(f"{path} has {len(points)} points, but {labels} has labels for {len(classes)}")
    return points, remission, classes


def label_bytes(path: Path, classes: NDArray[np.int64]) -> bytes:
    """Return the content of a label file, without object ids, as the benchmark's server expects it."""
    if classes.size and not 0 <= classes.min() <= classes.max() <= 0xFFFF:
        raise UserError(f"{path}: labels hold ids from 0 to 65535; got {classes.min()} to {classes.max()}")
    return classes.astype("<u4").tobytes()


def _values(path: Path, kind: str, together: int) -> NDArray[Any]:
    size, unit = regular_file(path).stat().st_size, 4 * together
    if size % unit:
        raise UserError(f"{path}: it is cut short, or something else: {size} bytes are no multiple of {unit}")
    return np.fromfile(path, np.dtype(kind))
