"""Subsampling points by voxels and cutting them into overlapping crops."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.spatial import cKDTree

from latentgnn.tasks.pointcloud.config import CropShape

Floats = NDArray[np.float64]
Indices = NDArray[np.int64]


@dataclass(frozen=True, kw_only=True, eq=False)
class Voxels:
    """One point kept in every occupied voxel.

    Args:
        kept: indices of the kept points, ascending, shape (M,).
        voxel_of_point: for each point, index of the kept point in the same voxel, shape (N,).
    """

    kept: Indices
    voxel_of_point: Indices


def voxelize(points: Floats, size: float, rng: np.random.Generator | None = None) -> Voxels:
    """Keep one point in every voxel.

    Args:
        points: metres, shape (N, 3); float64, to keep the precision of map coordinates.
        size: edge of a voxel in metres; 0 keeps all points.
        rng: draws the kept point of each voxel and the origin of the grid; without it, the kept point is the one
            nearest to the voxel's centre (the first of several), and the grid begins at the lowest corner of the
            points.
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
    """Return coordinates in the network's form: x and y from the centre of their range, z from the lowest point.

    The difference is computed in float64: float32 has a resolution of only 6 cm at map coordinates of 10^6 m.
    """
    if len(points) == 0:
        return points.astype(np.float32)
    low, high = points.min(axis=0), points.max(axis=0)
    origin = np.array([(low[0] + high[0]) / 2, (low[1] + high[1]) / 2, low[2]])
    return (points - origin).astype(np.float32)


def crop(points: Floats, centre: Floats, *, shape: CropShape, size: float) -> Indices:
    """Return the ascending indices of the points in the crop around a centre (see `DataConfig.crop`)."""
    if shape == "scan":
        return np.arange(len(points))
    offset = np.abs(points - centre)
    if shape == "column":
        return np.flatnonzero((offset[:, :2] <= size / 2).all(axis=1))
    return np.flatnonzero((offset**2).sum(axis=1) <= (size / 2) ** 2)


class Bounds(NamedTuple):
    """The lowest and highest corners of a scan, metres, shape (3,) each."""

    low: Floats
    high: Floats

    @classmethod
    def of(cls, points: Floats) -> "Bounds":
        """Return the bounds of points of shape (N, 3)."""
        return cls(points.min(axis=0), points.max(axis=0))


class Crop(NamedTuple):
    """A crop of a scan.

    Args:
        number: its index among the scan's crops, which does not depend on the part of the scan that is processed.
        inside: ascending indices of its points.
    """

    number: tuple[int, ...]
    inside: Indices


def crops(points: Floats, *, shape: CropShape, size: float, overlap: float) -> Iterator[Indices]:
    """Yield ascending indices of the points of overlapping crops that cover all points; none is empty."""
    for crop in numbered_crops(points, Bounds.of(points), shape=shape, size=size, overlap=overlap):
        yield crop.inside


def numbered_crops(points: Floats, bounds: Bounds, *, shape: CropShape, size: float, overlap: float) -> Iterator[Crop]:
    """Yield overlapping crops that cover all points; none is empty.

    Given a part of a scan, with the bounds of the whole, they are the scan's crops that contain any of these points, in
    the same order, each with those of its points that are given.

    Columns are on a regular grid that begins and ends with the points, with steps of at most (1 - overlap) * size.
    Spheres are at the centres of the occupied cells of a cubic grid; cells of edge (1 - overlap) * size / sqrt(3) lie
    completely inside their spheres.

    Args:
        points: metres, shape (N, 3), at least one.
        bounds: bounds of the whole scan.
        shape: see `DataConfig.crop`.
        size: diameter or edge in metres.
        overlap: fraction of its edge that a crop shares with the next, from 0 to less than 1.
    """
    step = (1 - overlap) * size
    if shape == "scan":
        yield Crop((), np.arange(len(points)))
    elif shape == "column":
        yield from _columns(points, bounds, size, step)
    else:
        yield from _spheres(points, bounds.low, size, step / np.sqrt(3))


