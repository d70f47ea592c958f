"""Scan files: LAS, LAZ, PLY, NPZ and text, read and written.

N is a number of points. Coordinates are float64 metres everywhere: map coordinates of 10^6 m keep their millimetres.
"""

import io
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from latentgnn.errors import UserError
from latentgnn.files.reading import regular_file
from latentgnn.files.writing import write_bytes
from latentgnn.tasks.pointcloud.kitti import label_bytes, read_velodyne
from latentgnn.tasks.pointcloud.las import LasChunks, las_bytes, read_las, rewrite_las
from latentgnn.tasks.pointcloud.ply import ply_bytes, read_ply
from latentgnn.tasks.pointcloud.raw import SCALARS, RawScan, ScanChunks, class_ids, numbers, readable, stacked, table_of
from latentgnn.tasks.pointcloud.text import read_table, table_bytes

__all__ = [
    "SUFFIXES",
    "RawScan",
    "Scan",
    "coordinate_fault",
    "read_scan",
    "scan_chunks",
    "write_classes",
    "write_scan",
]

SUFFIXES = (".las", ".laz", ".ply", ".npz", ".csv", ".xyz", ".bin")

_FARTHEST = 1e8
"""Metres; more than twice the Earth's circumference."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Scan:
    """A scan with the inputs of a network and the labels for its scores.

    Args:
        name: name, unique in its set.
        points: metres as in the file, float64, shape (N, 3).
        features: float32, shape (N, F), in the order of `ScanSet.feature_names`.
        labels: classes 0..K-1 or `IGNORE`, int64, shape (N,); ``None`` if the file has none.
    """

    name: str
    points: NDArray[np.float64]
    features: NDArray[np.float32]
    labels: NDArray[np.int64] | None


def read_scan(path: Path | str) -> RawScan:
    """Read a LAS, LAZ, PLY, NPZ, CSV or XYZ file, or SemanticKITTI's ``.bin`` with the labels beside it.

    Classes are LAS's ``classification``, a PLY vertex property ``label``, ``class``, ``classification`` or
    ``scalar_Label``, a text column with such a name, and NPZ's ``labels``. An NPZ file has ``points`` and other values
    under the names of `RawScan.columns`. For text see `latentgnn.tasks.pointcloud.text.read_table`.

    Raises:
        UserError: if there is no such file, its format is unknown, or it is damaged or truncated.
    """
    path = Path(path)
    reader = _READERS.get(path.suffix.lower())
    if reader is None:
        raise UserError(f"{path}: expected a file that ends in {', '.join(SUFFIXES)}")
    regular_file(path)
    with readable(path):
        scan = reader(path)
    _check_shapes(path, scan)
    return scan


def scan_chunks(path: Path, size: int) -> ScanChunks:
    """Open a scan file in chunks: LAS and LAZ are read in chunks, the others whole.

    Args:
        path: see `read_scan`.
        size: number of points per chunk.

    Raises:
        UserError: see `read_scan`; also raised while the chunks are read.
    """
    if path.suffix.lower() not in (".las", ".laz"):
        return _WholeInChunks(read_scan(path), size)
    regular_file(path)
    return LasChunks(path, size)


class _WholeInChunks:
    def __init__(self, scan: RawScan, size: int) -> None:
        self.number = len(scan.points)
        self._scan = scan
        self._parts = [slice(first, first + size) for first in range(0, self.number, size)]

    def points(self) -> Iterator[NDArray[np.float64]]:
        return (self._scan.points[part] for part in self._parts)

    def scans(self) -> Iterator[RawScan]:
        scan = self._scan
        for part in self._parts:
            columns = {name: values[part] for name, values in scan.columns.items()}
            classes = None if scan.classes is None else scan.classes[part]
            yield RawScan(points=scan.points[part], columns=columns, classes=classes)


def coordinate_fault(points: NDArray[np.float64]) -> str | None:
    """Return what is wrong with a scan's points, shape (N, 3), or ``None``: they must be near enough for float64."""
    if not len(points):
        return "it has no points"
    if number := int((~np.isfinite(points)).any(axis=1).sum()):
        return f"{number} of its {len(points)} points have coordinates that are not finite numbers"
    if (farthest := float(np.abs(points).max())) > _FARTHEST:
        return f"it has coordinates of {farthest:.3g} m; expected {_FARTHEST:.0e} m at most"
    return None


def write_scan(path: Path | str, scan: RawScan) -> None:
    """Write a LAS, LAZ, PLY, NPZ, CSV or XYZ file, or SemanticKITTI's ``.label``, by its suffix, in one step.

    LAS and LAZ round coordinates to a tenth of a millimetre or, for a scan larger than 214 km, to what 31 bits can
    represent; text has twelve digits; PLY and NPZ keep float64.

    Raises:
        UserError: if the suffix is unknown, or the format cannot store the classes.
    """
    path = Path(path)
    writer = _WRITERS.get(path.suffix.lower())
    if writer is None:
        raise UserError(f"{path}: expected a file name that ends in {', '.join(_WRITERS)}")
    _check_shapes(path, scan)
    write_bytes(path, writer(path, scan))


