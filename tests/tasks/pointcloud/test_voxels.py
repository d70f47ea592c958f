import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from latentgnn.tasks.pointcloud.voxels import crop, crops, height_above_ground, recentre, voxelize

FAR = np.array([770_600.0, 6_277_500.0, 20.0])


def _points(number=400, seed=0, size=(10, 6, 3)):
    return np.random.default_rng(seed).random((number, 3)) * size


def _by_hand(points, size):
    """The points of every voxel, by a dictionary."""
    low = points.min(axis=0)
    voxels = {}
    for index, point in enumerate(points):
        voxels.setdefault(tuple(int(x) for x in (point - low) // size), []).append(index)
    return voxels


def test_one_point_of_every_voxel():
    points = _points()
    voxels = voxelize(points, 0.9)
    expected = _by_hand(points, 0.9)
    assert len(voxels.kept) == len(expected) < 400
    assert (np.diff(voxels.kept) > 0).all()
    for cell, members in expected.items():
        middle = points.min(axis=0) + (np.array(cell) + 0.5) * 0.9
        chosen = members[int(np.linalg.norm(points[members] - middle, axis=1).argmin())]
        assert {int(voxels.kept[voxel]) for voxel in voxels.voxel_of_point[members]} == {chosen}


@settings(deadline=None, max_examples=50)
@given(
    seed=st.integers(0, 1000),
    number=st.integers(1, 60),
    size=st.sampled_from([0.0, 0.01, 0.5, 100.0]),
    drawn=st.booleans(),
)
def test_every_point_shares_its_voxel_with_the_kept_one(seed, number, size, drawn):
    points = _points(number, seed)
    voxels = voxelize(points, size, np.random.default_rng(seed) if drawn else None)
    assert voxels.voxel_of_point.shape == (number,)
    # Kept points stand for themselves, so that the map is onto them.
    np.testing.assert_array_equal(voxels.voxel_of_point[voxels.kept], np.arange(len(voxels.kept)))
    distance = np.abs(points - points[voxels.kept][voxels.voxel_of_point]).max(axis=1)
    assert (distance <= size).all()


def test_drawn_points_change_and_repeat():
    points = _points()
    a, b, c = (voxelize(points, 1.0, np.random.default_rng(seed)).kept for seed in (1, 1, 2))
    np.testing.assert_array_equal(a, b)
    assert not np.array_equal(a, c)
    # Of one voxel's points each has its chance.
    counts = np.zeros(4)
    for seed in range(400):
        counts[voxelize(np.zeros((4, 3)), 1.0, np.random.default_rng(seed)).kept] += 1
    assert counts.sum() == 400
    assert counts.min() > 70


def test_a_far_outlier_among_fine_voxels():
    # A grid of 2 mm over 10^6 m has more cells than 64 bits can count.
    points = np.concatenate([_points(), [[1e6, 1e6, 1e6], [-1e6, 0, 1e6]]])
    near = voxelize(points[:400], 0.002)
    far = voxelize(points, 0.002)
    assert len(near.kept) == 400
    assert len(far.kept) == 402
    twice = voxelize(np.repeat(points, 2, axis=0), 0.002)
    np.testing.assert_array_equal(twice.kept, np.arange(0, 804, 2))


def test_no_points():
    voxels = voxelize(np.zeros((0, 3)), 0.1)
    assert voxels.kept.shape == voxels.voxel_of_point.shape == (0,)


def test_map_coordinates_lose_nothing():
    points = np.round(_points(), 3)
    there = points + FAR
    assert np.abs(there.astype(np.float32).astype(np.float64) - there).max() > 0.1
    np.testing.assert_allclose(recentre(there), recentre(points), atol=2e-6)
    low, high = points.min(axis=0), points.max(axis=0)
    middle = [(low[0] + high[0]) / 2, (low[1] + high[1]) / 2, low[2]]
    np.testing.assert_allclose(recentre(points), points - middle, atol=1e-6)
    assert recentre(there).dtype == np.float32
    # Voxel walls lie between the points' millimetres, so that rounding cannot move a point over one.
    np.testing.assert_array_equal(voxelize(there, 0.90037).voxel_of_point, voxelize(points, 0.90037).voxel_of_point)


def test_crops():
    points = _points()
    centre = np.array([5.0, 3.0, 1.0])
    np.testing.assert_array_equal(crop(points, centre, shape="scan", size=1), np.arange(400))
    inside = crop(points, centre, shape="sphere", size=2)
    np.testing.assert_array_equal(inside, [i for i, p in enumerate(points) if np.linalg.norm(p - centre) <= 1])
    inside = crop(points, centre, shape="column", size=2)
    expected = [i for i, p in enumerate(points) if 4 <= p[0] <= 6 and 2 <= p[1] <= 4]
    np.testing.assert_array_equal(inside, expected)
    assert len(expected) > 5


@settings(deadline=None, max_examples=40)
@given(
    seed=st.integers(0, 1000),
    number=st.integers(1, 80),
    shape=st.sampled_from(["sphere", "column", "scan"]),
    size=st.sampled_from([1.5, 4.0, 50.0]),
    overlap=st.sampled_from([0.0, 0.25, 0.5]),
)
def test_crops_hold_every_point(seed, number, shape, size, overlap):
    points = _points(number, seed) + FAR
    crops_of_scan = list(crops(points, shape=shape, size=size, overlap=overlap))
    assert all(len(inside) for inside in crops_of_scan)
    assert all((np.diff(inside) > 0).all() for inside in crops_of_scan)
    np.testing.assert_array_equal(np.unique(np.concatenate(crops_of_scan)), np.arange(number))
    for inside in crops_of_scan:
        extent = np.ptp(points[inside], axis=0)
        if shape == "column":
            assert (extent[:2] <= size + 1e-6).all()
        if shape == "sphere":
            assert np.linalg.norm(extent) <= size * np.sqrt(3) + 1e-6
            assert (extent <= size + 1e-6).all()


def test_columns_overlap_as_asked():
    grid = np.array([[x, y, z] for x, y, z in itertools.product(range(21), range(11), (0, 5))], float)
    crops_of_scan = list(crops(grid, shape="column", size=10, overlap=0.5))
    corners = [tuple(grid[inside].min(axis=0)[:2]) for inside in crops_of_scan]
    assert sorted(corners) == [(0, 0), (5, 0), (10, 0)]
    assert all(np.ptp(grid[inside][:, 2]) == 5 for inside in crops_of_scan)
    votes = np.bincount(np.concatenate(crops_of_scan))
    by_x = [set(votes[grid[:, 0] == x].tolist()) for x in range(21)]
    # Seen once within 5 m of either end, twice in between, three times where crops meet.
    assert by_x == [{1}] * 5 + [{2}] * 5 + [{3}] + [{2}] * 5 + [{1}] * 5
    assert len(list(crops(grid, shape="column", size=10, overlap=0))) == 2


def test_a_far_outlier_makes_no_empty_crops():
    points = np.concatenate([_points(), [[2e5, -1e5, 0]]])
    for shape in ("column", "sphere"):
        crops_of_scan = list(crops(points, shape=shape, size=4, overlap=0.5))
        assert len(crops_of_scan) < 200
        assert np.unique(np.concatenate(crops_of_scan)).size == 401


def test_spheres_overlap_more_with_more_overlap():
    points = _points(2000, size=(10, 10, 10))
    votes = [sum(len(inside) for inside in crops(points, shape="sphere", size=5, overlap=o)) / 2000 for o in (0, 0.5)]
    # Balls about the cells of a cubic grid hold pi / 6 * 3^1.5 = 2.7 cells' volumes, less at the outside.
    assert 1.5 < votes[0] < 2.7
    assert votes[1] > 5 * votes[0]


def test_height_above_ground():
    # Ground that rises by one in ten, and a wall of 4 m on it.
    x, y = (axis.ravel() for axis in np.meshgrid(np.arange(0, 60, 0.5), np.arange(0, 20, 0.5)))
    ground = np.stack([x, y, x / 10], axis=1)
    wall = ground[np.abs(x - 30) < 1] + [0, 0, 4]
    points = np.concatenate([ground, wall]) + FAR
    height = height_above_ground(points, 8.0)
    for index in range(0, len(points), 97):
        distance = np.linalg.norm(points[:, :2] - points[index, :2], axis=1)
        least, most = (points[index, 2] - points[distance <= reach, 2].min() for reach in (8 - 3.1, 8 + 3.1))
        # Cells of 2 m: what is counted lies within 8 m and a cell's diagonal.
        assert least - 1e-4 <= height[index] <= most + 1e-4
    assert height.dtype == np.float32
    with pytest.raises(AssertionError):
        np.testing.assert_allclose(height, height_above_ground(points, 1.0), atol=0.1)


def test_columns_around_a_far_outlier_are_few():
    points = np.concatenate([np.random.default_rng(0).random((200, 3)) * 4, [[1e8, 1e8, 0.0]]])
    inside = list(crops(points, shape="column", size=1.0, overlap=0.9))
    assert sorted(set(np.concatenate(inside).tolist())) == list(range(201))
    assert all((np.ptp(points[indices, :2], axis=0) <= 1 + 1e-6).all() for indices in inside)