def height_above_ground(points: Floats, radius: float, *, low: Floats | None = None) -> NDArray[np.float32]:
    """Return the height in metres above the lowest point within a horizontal radius, shape (N,).

    Neighbourhoods consist of cells a quarter of the radius wide: a cell counts if its centre is near enough. So points
    farther than five quarters of the radius from a point do not affect its height.

    Args:
        points: metres, shape (N, 3).
        radius: metres.
        low: the lowest corner of the whole scan, shape (3,), if this is a part of one.
    """
    edge = radius / 4
    corner = (points.min(axis=0) if low is None else low)[:2]
    cell = np.floor((points[:, :2] - corner) / edge).astype(np.int64)
    _, index, inverse = np.unique(_keys(cell), return_index=True, return_inverse=True)
    cells, inverse = cell[index], inverse.reshape(-1)
    lowest = np.full(len(cells), np.inf)
    np.minimum.at(lowest, inverse, points[:, 2])
    pairs = cKDTree(cells.astype(np.float64)).query_pairs(4.0, output_type="ndarray")
    ground = lowest.copy()
    np.minimum.at(ground, pairs[:, 0], lowest[pairs[:, 1]])
    np.minimum.at(ground, pairs[:, 1], lowest[pairs[:, 0]])
    return (points[:, 2] - ground[inverse]).astype(np.float32)


# Margin, relative to a crop's size, so that rounding does not leave a point between two crops.
_SLACK = 1e-9


def _columns(points: Floats, bounds: Bounds, size: float, step: float) -> Iterator[Crop]:
    local = points[:, :2] - bounds.low[:2]
    extent = bounds.high - bounds.low
    along_x, along_y = (_starts(local[:, axis], float(extent[axis]), size, step) for axis in range(2))
    for x, strip in _windows(local[:, 0], along_x, size):
        for y, inside in _windows(local[strip, 1], along_y, size):
            yield Crop((x, y), np.sort(strip[inside]))


def _windows(values: Floats, along: tuple[Indices, Floats], size: float) -> Iterator[tuple[int, Indices]]:
    """Numbers of windows, and indices of the values in each window from its start to ``size`` after it, if any."""
    numbers, starts = along
    order = np.argsort(values, kind="stable")
    begins = np.searchsorted(values[order], starts - _SLACK * size, "left")
    ends = np.searchsorted(values[order], starts + (1 + _SLACK) * size, "right")
    for window in np.flatnonzero(ends > begins):
        yield int(numbers[window]), order[begins[window] : ends[window]]


def _starts(values: Floats, extent: float, size: float, step: float) -> tuple[Indices, Floats]:
    """Numbers of crops and their starts along an axis from 0 to ``extent``, where the last one ends.

    Some crops without values are omitted: a distant outlier must not cause millions of them.
    """
    if extent <= size:
        return np.array([0]), np.array([(extent - size) / 2])
    last = int(np.ceil((extent - size) / step))
    step = (extent - size) / last
    occupied = np.unique(np.floor(values / step).astype(np.int64))
    before = np.arange(int(np.ceil(size / step)) + 2)
    numbers = np.unique((occupied[:, None] + 1 - before).clip(0, last))
    starts: Floats = numbers * step
    starts[numbers == last] = extent - size
    return numbers, starts


def _spheres(points: Floats, low: Floats, size: float, edge: float) -> Iterator[Crop]:
    local = points - low
    cells = np.unique(np.floor(local / edge).astype(np.int64), axis=0)
    tree = cKDTree(local)
    for cell in cells:
        inside = tree.query_ball_point((cell + 0.5) * edge, (0.5 + _SLACK) * size, return_sorted=True)
        yield Crop(tuple(cell.tolist()), np.array(inside, np.int64))


def _keys(cell: Indices) -> Indices:
    """One integer per row, equal for equal rows."""
    cell = cell - cell.min(axis=0)
    spans = [int(span) + 1 for span in cell.max(axis=0)]
    key: Indices = cell[:, 0]
    total = spans[0]
    for axis in range(1, cell.shape[1]):
        if total * spans[axis] >= 2**62:
            # A distant outlier makes the grid huge, but there are no more keys than points.
            key = np.unique(key, return_inverse=True)[1].reshape(-1)
            total = len(key)
        key = key * spans[axis] + cell[:, axis]
        total *= spans[axis]
    return key
