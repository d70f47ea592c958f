"""Neighbours at every level of a point network, found once per crop with scipy's KD-trees.

The loading processes do this, so that the network itself only uses indices and runs on any device. Axes: T points of
all crops of a batch at a level, B crops, K neighbours.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.spatial import cKDTree
from torch import Tensor

from latentgnn.tasks.pointcloud.voxels import voxelize

_ANCHORS = 3
"""Number of coarser points that a point is interpolated from, PointNet++'s three."""


class Level(NamedTuple):
    """The points of one resolution.

    Args:
        coordinates: metres, float32, shape (T, 3).
        offsets: start of each crop, and T at the end, int64, shape (B + 1,).
        neighbors: the nearest points of the same level and crop, the point itself first, int64, shape (T, K). If a crop
            has fewer than K points, missing ones are filled with the nearest.
        kept: indices of these points in the finer level, int64, shape (T,); at the finest level, all indices.
        anchors: for each point of the finer level the nearest points of this one, int64, shape (T_finer, 3); at the
            finest level, the points themselves.
    """

    coordinates: Tensor
    offsets: Tensor
    neighbors: Tensor
    kept: Tensor
    anchors: Tensor


Hierarchy = tuple[Level, ...]
"""Levels from the finest to the coarsest."""


def build_hierarchy(
    coordinates: NDArray[np.float32], *, grids: Sequence[float], neighbors: int, workers: int = 1
) -> Hierarchy:
    """Return the levels of one crop.

    Each coarser level keeps one point in every voxel, the one nearest to its centre.

    Args:
        coordinates: metres, shape (N, 3), N at least 1.
        grids: edges in metres of the voxels of the coarser levels, one per level, ascending.
        neighbors: K.
        workers: number of search threads; -1 uses all cores.
    """
    points = coordinates.astype(np.float64)
    kept = np.arange(len(points))
    tree = cKDTree(points)
    anchors = np.repeat(kept[:, None], _ANCHORS, axis=1)
    levels = []
    for grid in (None, *grids):
        if grid is not None:
            finer = points
            kept = voxelize(finer, grid).kept
            points = finer[kept]
            tree = cKDTree(points)
            anchors = _nearest(tree, finer, _ANCHORS, workers)
        levels.append(
            Level(
                coordinates=torch.from_numpy(points.astype(np.float32)),
                offsets=torch.tensor([0, len(points)]),
                neighbors=torch.from_numpy(_nearest(tree, points, neighbors, workers)),
                kept=torch.from_numpy(kept),
                anchors=torch.from_numpy(anchors),
            )
        )
    return tuple(levels)


def pack(hierarchies: Sequence[Hierarchy]) -> Hierarchy:
    """Concatenate the levels of several crops."""
    packed = []
    before = [0] * len(hierarchies)
    for parts in zip(*hierarchies, strict=True):
        sizes = [len(part.coordinates) for part in parts]
        starts = [0, *np.cumsum(sizes).tolist()]
        packed.append(
            Level(
                coordinates=torch.cat([part.coordinates for part in parts]),
                offsets=torch.tensor(starts),
                neighbors=torch.cat([part.neighbors + start for part, start in zip(parts, starts, strict=False)]),
                kept=torch.cat([part.kept + start for part, start in zip(parts, before, strict=False)]),
                anchors=torch.cat([part.anchors + start for part, start in zip(parts, starts, strict=False)]),
            )
        )
        before = starts
    # The finest level has no finer one: it keeps all of its own points.
    packed[0] = packed[0]._replace(kept=torch.arange(len(packed[0].coordinates)))
    return tuple(packed)


def _nearest(tree: cKDTree, points: NDArray[np.float64], number: int, workers: int) -> NDArray[np.int64]:
    """Indices of the nearest points in a tree, nearest first, shape (N, number)."""
    index: NDArray[np.int64] = tree.query(points, k=np.arange(1, number + 1), workers=workers)[1].astype(np.int64)
    # scipy returns an index after the last one if a tree has too few points.
    return np.where(index == tree.n, index[:, :1], index)
