from itertools import pairwise

import numpy as np
import torch

from latentgnn.tasks.pointcloud.neighbors import build_hierarchy, pack


def _points(number, seed=0, size=4.0):
    return (np.random.default_rng(seed).random((number, 3)) * size).astype(np.float32)


def test_neighbors_and_anchors_are_the_nearest_points():
    points = _points(300)
    levels = build_hierarchy(points, grids=(0.8, 2.0), neighbors=7)
    for finer, level in zip((levels[0], *levels), levels, strict=False):
        apart = torch.cdist(level.coordinates.double(), level.coordinates.double())
        nearest = apart.topk(7, largest=False).values
        torch.testing.assert_close(apart.gather(1, level.neighbors).sort().values, nearest)
        assert (level.neighbors[:, 0] == torch.arange(len(level.coordinates))).all()
        torch.testing.assert_close(finer.coordinates[level.kept], level.coordinates)
    for finer, level in pairwise(levels):
        apart = torch.cdist(finer.coordinates.double(), level.coordinates.double())
        nearest = apart.topk(3, largest=False).values
        torch.testing.assert_close(apart.gather(1, level.anchors).sort().values, nearest)


def test_a_level_keeps_one_point_of_each_voxel():
    points = _points(500, seed=1)
    level = build_hierarchy(points, grids=(0.7,), neighbors=4)[1]
    # The levels' grids begin at the lowest corner of the finer level.
    cells = np.floor((points.astype(np.float64) - points.min(axis=0)) / 0.7).astype(int)
    kept = cells[level.kept.numpy()]
    assert len(np.unique(kept, axis=0)) == len(kept) == len(np.unique(cells, axis=0))


def test_where_points_lack_the_nearest_stands_for_them():
    points = np.array([[0, 0, 0], [1, 0, 0], [5, 0, 0]], np.float32)
    fine, coarse = build_hierarchy(points, grids=(100.0,), neighbors=5)
    assert fine.neighbors.tolist() == [[0, 1, 2, 0, 0], [1, 0, 2, 1, 1], [2, 1, 0, 2, 2]]
    assert coarse.neighbors.tolist() == [[0] * 5]
    assert coarse.anchors.tolist() == [[0] * 3] * 3


def test_packed_levels_stay_within_their_crops():
    crops = [build_hierarchy(_points(number, seed=number), grids=(0.8, 2.0), neighbors=6) for number in (50, 3, 120)]
    packed = pack(crops)
    for number, level in enumerate(packed):
        assert level.offsets.tolist() == [0, *np.cumsum([len(crop[number].coordinates) for crop in crops])]
        for place, crop in enumerate(crops):
            own = slice(level.offsets[place], level.offsets[place + 1])
            torch.testing.assert_close(level.coordinates[own], crop[number].coordinates)
            torch.testing.assert_close(level.neighbors[own] - level.offsets[place], crop[number].neighbors)
            if number:
                finer = packed[number - 1]
                torch.testing.assert_close(level.kept[own] - finer.offsets[place], crop[number].kept)
                fine = slice(finer.offsets[place], finer.offsets[place + 1])
                torch.testing.assert_close(level.anchors[fine] - level.offsets[place], crop[number].anchors)
    assert packed[0].kept.tolist() == list(range(173))
