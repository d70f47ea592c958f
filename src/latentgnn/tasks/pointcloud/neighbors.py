"""Who is whose neighbour: the levels of a point network, made once for a crop by KD-trees of scipy.

The network itself only indexes, so that it runs on any device; the loading processes prepare this. Axes: T points of
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
"""Coarser points that a point is interpolated from, PointNet++'s three."""


class Level(NamedTuple):
    """The points of one resolution.

    Args:
        coordinates: metres, float32, shape (T, 3).
        offsets: where each crop begins, and T at the end, int64, shape (B + 1,).
        neighbors: the nearest points of the same level and crop, the point itself first, int64, shape (T, K). Where a
            crop has fewer than K points, the nearest stands for the missing ones.
        kept: which points of the finer level these are, int64, shape (T,); at the finest level, of all.
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
    """The levels of one crop.

    Each coarser level keeps one point of every voxel, the one nearest to its middle.

    Args:
        coordinates: metres, shape (N, 3), N at least 1.
        grids: edges in metres of the voxels of the coarser levels, one a level, ascending.
        neighbors: K.
        workers: threads of the search; -1 takes all cores.
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
    """The levels of several crops, one after another."""
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
    # The finest level is kept of itself.
    packed[0] = packed[0]._replace(kept=torch.arange(len(packed[0].coordinates)))
    return tuple(packed)


def _nearest(tree: cKDTree, points: NDArray[np.float64], number: int, workers: int) -> NDArray[np.int64]:
    """Indices of the nearest points of a tree, nearest first, shape (N, number)."""
    index: NDArray[np.int64] = tree.query(points, k=np.arange(1, number + 1), workers=workers)[1].astype(np.int64)
    # scipy marks what a small tree lacks by an index behind its last.
    return np.where(index == tree.n, index[:, :1], index)
