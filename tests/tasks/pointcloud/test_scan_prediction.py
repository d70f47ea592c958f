import io

import laspy
import numpy as np
import pytest
import torch
from PIL import Image

from latentgnn.errors import UserError
from latentgnn.files.outputs import LIST
from latentgnn.tasks.pointcloud.config import DataConfig
from latentgnn.tasks.pointcloud.model import PointNetwork
from latentgnn.tasks.pointcloud.pictures import draw_scan
from latentgnn.tasks.pointcloud.prediction import expand_scans, predict_files
from latentgnn.tasks.pointcloud.scans import RawScan, read_scan, write_scan
from latentgnn.tasks.pointcloud.voting import predict_scan
from latentgnn.tasks.pointcloud.voxels import crops, recentre

CLASSES = {2: "ground", 5: "tree", 6: "roof"}


def _config(**changes):
    settings = {"voxel": 0.0, "crop": "column", "crop_size": 3.0, "overlap": 0.5, "features": ("intensity",)}
    return DataConfig(classes=CLASSES, **{**settings, **changes})


@pytest.fixture
def model():
    torch.manual_seed(0)
    network = PointNetwork(1, 3, widths=(8, 16), depths=(1, 1), grids=(0.8,), neighbors=5)
    for module in network.modules():
        if isinstance(module, torch.nn.BatchNorm1d):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
    return network.eval()


def _scan(number=400, seed=0, middle=(0, 0, 0)):
    rng = np.random.default_rng(seed)
    return rng.random((number, 3)) * [8, 5, 2] + middle, rng.random((number, 1)).astype(np.float32)


def _alone(model, points, features):
    hierarchy = model.hierarchy(torch.from_numpy(recentre(points)))
    with torch.no_grad():
        return model(torch.from_numpy(features), hierarchy).softmax(dim=1).numpy()


def test_a_whole_scan_is_one_crop(model):
    points, features = _scan()
    probabilities = predict_scan(model, points, features, _config(crop="scan"))
    np.testing.assert_allclose(probabilities, _alone(model, points, features), atol=1e-6)


@pytest.mark.parametrize("shape", ["column", "sphere"])
def test_overlapping_crops_vote(model, shape):
    points, features = _scan()
    config = _config(crop=shape)
    votes = np.zeros((len(points), 3))
    for inside in crops(points, shape=shape, size=3.0, overlap=0.5):
        votes[inside] += _alone(model, points[inside], features[inside])
    expected = votes / votes.sum(axis=1, keepdims=True)
    probabilities = predict_scan(model, points, features, config)
    np.testing.assert_allclose(probabilities, expected, atol=1e-5)
    np.testing.assert_allclose(probabilities.sum(axis=1), 1, atol=1e-5)


def test_points_of_a_voxel_share_its_prediction(model):
    points, features = _scan()
    # A twin a millimetre beside every point falls into its voxel.
    points = np.floor(points / 0.25) * 0.25 + 0.1
    points, first = np.unique(points, axis=0, return_index=True)
    features = features[first]
    # The grid begins at the lowest corner; away from it by no whole number of voxels, nothing lies on an edge.
    points[0] = points.min(axis=0) - 0.1
    both = np.concatenate((points, points + 0.001)), np.concatenate((features, features + 1))
    probabilities = predict_scan(model, *both, _config(crop="scan", voxel=0.25))
    np.testing.assert_allclose(probabilities[: len(points)], probabilities[len(points) :])
    assert len(np.unique(probabilities, axis=0)) > 10


def test_map_coordinates_lose_nothing(model):
    points, features = _scan()
    points = np.round(points * 1024) / 1024
    far = points + np.array([2.0**20, 2.0**22, 64.0])
    config = _config(voxel=0.25)
    np.testing.assert_array_equal(
        predict_scan(model, far, features, config), predict_scan(model, points, features, config)
    )


