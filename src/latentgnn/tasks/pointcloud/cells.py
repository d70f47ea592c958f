"""The points of a scan sorted into square cells in a file on disk, from which any rectangle is read quickly.

A scan's file has points in an arbitrary order, and can only be read from its beginning. So points are counted first,
and then written to their place. Axes: N points of the scan, n of a part of it, C cells that contain points.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from latentgnn.errors import UserError, concerning
from latentgnn.tasks.pointcloud.scans import coordinate_fault
from latentgnn.tasks.pointcloud.voxels import Bounds

# A cell's key is column * _ROWS + row, with rows offset by half of it; this suffices for points within 10^8 m.
_ROWS = 2**32


@dataclass(frozen=True, eq=False)
class Cells:
    """The positions of a scan's points, cell by cell.

    Args:
        edge: edge of a cell in metres.
        bounds: bounds of all points.
        keys: keys of the cells that contain points, ascending, by x and then by y, int64, shape (C,).
        counts: number of points in each, int64, shape (C,).
    """

    edge: float
    bounds: Bounds
    keys: NDArray[np.int64]
    counts: NDArray[np.int64]

    @classmethod
    def count(cls, chunks: Iterable[NDArray[np.float64]], *, edge: float, path: Path) -> "Cells":
        """Count the points in each cell in one pass.

        Args:
            chunks: the points' coordinates, shape (n, 3) each.
            edge: edge of a cell in metres, at least 0.1.
            path: path of the scan, for errors.

        Raises:
            UserError: if there are no points, or some are not finite or too far away.
        """
        keys, counts = np.empty(0, np.int64), np.empty(0, np.int64)
        corners: list[NDArray[np.float64]] = []
        for points in chunks:
            if (fault := coordinate_fault(points)) is not None:
                raise UserError(f"{path}: {fault}")
            found, number = np.unique(_keys_of(points, edge), return_counts=True)
            keys, place = np.unique(np.concatenate((keys, found)), return_inverse=True)
            counts = np.bincount(place, np.concatenate((counts, number)), len(keys)).astype(np.int64)
            corners = list(Bounds.of(np.stack([*corners, *Bounds.of(points)])))
        if not corners:
            raise UserError(f"{path}: {coordinate_fault(np.empty((0, 3)))}")
        return cls(edge, Bounds(*corners), keys, counts)

    @property
    def number(self) -> int:
        """The number of points N."""
        return int(self._ends[-1])

    @cached_property
    def _ends(self) -> NDArray[np.int64]:
        """The number of points before each cell, and N."""
        return np.concatenate(([0], np.cumsum(self.counts)))

    @cached_property
    def _columns(self) -> NDArray[np.int64]:
        """The columns that contain points, ascending."""
        return np.unique(self.keys // _ROWS)

    def squares(self, side: int) -> list[tuple[int, int]]:
        """Return column and row of all squares of ``side`` by ``side`` cells that contain points."""
        columns, rows = np.divmod(self.keys, _ROWS)
        found = np.unique(np.stack((columns // side, (rows - _ROWS // 2) // side), axis=1), axis=0)
        return [(int(column), int(row)) for column, row in found]

    def runs(self, square: tuple[int, int], *, side: int, margin: int) -> list["Run"]:
        """Return the ranges, in cell order, of the points of a square and of a margin of cells around it."""
        first, last = square[1] * side, (square[1] + 1) * side
        rows = np.array([first - margin, first, last, last + margin], np.int64).clip(-_ROWS // 2, _ROWS // 2 - 1)
        near = np.array([square[0] * side - margin, (square[0] + 1) * side + margin])
        runs = []
        for column in self._columns[slice(*np.searchsorted(self._columns, near))].tolist():
            begin, inner, outer, end = self._ends[np.searchsorted(self.keys, _keys(column, rows))].tolist()
            if not square[0] * side <= column < (square[0] + 1) * side:
                inner = outer = begin
            if end > begin:
                runs.append(Run(begin, inner, outer, end))
        return runs


class Run(NamedTuple):
    """A range of points in cell order: from ``begin`` to ``end``, of which those from ``inner`` to ``outer`` are in
    the square itself."""

    begin: int
    inner: int
    outer: int
    end: int


class SortedPoints:
    """The file with a scan's points in cell order.

    Args:
        path: path of the file.
        cells: cells of the scan.
        kind: dtype of a record, see `record_kind`.
    """

    def __init__(self, path: Path, cells: Cells, kind: np.dtype[Any]) -> None:
        self._path = path
        self._cells = cells
        self._kind = kind

    def write(self, chunks: Iterable[tuple[NDArray[np.float64], Mapping[str, NDArray[Any]]]], *, source: Path) -> None:
        """Write all points to their places.

        Args:
            chunks: coordinates (n, 3) and columns, in the order in which the points were counted.
            source: the scan's file, for errors.

        Raises:
            UserError: if the points differ from those that were counted.
        """
        ends = np.cumsum(self._cells.counts)
        places = ends - self._cells.counts
        index = 0
        with concerning(self._path), self._path.open("wb") as file:
            for points, columns in chunks:
                records = np.empty(len(points), self._kind)
                records["index"] = np.arange(index, index + len(points))
                records["point"] = points
                for name, values in columns.items():
                    records[name] = values
                index += len(points)
                keys = _keys_of(points, self._cells.edge)
                order = np.argsort(keys, kind="stable")
                records = records[order]
                found, first, number = np.unique(keys[order], return_index=True, return_counts=True)
                cell = np.searchsorted(self._cells.keys, found)
                known = cell < len(self._cells.keys)
                known[known] = self._cells.keys[cell[known]] == found[known]
                if not known.all() or (places[cell] + number > ends[cell]).any():
                    raise UserError(f"{source}: it has changed while it was read: start again")
                content = records.view(np.uint8).data
                size = self._kind.itemsize
                for place, begin, length in zip(places[cell].tolist(), first.tolist(), number.tolist(), strict=True):
                    file.seek(place * size)
                    file.write(content[begin * size : (begin + length) * size])
                places[cell] += number
        if index != self._cells.number:
            raise UserError(f"{source}: it has changed while it was read: start again")

    def read(self, runs: Iterable[Run]) -> tuple[NDArray[Any], NDArray[np.bool_]]:
        """Return the records of some runs in the order of the scan's file, and a mask of those in the square itself."""
        parts, wanted = [], []
        with concerning(self._path), self._path.open("rb", buffering=0) as file:
            for run in runs:
                file.seek(run.begin * self._kind.itemsize)
                parts.append(np.fromfile(file, self._kind, run.end - run.begin))
                inside = np.zeros(run.end - run.begin, bool)
                inside[run.inner - run.begin : run.outer - run.begin] = True
                wanted.append(inside)
        records = np.concatenate(parts)
        order = np.argsort(records["index"])
        return records[order], np.concatenate(wanted)[order]


def record_kind(columns: Mapping[str, NDArray[Any]]) -> np.dtype[Any]:
    """Return the dtype of a point in the file: its index in the scan's own file, its coordinates and its columns."""
    further = [(name, values.dtype, values.shape[1:]) for name, values in columns.items()]
    return np.dtype([("index", np.int64), ("point", np.float64, (3,)), *further])


def _keys_of(points: NDArray[np.float64], edge: float) -> NDArray[np.int64]:
    cells = np.floor(points[:, :2] / edge).astype(np.int64)
    return _keys(cells[:, 0], cells[:, 1])


def _keys(columns: Any, rows: NDArray[np.int64]) -> NDArray[np.int64]:
    keys: NDArray[np.int64] = columns * _ROWS + rows + _ROWS // 2
    return keys
