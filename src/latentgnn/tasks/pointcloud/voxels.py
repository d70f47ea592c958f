"""Points thinned out by voxels and cut into overlapping crops."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.spatial import cKDTree

from latentgnn.tasks.pointcloud.config import CropShape

Floats = NDArray[np.float64]
Indices = NDArray[np.int64]


@dataclass(frozen=True, kw_only=True, eq=False)
class Voxels:
    """One point kept of every occupied voxel.

    Args:
        kept: indices of the kept points, ascending, shape (M,).
        voxel_of_point: for each of all points, which of the kept ones shares its voxel, shape (N,).
    """

    kept: Indices
    voxel_of_point: Indices


def voxelize(points: Floats, size: float, rng: np.random.Generator | None = None) -> Voxels:
    """Keep one point of every voxel.

    Args:
        points: metres, shape (N, 3); float64, so that map coordinates lose nothing.
        size: edge of a voxel in metres; 0 keeps all points.
        rng: draws the kept point of a voxel and where the grid begins; without it the kept point is the one nearest to
            the voxel's middle (of several, the first), and the grid begins at the lowest corner of the points.
    """
    if size == 0 or len(points) == 0:
        indices = np.arange(len(points))
        return Voxels(kept=indices, voxel_of_point=indices)
    corner = points.min(axis=0)
    if rng is not None:
        corner = corner - rng.random(3) * size
    place = (points - corner) / size
    cell = np.floor(place).astype(np.int64)
    if rng is None:
        rank = ((place - cell - 0.5) ** 2).sum(axis=1)
    else:
        rank = rng.random(len(points))
    key = _keys(cell)
    # The first of each run of equal keys has the lowest rank.
    order = np.lexsort((rank, key))
    is_first = np.ones(len(order), bool)
    is_first[1:] = key[order][1:] != key[order][:-1]
    first = order[is_first]
    kept = np.sort(first)
    position = np.searchsorted(kept, first)
    voxel_of_point = np.empty(len(points), np.int64)
    voxel_of_point[order] = position[np.cumsum(is_first) - 1]
    return Voxels(kept=kept, voxel_of_point=voxel_of_point)


def recentre(points: Floats) -> NDArray[np.float32]:
    """Coordinates as the network takes them: x and y from the middle of their range, z from the lowest point.

    The difference is taken in float64: of a map coordinate of 10^6 m, float32 knows only 6 cm.
    """
    if len(points) == 0:
        return points.astype(np.float32)
    low, high = points.min(axis=0), points.max(axis=0)
    origin = np.array([(low[0] + high[0]) / 2, (low[1] + high[1]) / 2, low[2]])
    return (points - origin).astype(np.float32)


def crop(points: Floats, centre: Floats, *, shape: CropShape, size: float) -> Indices:
    """Indices, ascending, of the points in the crop around a centre (see `DataConfig.crop`)."""
    if shape == "scan":
        return np.arange(len(points))
    offset = np.abs(points - centre)
    if shape == "column":
        return np.flatnonzero((offset[:, :2] <= size / 2).all(axis=1))
    return np.flatnonzero((offset**2).sum(axis=1) <= (size / 2) ** 2)


def crops(points: Floats, *, shape: CropShape, size: float, overlap: float) -> Iterator[Indices]:
    """Indices, ascending, of the points of overlapping crops that together hold every point; none is empty.

    Columns stand on a regular grid that begins and ends with the points, with steps of at most (1 - overlap) * size.
    Spheres stand on the middles of the occupied cells of a cubic grid; cells of edge (1 - overlap) * size / sqrt(3) lie
    wholly inside their spheres.

    Args:
        points: metres, shape (N, 3).
        shape: see `DataConfig.crop`.
        size: diameter or edge in metres.
        overlap: part of its edge that a crop shares with the next, from 0 to less than 1.
    """
    step = (1 - overlap) * size
    if shape == "scan":
        yield np.arange(len(points))
    elif shape == "column":
        yield from _columns(points, size, step)
    else:
        yield from _spheres(points, size, step / np.sqrt(3))


def height_above_ground(points: Floats, radius: float) -> NDArray[np.float32]:
    """Metres above the lowest point within a horizontal radius, shape (N,).

    Neighbourhoods are those of cells a quarter of the radius wide: a cell counts where its middle is near enough.
    """
    edge = radius / 4
    cell = np.floor((points[:, :2] - points[:, :2].min(axis=0)) / edge).astype(np.int64)
    cells, inverse = np.unique(cell, axis=0, return_inverse=True)
    inverse = inverse.reshape(-1)
    lowest = np.full(len(cells), np.inf)
    np.minimum.at(lowest, inverse, points[:, 2])
    pairs = cKDTree(cells.astype(np.float64)).query_pairs(4.0, output_type="ndarray")
    ground = lowest.copy()
    np.minimum.at(ground, pairs[:, 0], lowest[pairs[:, 1]])
    np.minimum.at(ground, pairs[:, 1], lowest[pairs[:, 0]])
    return (points[:, 2] - ground[inverse]).astype(np.float32)


# Rounding must not leave a point between two crops, as a part of a crop's size.
_SLACK = 1e-9


def _columns(points: Floats, size: float, step: float) -> Iterator[Indices]:
    local = points[:, :2] - points[:, :2].min(axis=0)
    starts_x, starts_y = (_starts(local[:, axis], size, step) for axis in range(2))
    for strip in _windows(local[:, 0], starts_x, size):
        for inside in _windows(local[strip, 1], starts_y, size):
            yield np.sort(strip[inside])


def _windows(values: Floats, starts: Floats, size: float) -> Iterator[Indices]:
    """Indices of the values from each start to ``size`` after it, where there are any."""
    order = np.argsort(values, kind="stable")
    begins = np.searchsorted(values[order], starts - _SLACK * size, "left")
    ends = np.searchsorted(values[order], starts + (1 + _SLACK) * size, "right")
    for window in np.flatnonzero(ends > begins):
        yield order[begins[window] : ends[window]]


def _starts(values: Floats, size: float, step: float) -> Floats:
    """Where crops begin along an axis that starts at 0, so that the first begins there and the last ends with it.

    Of crops that hold none of the values some are left out: a far outlier must not make millions of them.
    """
    extent = float(values.max())
    if extent <= size:
        return np.array([(extent - size) / 2])
    last = int(np.ceil((extent - size) / step))
    step = (extent - size) / last
    occupied = np.unique(np.floor(values / step).astype(np.int64))
    before = np.arange(int(np.ceil(size / step)) + 2)
    numbers = np.unique((occupied[:, None] + 1 - before).clip(0, last))
    starts: Floats = numbers * step
    starts[numbers == last] = extent - size
    return starts


def _spheres(points: Floats, size: float, edge: float) -> Iterator[Indices]:
    local = points - points.min(axis=0)
    cells = np.unique(np.floor(local / edge).astype(np.int64), axis=0)
    tree = cKDTree(local)
    for cell in cells:
        inside = tree.query_ball_point((cell + 0.5) * edge, (0.5 + _SLACK) * size, return_sorted=True)
        yield np.array(inside, np.int64)


def _keys(cell: Indices) -> Indices:
    """One integer for each row, equal where rows are equal."""
    cell = cell - cell.min(axis=0)
    spans = [int(span) + 1 for span in cell.max(axis=0)]
    key: Indices = cell[:, 0]
    total = spans[0]
    for axis in (1, 2):
        if total * spans[axis] >= 2**62:
            # A far outlier makes the grid huge, but no more keys are in use than there are points.
            key = np.unique(key, return_inverse=True)[1].reshape(-1)
            total = len(key)
        key = key * spans[axis] + cell[:, axis]
        total *= spans[axis]
    return key
