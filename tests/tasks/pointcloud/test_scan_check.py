import numpy as np
import pytest

from latentgnn.errors import UserError
from latentgnn.tasks.pointcloud.check import check_split, load_set
from latentgnn.tasks.pointcloud.config import DataConfig
from latentgnn.tasks.pointcloud.scans import RawScan, write_scan


@pytest.fixture
def config(tmp_path):
    """A set without a fault; every test breaks one scan of it."""
    for name in ("train/a.laz", "train/b.npz", "train/c.ply", "val/d.npz"):
        _scan(tmp_path / name)
    return DataConfig(root=str(tmp_path), classes={2: "ground", 6: "building"}, ignored=(0, 7), features=("intensity",))


def _scan(path, number=10, **changes):
    points = np.random.default_rng(0).random((number, 3)) + np.array([770_600, 6_277_500, 20])
    settings = {"points": points, "columns": {"intensity": np.arange(number)}, "classes": np.array([2, 6, 0, 2, 7] * 2)}
    write_scan(path, RawScan(**{**settings, **changes}))


def _only(config, scan, split="train"):
    report = check_split(config, split)
    assert len(report.faults) == 1, report.text()
    (fault,) = report.faults
    assert fault.record == scan
    assert str(fault.file) in str(fault)
    assert str(fault).count(str(fault.file)) == 1
    assert len(report.sound) == report.scans - 1
    return fault.message


def test_a_sound_set(config):
    report = check_split(config, "train")
    assert report.text() == "train: scans 3, points 30 (ground 12, building 6), faults 0"
    assert [source.name for source in report.sound] == ["a", "b", "c"]
    assert report.counts.tolist() == [12, 6]
    assert not check_split(config, "val").faults


@pytest.mark.parametrize("name", ["a.laz", "b.npz", "c.ply"])
def test_a_file_cut_short(config, tmp_path, name):
    path = tmp_path / "train" / name
    path.write_bytes(path.read_bytes()[:-30])
    assert "cut short" in _only(config, name[0])


def test_a_file_of_something_else(config, tmp_path):
    (tmp_path / "train/a.laz").write_text("<html>not found</html>")
    assert "cannot be read" in _only(config, "a")


def test_no_points(config, tmp_path):
    write_scan(tmp_path / "train/c.ply", RawScan(points=np.zeros((0, 3))))
    assert _only(config, "c") == "it has no points"


def test_labels_of_another_number(config, tmp_path):
    points = np.zeros((10, 3))
    np.savez(tmp_path / "train/b.npz", points=points, labels=np.full(9, 2), intensity=np.zeros(10))
    assert "there are 10 points, but labels of shape (9,)" in _only(config, "b")
    np.savez(tmp_path / "train/b.npz", points=points, labels=np.full(10, 2), intensity=np.zeros(11))
    assert "expected intensity of shape (10,) for 10 points; got (11,)" in _only(config, "b")


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("name", ["b.npz", "c.ply"])
def test_coordinates_that_are_no_numbers(config, tmp_path, name, value):
    points = np.zeros((10, 3))
    points[[3, 3, 8], [0, 1, 2]] = value
    _scan(tmp_path / "train" / name, points=points)
    expected = "2 of its 10 points have coordinates that are not finite numbers"
    assert _only(config, name[0]) == expected


def test_features_that_are_no_numbers(config, tmp_path):
    _scan(tmp_path / "train/b.npz", columns={"intensity": np.array([np.nan] * 3 + [1.0] * 7)})
    assert _only(config, "b") == "3 of its 10 points have features that are not finite numbers"


def test_a_missing_feature(config, tmp_path):
    _scan(tmp_path / "train/b.npz", columns={"color": np.zeros((10, 3))})
    assert "it has no intensity, which data.features asks for; it has color" in _only(config, "b")
    _scan(tmp_path / "train/b.npz", columns={})
    assert "it has coordinates alone" in _only(config, "b")


def test_unknown_classes(config, tmp_path):
    _scan(tmp_path / "train/b.npz", classes=np.array([2, 6, 9, 9, 65, 0, 7, 2, 2, 2]))
    assert "unknown class ids: 9 (2 points), 65 (1 points); name them in data.classes" in _only(config, "b")


def test_no_labelled_point(config, tmp_path):
    _scan(tmp_path / "train/b.npz", classes=np.array([0, 7] * 5))
    assert _only(config, "b") == "no labelled point: none has a class that is named and not ignored"
    _scan(tmp_path / "train/b.npz", classes=None)
    assert _only(config, "b") == "no labelled point: it has no labels"


def test_a_name_twice(config, tmp_path):
    _scan(tmp_path / "train/deep/a.npz")
    message = _only(config, "a")
    assert message == f"duplicated scan name 'a': {tmp_path / 'train/a.laz'} has it too"


def test_a_scan_named_twice_in_a_list(config, tmp_path):
    (tmp_path / "dataset.yaml").write_text("train: [train, train/b.npz]")
    assert _only(config, "b") == "duplicated scan name 'b': it is listed twice"


def test_a_file_in_both_splits(config, tmp_path):
    (tmp_path / "val/c.ply").symlink_to(tmp_path / "train/c.ply")
    assert not check_split(config, "train").faults
    assert _only(config, "c", "val") == "it is in the training set too"


def test_all_faults_are_told(config, tmp_path):
    (tmp_path / "train/a.laz").write_bytes(b"")
    points = np.full((10, 3), np.nan)
    _scan(tmp_path / "train/b.npz", points=points, classes=np.full(10, 9))
    report = check_split(config, "train")
    assert [fault.record for fault in report.faults] == ["a", "b", "b", "b"]
    lines = report.text(2).splitlines()
    assert len(lines) == 4
    assert lines[2] == "... and 2 more"
    assert lines[3] == "train: scans 3, points 10 (ground 4, building 2), faults 4"
    assert report.text().count("\n") == 4


def test_a_set_with_faults_is_refused_or_thinned(config, tmp_path):
    (tmp_path / "train/a.laz").write_bytes(b"")
    with pytest.raises(UserError, match=r"(?s)a\.laz: cannot be read.*--data\.on_fault skip"):
        load_set(config, "train")
    skip = DataConfig(**{**vars(config), "on_fault": "skip"})
    scan_set = load_set(skip, "train")
    assert scan_set.names == ["b", "c"]
    assert scan_set.counts.tolist() == [8, 4]
    assert "a.laz" in scan_set.skipped
    assert "left out: scans 1" in scan_set.skipped
    for name in ("b.npz", "c.ply"):
        (tmp_path / "train" / name).write_bytes(b"")
    with pytest.raises(UserError, match="no scan is left without these"):
        load_set(skip, "train")
