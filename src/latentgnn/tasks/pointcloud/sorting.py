"""Reads a scan of any size chunk by chunk and sorts it into a folder on disk."""

import shutil
from collections.abc import Callable, Iterator, Mapping
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.lib.format import open_memmap
from numpy.typing import NDArray

from latentgnn.errors import UserError, concerning
from latentgnn.files.writing import replacing
from latentgnn.tasks.pointcloud.cells import Cells, SortedPoints, record_kind
from latentgnn.tasks.pointcloud.config import DataConfig
from latentgnn.tasks.pointcloud.features import needed_columns
from latentgnn.tasks.pointcloud.pictures import drawn_points
from latentgnn.tasks.pointcloud.raw import ScanChunks
from latentgnn.tasks.pointcloud.scans import scan_chunks
from latentgnn.tasks.pointcloud.voxels import Bounds

OnPoints = Callable[[str, int, int], None]
"""Called with the current operation, the number of points done, and the total."""

_CELLS, _POINTS, _CLASSES = "cells.npz", "points.bin", "classes.npy"

_Chunk = tuple[NDArray[np.float64], Mapping[str, NDArray[Any]]]


class SortedScan(NamedTuple):
    """A scan sorted into a folder.

    Args:
        path: the scan's own file.
        folder: folder with its points in cell order, and their classes.
        cells: positions of each cell's points.
        kind: dtype of a record (see `latentgnn.tasks.pointcloud.cells.record_kind`).
        drawn: coordinates of the points that a picture shows (see `latentgnn.tasks.pointcloud.pictures.drawn_points`).
        classes: the id of every point in the order of its own file, shape (N,), a memory map.
    """

    path: Path
    folder: Path
    cells: Cells
    kind: np.dtype[Any]
    drawn: NDArray[np.float64]
    classes: NDArray[np.integer[Any]]

    @property
    def points(self) -> SortedPoints:
        """Return the file of the points."""
        return SortedPoints(self.folder / _POINTS, self.cells, self.kind)

    @property
    def disk(self) -> int:
        """Number of bytes in the folder."""
        return self.cells.number * (self.kind.itemsize + self.classes.dtype.itemsize)


def sort_scan(
    path: Path,
    config: DataConfig,
    *,
    edge: float,
    ids: NDArray[np.int64],
    folder: Path,
    chunk: int,
    on_points: OnPoints,
) -> SortedScan:
    """Read a scan twice and sort its points into a folder; or reuse what an earlier call left there.

    Args:
        path: a scan file.
        config: configuration with features, which determine the stored values of a point.
        edge: edge of a cell in metres.
        ids: class ids that points may get, shape (K,).
        folder: new, or as left by an earlier call with the same arguments.
        chunk: number of points that are read at once.
        on_points: called after each chunk.

    Raises:
        UserError: if the scan cannot be read, lacks a feature, or is too large for the disk.
    """
    if not (folder / _CELLS).is_file():
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        _sort(scan_chunks(path, chunk), path, config, edge, ids, folder, on_points)
    with np.load(folder / _CELLS, allow_pickle=False) as kept:
        cells = Cells(edge, Bounds(kept["low"], kept["high"]), kept["keys"], kept["counts"])
        kind, drawn = kept["records"].dtype, kept["drawn"]
    return SortedScan(path, folder, cells, kind, drawn, open_memmap(folder / _CLASSES, mode="r+"))


def _sort(
    chunks: ScanChunks,
    path: Path,
    config: DataConfig,
    edge: float,
    ids: NDArray[np.int64],
    folder: Path,
    on_points: OnPoints,
) -> None:
    cells = Cells.count(_told(chunks, on_points), edge=edge, path=path)
    contents = ((scan.points, needed_columns(path, scan, config)) for scan in chunks.scans())
    first = next(contents)
    kind = record_kind(first[1])
    class_kind = np.dtype(np.int64) if ids.min() < 0 else np.min_scalar_type(int(ids.max()))
    _check_space(path, cells.number * (kind.itemsize + class_kind.itemsize), folder)
    # Written completely: filling a hole in a mapped file on a full disk would kill the process.
    with concerning(folder / _CLASSES), (folder / _CLASSES).open("wb") as file:
        np.lib.format.write_array(file, np.zeros(cells.number, class_kind))
    drawn = drawn_points(cells.number)
    shown: list[NDArray[np.float64]] = []

    def sorting() -> Iterator[_Chunk]:
        done = 0
        for points, columns in chain([first], contents):
            some = drawn[np.searchsorted(drawn, done) : np.searchsorted(drawn, done + len(points))]
            shown.append(points[some - done])
            yield points, columns
            done += len(points)
            on_points("sorting", done, cells.number)

    SortedPoints(folder / _POINTS, cells, kind).write(sorting(), source=path)
    # Written last: if it exists, everything else does.
    with replacing(folder / _CELLS) as target:
        np.savez(
            target,
            low=cells.bounds.low,
            high=cells.bounds.high,
            keys=cells.keys,
            counts=cells.counts,
            records=np.empty(0, kind),
            drawn=np.concatenate(shown),
        )


def _told(chunks: ScanChunks, on_points: OnPoints) -> Iterator[NDArray[np.float64]]:
    done = 0
    for points in chunks.points():
        yield points
        done += len(points)
        on_points("reading", done, chunks.number)


def _check_space(path: Path, needed: int, folder: Path) -> None:
    result, free = path.stat().st_size, shutil.disk_usage(folder).free
    if needed + result > free:
        raise UserError(
            f"{path}: by tiles, it takes {needed / 1e9:.1f} GB of disk until it is done, and its result up to "
            f"{result / 1e9:.1f} GB; {free / 1e9:.1f} GB are free: free some space, or name an --out on another disk"
        )
