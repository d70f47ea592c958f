"""What scan files of every format hold: points, further values of each, classes.

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
"""The columns of shape (N,); ``color`` and ``normal`` have three values a point."""

Columns = Mapping[str, NDArray[Any]]


@dataclass(frozen=True, kw_only=True, eq=False)
class RawScan:
    """What a file holds.

    Args:
        points: metres, float64, shape (N, 3).
        columns: further values of each point by name: ``intensity``, ``return_number``, ``number_of_returns`` of shape
            (N,); ``color`` in 0..1 and ``normal`` of shape (N, 3).
        classes: class ids as in the file, int64, shape (N,); ``None`` where it has none.
    """

    points: NDArray[np.float64]
    columns: Columns = field(default_factory=dict)
    classes: NDArray[np.int64] | None = None


class ScanChunks(Protocol):
    """A scan that is read chunk by chunk, in the order of its file.

    Attributes:
        number: of points.
    """

    number: int

    def points(self) -> Iterator[NDArray[np.float64]]:
        """The coordinates, metres, shape (n, 3) each."""

    def scans(self) -> Iterator[RawScan]:
        """The chunks with all that they hold; `points` must have come to its end before."""


@contextmanager
def readable(path: Path) -> Iterator[None]:
    """Reading of a file: what its decoder meets becomes an error of the user's, with the path.

    Raises:
        UserError: it is damaged or cut short, or the system could not read it.
    """
    try:
        # What overflows is told by `latentgnn.tasks.pointcloud.scans.coordinate_fault`.
        with np.errstate(all="ignore"):
            yield
    except UserError:
        raise
    except Exception as error:
        if (fault := system_error(error)) is not None:
            raise UserError(told(fault, path)) from error
        # Damage makes decoders raise errors of every kind, of memory too where a header announces too much.
        what = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
        raise UserError(f"{path}: cannot be read, perhaps because it is damaged or cut short ({what})") from error


def stacked(values: Columns, names: tuple[str, ...]) -> NDArray[Any]:
    """Columns side by side, shape (N, names)."""
    return np.stack([values[name] for name in names], axis=1)


def table_of(scan: RawScan) -> dict[str, NDArray[Any]]:
    """All values of a scan, each of shape (N,), by the names that PLY files have for them."""
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
    """The values, which must be real numbers."""
    if values.dtype.kind not in "iuf":
        raise UserError(f"{path}: expected {name} of real numbers; got {values.dtype}")
    return values


def class_ids(path: Path, values: NDArray[Any]) -> NDArray[np.int64]:
    """Class ids; floats that hold whole numbers are taken, for some programs write no others."""
    values = numbers(path, "labels", values)
    # The largest float64 below 2**63 is an integer, so that nothing that passes overflows.
    unsound = ~(np.isfinite(values) & (values >= -(2.0**63)) & (values < 2.0**63) & (values == np.trunc(values)))
    if unsound.any():
        raise UserError(f"{path}: expected labels of whole numbers of 64 bits; got {values[unsound].flat[0]}")
    return values.astype(np.int64)