def write_classes(path: Path | str, classes: NDArray[np.integer[Any]], *, source: Path | str) -> None:
    """Rewrite a scan with other classes.

    From LAS or LAZ to LAS or LAZ, everything else is unchanged: all other values of the points, scales and offsets, and
    the coordinate system.

    Args:
        path: file to write; its suffix determines the format.
        classes: id of every point, shape (N,); from LAS to LAS it may be a memory map, which is read in chunks.
        source: the file that the points come from.

    Raises:
        UserError: if the number of points differs, or the format cannot store the classes.
    """
    path, source = Path(path), Path(source)
    if {path.suffix.lower(), source.suffix.lower()} <= {".las", ".laz"}:
        rewrite_las(path, classes, source=source)
        return
    scan = read_scan(source)
    if len(classes) != len(scan.points):
        raise UserError(f"{source} has {len(scan.points)} points, but there are classes for {len(classes)}")
    write_scan(path, RawScan(points=scan.points, columns=scan.columns, classes=np.asarray(classes, np.int64)))


def _check_shapes(path: Path, scan: RawScan) -> None:
    if scan.points.ndim != 2 or scan.points.shape[1] != 3:
        raise UserError(f"{path}: expected points of shape (N, 3); got {scan.points.shape}")
    number = len(scan.points)
    if scan.classes is not None and scan.classes.shape != (number,):
        raise UserError(f"{path}: there are {number} points, but labels of shape {scan.classes.shape}")
    for name, values in scan.columns.items():
        expected = (number, 3) if name in ("color", "normal") else (number,)
        if values.shape != expected:
            raise UserError(f"{path}: expected {name} of shape {expected} for {number} points; got {values.shape}")


def _read_bin(path: Path) -> RawScan:
    points, remission, classes = read_velodyne(path)
    return RawScan(points=points, columns={"intensity": remission}, classes=classes)


def _write_label(path: Path, scan: RawScan) -> bytes:
    if scan.classes is None:
        raise UserError(f"{path}: a file of labels needs classes, and the scan has none")
    return label_bytes(path, scan.classes)


def _read_text(path: Path) -> RawScan:
    values = read_table(path)
    columns: dict[str, NDArray[Any]] = {name: values[name] for name in SCALARS if name in values}
    if {"red", "green", "blue"} <= set(values):
        color = stacked(values, ("red", "green", "blue"))
        # The range is 0 to 1, 8 bits or 16 bits.
        largest = next((most for most in (1, 255) if color.max(initial=0) <= most), 65535)
        columns["color"] = (color / largest).astype(np.float32)
    if {"nx", "ny", "nz"} <= set(values):
        columns["normal"] = stacked(values, ("nx", "ny", "nz")).astype(np.float32)
    classes = class_ids(path, values["label"]) if "label" in values else None
    return RawScan(points=stacked(values, ("x", "y", "z")), columns=columns, classes=classes)


def _write_text(path: Path, scan: RawScan) -> bytes:
    return table_bytes(table_of(scan), delimiter="," if path.suffix.lower() == ".csv" else " ")


def _read_npz(path: Path) -> RawScan:
    # np.load does not close a file that it cannot read.
    with path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
        if "points" not in arrays:
            raise UserError(f"{path}: expected an array 'points'; it has {', '.join(arrays) or 'none'}")
        names = [name for name in (*SCALARS, "color", "normal") if name in arrays]
        points, *values = (numbers(path, name, arrays[name]) for name in ("points", *names))
        columns = dict(zip(names, values, strict=True))
        if "color" in columns and columns["color"].dtype.kind in "iu":
            columns["color"] = (columns["color"] / np.iinfo(columns["color"].dtype).max).astype(np.float32)
        classes = class_ids(path, arrays["labels"]) if "labels" in arrays else None
        return RawScan(points=points.astype(np.float64), columns=columns, classes=classes)


def _write_npz(path: Path, scan: RawScan) -> bytes:
    arrays: dict[str, Any] = {"points": scan.points, **scan.columns}
    if scan.classes is not None:
        arrays["labels"] = scan.classes
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **arrays)
    return buffer.getvalue()


_READERS = {
    ".las": read_las,
    ".laz": read_las,
    ".ply": read_ply,
    ".npz": _read_npz,
    ".csv": _read_text,
    ".xyz": _read_text,
    ".bin": _read_bin,
}
_WRITERS = {
    ".las": las_bytes,
    ".laz": las_bytes,
    ".ply": lambda path, scan: ply_bytes(scan),
    ".npz": _write_npz,
    ".csv": _write_text,
    ".xyz": _write_text,
    ".label": _write_label,
}
