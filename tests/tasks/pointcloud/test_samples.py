import numpy as np
import pytest
import torch

from latentgnn.tasks.class_losses import class_weights
from latentgnn.tasks.pointcloud.config import AugmentConfig, DataConfig
from latentgnn.tasks.pointcloud.datasets import ScanSet
from latentgnn.tasks.pointcloud.samples import Sample, TrainingCrops, collate
from latentgnn.tasks.pointcloud.scans import RawScan, write_scan

FAR = np.array([770_600.0, 6_277_500.0, 20.0])
STILL = AugmentConfig(rotate=False, flip=0.0, scale=None)


def _config(**changes):
    settings = {"voxel": 0.0, "crop": "column", "crop_size": 4.0, "augment": STILL}
    return DataConfig(
        classes={1: "ground", 2: "rare"}, ignored=(0,), features=("intensity",), **{**settings, **changes}
    )


@pytest.fixture
def scans(tmp_path):
    """Two scans whose points' intensities are their own numbers; one point in 500 is of the rare class."""

    def make(config, number=3000):
        paths = []
        for name in ("a", "b"):
            rng = np.random.default_rng(ord(name))
            classes = np.ones(number, int)
            classes[:6] = 2
            classes[6:300] = 0
            raw = RawScan(
                points=rng.random((number, 3)) * [20, 20, 2] + FAR,
                columns={"intensity": np.arange(number)},
                classes=classes,
            )
            paths.append(tmp_path / f"{name}.npz")
            write_scan(paths[-1], raw)
        return ScanSet.of_files(paths, config)

    return make


def test_a_crop_is_a_part_of_its_scan(scans):
    config = _config()
    scan_set = scans(config)
    sample = TrainingCrops(scan_set, config, seed=0)[2, 1]
    assert sample.name == "b"
    scan = scan_set.scan(1)
    members = sample.features[:, 0].long().numpy()
    np.testing.assert_array_equal(sample.labels, scan.labels[members])
    points = scan.points[members]
    origin = [*((points.min(axis=0) + points.max(axis=0)) / 2)[:2], points[:, 2].min()]
    np.testing.assert_allclose(sample.coordinates, points - origin, atol=1e-6)
    # All of the scan that stands in the square of 4 m, and nothing else: 3000 points on 20 x 20 m.
    low, high = points[:, :2].min(axis=0), points[:, :2].max(axis=0)
    assert (high - low <= 4).all()
    inside = ((scan.points[:, :2] >= low) & (scan.points[:, :2] <= high)).all(axis=1)
    np.testing.assert_array_equal(np.flatnonzero(inside), members)
    assert [tensor.dtype for tensor in sample[1:]] == [torch.float32, torch.float32, torch.int64]


@pytest.mark.parametrize("crop", ["sphere", "column", "scan"])
def test_content_depends_on_seed_epoch_and_index_alone(scans, crop):
    config = _config(crop=crop, voxel=0.5, crops_per_scan=2, augment=AugmentConfig(jitter=0.01, drop=0.2))
    crops = TrainingCrops(scans(config), config, seed=1)
    assert len(crops) == 4
    first = {key: crops[key] for key in [(0, 0), (0, 2), (1, 0), (0, 1)]}
    torch.manual_seed(5)
    np.random.seed(5)
    fresh = TrainingCrops(scans(config), config, seed=1)
    for key in [(0, 1), (1, 0), (0, 2), (0, 0)]:
        again = fresh[key]
        assert again.name == first[key].name
        for value, expected in zip(again[1:], first[key][1:], strict=True):
            assert torch.equal(value, expected)
    other = TrainingCrops(scans(config), config, seed=2)[0, 0]
    samples = [*first.values(), other]
    contents = {tuple(sample.features[:, 0].tolist()) for sample in samples}
    assert len(contents) == len(samples)
    assert {crops.group_of(index) for index in range(4)} == {0}


def test_voxels_thin_out(scans):
    config = _config(voxel=1.0, crop="scan")
    scan_set = scans(config)
    sample = TrainingCrops(scan_set, config, seed=0)[0, 0]
    # 20 x 20 x 2 voxels and one more row on every side, where the grid's random start cuts them.
    assert 600 < len(sample.labels) <= 21 * 21 * 3


def test_the_largest_crop(scans):
    config = _config(crop="scan", max_points=100)
    scan_set = scans(config)
    for index in (0, 1):
        sample = TrainingCrops(scan_set, config, seed=0)[0, index]
        members = sample.features[:, 0].long().numpy()
        assert len(members) == 100
        # Nearest to some labelled point, seen from above.
        xy = scan_set.scan(index).points[:, :2]
        nearest_sets = (np.sort(np.argsort(((xy - xy[i]) ** 2).sum(axis=1))[:100]) for i in range(6, 3000))
        nearest_sets = [*nearest_sets] + [np.sort(np.argsort(((xy - xy[i]) ** 2).sum(axis=1))[:100]) for i in range(6)]
        assert any(np.array_equal(np.sort(members), near) for near in nearest_sets)


def test_balance_shows_the_rare_class(scans):
    seen = {}
    for balance in (0.0, 1.0):
        config = _config(balance=balance, crop="sphere", crop_size=0.5, crops_per_scan=100)
        crops = TrainingCrops(scans(config), config, seed=0)
        seen[balance] = sum(bool((crops[0, index].labels == 1).any()) for index in range(200))
    # A class drawn first: half of the crops are about one of the six points; else one in 450, and its neighbours.
    assert 75 < seen[1.0] < 130
    assert seen[0.0] < 20


def test_centres_are_labelled(scans):
    config = _config(crop="sphere", crop_size=1e-6, crops_per_scan=100)
    crops = TrainingCrops(scans(config), config, seed=0)
    assert all((crops[0, index].labels >= 0).all() for index in range(200))


def test_batches_are_packed():
    def sample(name, number):
        return Sample(
            name, torch.full((number, 3), number), torch.ones(number, 2), torch.zeros(number, dtype=torch.int64)
        )

    batch = collate([sample("a", 2), sample("b", 5), sample("c", 1)])
    assert batch.names == ["a", "b", "c"]
    assert batch.offsets.tolist() == [0, 2, 7, 8]
    assert batch.offsets.dtype == torch.int64
    assert batch.coordinates[:, 0].tolist() == [2, 2, 5, 5, 5, 5, 5, 1]
    assert batch.features.shape == (8, 2)
    assert batch.labels.shape == (8,)


def test_class_weights():
    counts = np.array([800, 150, 50, 0])
    np.testing.assert_allclose(class_weights(counts, 0.0), [1, 1, 1, 0])
    # All classes alike: each of three has a third of the weight.
    np.testing.assert_allclose(class_weights(counts, 1.0), [1000 / 2400, 1000 / 450, 1000 / 150, 0], rtol=1e-6)
    half = class_weights(counts, 0.5).double().numpy()
    np.testing.assert_allclose(half[:3] ** 2 * counts[:3], (half[0] ** 2 * 800), rtol=1e-6)
    assert (half * counts).sum() == pytest.approx(1000, rel=1e-6)