def test_votes_are_a_mean_and_repeat_themselves(model):
    points, features = _scan()
    config = _config(voxel=0.5)
    single, triple = (predict_scan(model, points, features, config, votes=votes) for votes in (1, 3))
    assert not np.allclose(single, triple)
    np.testing.assert_array_equal(triple, predict_scan(model, points, features, config, votes=3))


@pytest.mark.parametrize("suffix", [".laz", ".las", ".ply", ".npz"])
def test_predicted_files_open_again_with_the_predicted_classes(model, tmp_path, suffix):
    points, features = _scan(middle=(770_000.0, 6_277_000.0, 20.0))
    columns = {"intensity": (features[:, 0] * 1000).astype(np.uint16)}
    path = tmp_path / f"tile{suffix}"
    write_scan(path, RawScan(points=points, columns=columns))
    config = _config()
    (done,) = predict_files(model, [path], config=config, out=tmp_path / "out")
    assert done.path == tmp_path / "out" / f"tile{'.laz' if suffix == '.las' else suffix}"
    source, written = read_scan(path), read_scan(done.path)
    np.testing.assert_array_equal(written.points, source.points)
    np.testing.assert_array_equal(written.columns["intensity"], source.columns["intensity"])
    features = source.columns["intensity"][:, None].astype(np.float32)
    expected = np.array([2, 5, 6])[predict_scan(model, source.points, features, config).argmax(axis=1)]
    np.testing.assert_array_equal(written.classes, expected)
    assert done.counts.tolist() == [(expected == number).sum() for number in (2, 5, 6)]
    if suffix == ".laz":
        with laspy.open(done.path) as file:
            assert file.header.point_count == len(points)
    with Image.open(tmp_path / "out" / "pictures" / "tile.png") as picture:
        assert picture.width > 400


def test_a_file_that_cannot_be_read_does_not_stop_the_others(model, tmp_path):
    points, features = _scan()
    for name in ("a", "c"):
        write_scan(tmp_path / f"{name}.npz", RawScan(points=points, columns={"intensity": features[:, 0]}))
    (tmp_path / "b.npz").write_bytes(b"no scan")
    write_scan(tmp_path / "d.npz", RawScan(points=points))
    paths = expand_scans([tmp_path])
    with pytest.raises(UserError, match=r"(?s)2 of 4 scans.*b.npz.*d.npz: it has no intensity"):
        predict_files(model, paths, config=_config(), out=tmp_path / "out", pictures=False)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [LIST, "a.npz", "c.npz"]
    (tmp_path / "notes.txt").write_text("")
    with pytest.raises(UserError, match=r"notes\.txt: expected a scan"):
        expand_scans([tmp_path / "notes.txt"])


def test_pictures_show_truth_prediction_and_what_differs():
    points, _ = _scan(300)
    labels = np.where(points[:, 0] < 4, 0, 1)
    labels[:20] = -1

    def red(predicted):
        """Pixels in the colour of what is wrong."""
        content = draw_scan(points, ["ground", "tree", "roof"], predicted=predicted, labels=labels)
        pixels = np.asarray(Image.open(io.BytesIO(content)).convert("RGB")).astype(int)
        return int((np.abs(pixels - [0xD6, 0x27, 0x28]).sum(axis=2) < 30).sum()), pixels.shape

    right, shape = red(labels.clip(0))
    wrong, _ = red(np.full(300, 2))
    assert shape[1] > shape[0] / 1.5
    assert right == 0
    assert wrong > 1000
    picture = np.asarray(Image.open(io.BytesIO(draw_scan(points, ["ground", "tree"], predicted=labels.clip(0)))))
    assert picture.shape[1] < shape[1]


def test_a_prediction_does_not_take_its_sources_place(model, tmp_path):
    points, features = _scan()
    path = tmp_path / "a.npz"
    write_scan(path, RawScan(points=points, columns={"intensity": features[:, 0]}, classes=np.full(400, 5)))
    before = path.read_bytes()
    with pytest.raises(UserError, match=r"is not empty, and what it holds \(a\.npz\)"):
        predict_files(model, [path], config=_config(), out=tmp_path)
    assert path.read_bytes() == before
