"""The common content of scan files of all formats: points, other values per point, classes.

N is a number of points. Coordinates are float64 metres everywhere: map coordinates of 10^6 m keep their millimetres.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from latentgnn.errors import UserError, system_error, told

SCALARS = ("intensity", "return_number", "number_of_returns")
"""The columns of shape (N,); ``color`` and ``normal`` have three values per point."""

Columns = Mapping[str, NDArray[Any]]


@dataclass(frozen=True, kw_only=True, eq=False)
class RawScan:
    """The content of a scan file.

    Args:
        points: metres, float64, shape (N, 3).
        columns: other values of each point by name: ``intensity``, ``return_number``, ``number_of_returns`` of shape
            (N,); ``color`` in 0..1 and ``normal`` of shape (N, 3).
        classes: class ids as in the file, int64, shape (N,); ``None`` if it has none.
    """

    points: NDArray[np.float64]
    columns: Columns = field(default_factory=dict)
    classes: NDArray[np.int64] | None = None


class ScanChunks(Protocol):
    """A scan that is read chunk by chunk, in the order of its file.

    Attributes:
        number: number of points.
    """

    number: int

    def points(self) -> Iterator[NDArray[np.float64]]:
        """Yield the coordinates in metres, shape (n, 3) each."""

    def scans(self) -> Iterator[RawScan]:
        """Yield the chunks with all their values; `points` must have been exhausted before."""


@contextmanager
def readable(path: Path) -> Iterator[None]:
    """Wrap the reading of a file: turn errors of its decoder into user errors with the path.

    Raises:
        UserError: if it is damaged or truncated, or the system could not read it.
    """
    try:
        # Overflow is reported by `latentgnn.tasks.pointcloud.scans.coordinate_fault`.
        with np.errstate(all="ignore"):
            yield
    except UserError:
        raise
    except Exception as error:
        if (fault := system_error(error)) is not None:
            raise UserError(told(fault, path)) from error
        # For damaged files decoders raise all kinds of errors, including out of memory if a header claims too much.
        what = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
        raise UserError(f"{path}: cannot be read, perhaps because it is damaged or cut short ({what})") from error


def stacked(values: Columns, names: tuple[str, ...]) -> NDArray[Any]:
    """Stack columns side by side, shape (N, names)."""
    return np.stack([values[name] for name in names], axis=1)


def table_of(scan: RawScan) -> dict[str, NDArray[Any]]:
    """Return all values of a scan, each of shape (N,), by their names in PLY files."""
    values: dict[str, NDArray[Any]] = {name: scan.points[:, axis].astype("<f8") for axis, name in enumerate("xyz")}
    if "color" in scan.columns:
        color = np.round(scan.columns["color"].clip(0, 1) * 255).astype("u1")
        values |= {name: color[:, axis] for axis, name in enumerate(("red", "green", "blue"))}
    if "normal" in scan.columns:
        normal = scan.columns["normal"].astype("<f4")
        values |= {name: normal[:, axis] for axis, name in enumerate(("nx", "ny", "nz"))}
    values |= {name: scan.columns[name].astype("<f4") for name in SCALARS if name in scan.columns}
    if scan.classes is not None:
        values["label"] = scan.classes.astype("<i4")
    return values


def numbers(path: Path, name: str, values: NDArray[Any]) -> NDArray[Any]:
    """Return the values unchanged; refuse any that are not real numbers."""
    if values.dtype.kind not in "iuf":
        raise UserError(f"{path}: expected {name} of real numbers; got {values.dtype}")
    return values


def class_ids(path: Path, values: NDArray[Any]) -> NDArray[np.int64]:
    """Return class ids; floats with integer values are accepted, because some programs write only floats."""
    values = numbers(path, "labels", values)
    # The largest float64 below 2**63 is an integer, so values that pass cannot overflow.
    unsound = ~(np.isfinite(values) & (values >= -(2.0**63)) & (values < 2.0**63) & (values == np.trunc(values)))
    if unsound.any():
        raise UserError(f"{path}: expected labels of whole numbers of 64 bits; got {values[unsound].flat[0]}")
    return values.astype(np.int64)
