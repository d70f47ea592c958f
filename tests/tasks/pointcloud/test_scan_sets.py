import pickle

import numpy as np
import pytest

from latentgnn.configuration.settings import parse_config, plain_data
from latentgnn.errors import UserError
from latentgnn.tasks.classes import IGNORE
from latentgnn.tasks.pointcloud.check import check_split, load_set
from latentgnn.tasks.pointcloud.classes import S3DIS_CLASSES, SCANNET_CLASSES
from latentgnn.tasks.pointcloud.config import DataConfig
from latentgnn.tasks.pointcloud.datasets import ScanSet
from latentgnn.tasks.pointcloud.features import feature_columns
from latentgnn.tasks.pointcloud.layouts import find_scans, resolve
from latentgnn.tasks.pointcloud.scans import RawScan, write_scan

CLASSES = {2: "ground", 6: "building"}


def _scan(path, classes=(2, 6, 2, 0), **columns):
    points = np.array([[0, 0, 0], [1, 0, 3], [0, 1, 0], [1, 1, 1]], float)[: len(classes)]
    write_scan(path, RawScan(points=points, columns=columns, classes=np.array(classes)))


def _folder(root):
    """Two splits of three formats."""
    _scan(root / "train/b.laz")
    _scan(root / "train/deep/a.ply")
    _scan(root / "train/c.npz")
    _scan(root / "val/d.LAS")
    (root / "train/notes.txt").write_text("no scan")
    return root


def _config(folder, **changes):
    return DataConfig(**{"root": str(folder), "classes": CLASSES, "ignored": (0,), **changes})


def test_a_folder_of_scans(tmp_path):
    config = _config(_folder(tmp_path))
    train, val = load_set(config, "train"), load_set(config, "val")
    assert (train.names, val.names) == (["a", "b", "c"], ["d"])
    assert (train.class_names, train.class_ids, train.num_classes) == (("ground", "building"), (2, 6), 2)
    assert len(train) == 3
    assert train.counts.tolist() == [6, 3]
    assert train.skipped == ""
    for index in range(3):
        scan = train.scan(index)
        assert scan.labels.tolist() == [0, 1, 0, IGNORE]
        assert scan.points[1].tolist() == [1, 0, 3]
        assert scan.features.shape == (4, 0)
    assert train.config.layout == "scans"


@pytest.mark.parametrize(
    ("named", "names"),
    [
        (("train/deep",), ["a"]),
        (("train/c.npz", "val"), ["c", "d"]),
        (("train/*.*z",), ["b", "c"]),
        (("**/*.ply",), ["a"]),
        (("*ai*",), ["a", "b", "c"]),
        (("train/**/*",), ["a", "b", "c"]),
    ],
)
def test_splits_by_folders_files_and_globs(tmp_path, named, names):
    config = resolve(_config(_folder(tmp_path), train=named))
    assert [source.name for source in find_scans(config, "train")] == names


def test_what_the_folder_says_of_itself(tmp_path):
    (tmp_path / "dataset.yaml").write_text(
        "classes: {6: house, 2: soil}\nignored: [0, 9]\nfeatures: [intensity, height]\ntrain: [b.laz]\nval: there\n"
    )
    _scan(tmp_path / "b.laz", intensity=np.arange(4))
    _scan(tmp_path / "there/d.laz", intensity=np.arange(4))
    config = resolve(_config(tmp_path, features=("color",), voxel=0.3))
    assert config.classes == {6: "house", 2: "soil"}
    assert config.ignored == (0, 9)
    assert config.voxel == 0.3
    assert resolve(config) == config
    scan_set = load_set(config, "train")
    assert scan_set.feature_names == ("intensity", "height")
    assert scan_set.scan(0).labels.tolist() == [1, 0, 1, IGNORE]
    np.testing.assert_allclose(scan_set.scan(0).features, [[0, 0], [1, 3], [2, 0], [3, 1]])
    assert load_set(config, "val").names == ["d"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("classes: [", "dataset.yaml: line 1, column 11"),
        ("- 1", "expected a mapping of settings, got list"),
        ("voxel: 3", "expected a mapping of any of layout, .*; got voxel"),
        ("features: [colour]", r"dataset\.yaml: features: expected .*got \['colour'\]"),
        ("classes: {2: 3.5, a: b}", r"dataset\.yaml: classes: expected"),
    ],
)
def test_a_folder_that_says_nonsense(tmp_path, text, message):
    (tmp_path / "dataset.yaml").write_text(text)
    with pytest.raises(UserError, match=message):
        resolve(_config(tmp_path))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"root": None}, "no data are named: set data.root"),
        ({"root": "/no/such/folder"}, "data.root: there is no folder /no/such/folder"),
        ({"classes": None}, "the classes have no names: set data.classes"),
        ({"ignored": (2, 9)}, "data.ignored: class ids 2 are among data.classes too"),
        ({"voxel": -1.0}, "voxel: expected 0 or more; got -1.0"),
        ({"overlap": 1.0}, "overlap: expected 0 or more and less than 1; got 1.0"),
        ({"crop_size": 0.0}, "crop_size: expected more than 0"),
        ({"balance": float("nan")}, "balance: expected from 0 to 1; got nan"),
        ({"max_points": 0}, "max_points: expected 1 or more, or null; got 0"),
        ({"features": ("color", "color")}, "features: expected each feature once"),
        ({"train": ("nowhere",)}, "nowhere: there is no such folder or scan; set data.train"),
        ({"train": ("empty",)}, "there are no scans for train in empty"),
    ],
)
def test_settings_that_cannot_be(tmp_path, changes, message):
    _folder(tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=message):
        find_scans(resolve(_config(tmp_path, **changes)), "train")


def test_features(tmp_path):
    rng = np.random.default_rng(0)
    columns = {
        "intensity": rng.integers(0, 5000, 4),
        "return_number": np.array([1, 1, 2, 3]),
        "number_of_returns": np.array([1, 2, 2, 3]),
        "color": rng.integers(0, 256, (4, 3), np.uint8),
        "normal": np.tile([0.0, 0.6, 0.8], (4, 1)),
    }
    _scan(tmp_path / "a.npz", **columns)
    features = ("normal", "log_intensity", "color", "last_return", "intensity", "height")
    config = _config(tmp_path, features=features)
    scan_set = ScanSet.of_files([tmp_path / "a.npz"], config)
    expected = [
        *columns["normal"].T,
        np.log(1 + columns["intensity"]),
        *(columns["color"] / 255).T,
        [1, 0, 1, 1],
        columns["intensity"],
        [0, 3, 0, 1],
    ]
    np.testing.assert_allclose(scan_set.scan(0).features, np.array(expected).T, rtol=1e-6)
    assert scan_set.scan(0).features.dtype == np.float32
    assert scan_set.num_features == 10
    assert scan_set.feature_names[:5] == ("normal_x", "normal_y", "normal_z", "log_intensity", "red")
    assert feature_columns(("height",)) == ("height",)


def test_files_to_predict_on_need_no_known_labels(tmp_path):
    _scan(tmp_path / "a.npz", classes=(2, 77, 6, 0))
    write_scan(tmp_path / "b.ply", RawScan(points=np.zeros((1, 3))))
    scan_set = ScanSet.of_files([tmp_path / "a.npz", tmp_path / "b.ply"], _config("/nowhere"))
    assert scan_set.names == ["a", "b"]
    assert scan_set.scan(0).labels.tolist() == [0, IGNORE, 1, IGNORE]
    assert scan_set.scan(1).labels is None


def test_a_set_travels_to_loading_processes(tmp_path):
    scan_set = load_set(_config(_folder(tmp_path)), "train")
    # What multiprocessing does with its own bytes where processes are spawned.
    there = pickle.loads(pickle.dumps(scan_set))
    assert there.names == scan_set.names
    np.testing.assert_array_equal(there.scan(1).points, scan_set.scan(1).points)


def test_what_was_resolved_is_saved_and_read_again(tmp_path):
    config = resolve(_config(_folder(tmp_path), features=("color", "height"), train=("train", "val/*")))
    assert parse_config(DataConfig, plain_data(config)) == config
    texts = [("classes", "{1: ground}"), ("features", "[color]"), ("augment.scale", "null"), ("train", "[a, b]")]
    parsed = parse_config(DataConfig, plain_data(config), texts)
    assert parsed.classes == {1: "ground"}
    assert (parsed.features, parsed.augment.scale, parsed.train) == (("color",), None, ("a", "b"))


def test_read_scans_stay_in_memory_within_limits(tmp_path):
    paths = [tmp_path / f"{name}.npz" for name in "abc"]
    for path in paths:
        _scan(path)
    scan_set = ScanSet.of_files(paths, _config(tmp_path, cached_points=8))
    first, second = scan_set.scan(0), scan_set.scan(1)
    assert scan_set.scan(0) is first
    scan_set.scan(2)
    assert scan_set.scan(0) is first
    assert scan_set.scan(1) is not second
    none = ScanSet.of_files(paths, _config(tmp_path, cached_points=0))
    assert none.scan(0) is not none.scan(0)


def _scannet_file(path, labels=None, moved=0.0):
    """A square of two triangles in the official files' layout, written byte by byte."""
    head = ["ply", "format binary_little_endian 1.0", "comment MLIB generated", "element vertex 4"]
    head += [f"property float {axis}" for axis in "xyz"]
    head += [f"property uchar {name}" for name in ("red", "green", "blue", "alpha")]
    head += ["property ushort label"] * (labels is not None)
    head += ["element face 2", "property list uchar int vertex_indices", "end_header", ""]
    dtype = [("xyz", "<f4", 3), ("rgba", "u1", 4)] + [("label", "<u2")] * (labels is not None)
    rows = np.zeros(4, dtype)
    rows["xyz"] = np.array([[0, 0, 0], [1, 0, 0], [1, 1, 0], [0, 1, 0]]) + moved
    rows["rgba"] = [[255, 0, 51, 255]] * 4
    if labels is not None:
        rows["label"] = labels
    faces = np.zeros(2, [("number", "u1"), ("corners", "<i4", 3)])
    faces["number"], faces["corners"] = 3, [[0, 1, 2], [0, 2, 3]]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes("\n".join(head).encode() + rows.tobytes() + faces.tobytes())


def _scannet(root, scenes=("scene0001_00", "scene0000_01"), val=("scene0002_00",), benchmark=""):
    for number, scene in enumerate((*scenes, *val)):
        base = root / "scans" / scene / f"{scene}_vh_clean_2"
        _scannet_file(base.with_suffix(".ply"), moved=number)
        _scannet_file(base.with_name(f"{base.name}.labels.ply"), labels=[1, 39, 0, 13])
    folder = root / benchmark
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "scannetv2_train.txt").write_text("\n".join(scenes) + "\n")
    (folder / "scannetv2_val.txt").write_text("\n".join(val))
    return root


@pytest.mark.parametrize("benchmark", ["", "Tasks/Benchmark"])
def test_scannet(tmp_path, benchmark):
    config = DataConfig(root=str(_scannet(tmp_path, benchmark=benchmark)), features=("color", "normal"))
    train = load_set(config, "train")
    assert train.config.layout == "scannet"
    assert train.names == ["scene0000_01", "scene0001_00"]
    assert load_set(config, "val").names == ["scene0002_00"]
    assert train.num_classes == 20
    assert train.class_ids == (*range(1, 13), 14, 16, 24, 28, 33, 34, 36, 39)
    assert train.class_names[0] == "wall"
    assert SCANNET_CLASSES[36] == "bathtub"
    scan = train.scan(0)
    # Wall and other furniture; unannotated and blinds are not among the 20.
    assert scan.labels.tolist() == [0, 19, IGNORE, IGNORE]
    np.testing.assert_allclose(scan.features, [[1, 0, 0.2, 0, 0, 1]] * 4, rtol=1e-6)
    assert scan.points[0].tolist() == [1, 1, 1]
    # Files hold slips such as 149, beyond NYU40's classes.
    _scannet_file(tmp_path / "scans/scene0000_01/scene0000_01_vh_clean_2.labels.ply", labels=[1, 149, 50, 2])
    assert load_set(config, "train").scan(0).labels.tolist() == [0, IGNORE, IGNORE, 1]


def test_scannet_faults(tmp_path):
    config = DataConfig(root=str(_scannet(tmp_path)))
    scene = tmp_path / "scans/scene0000_01"
    labels = scene / "scene0000_01_vh_clean_2.labels.ply"
    content = labels.read_bytes()

    def only():
        (fault,) = check_split(config, "train").faults
        assert fault.record == "scene0000_01"
        return str(fault)

    labels.write_bytes(content.replace(b"vertex 4", b"vertex 3"))
    assert "labels.ply: cannot be read, perhaps because it is damaged" in only()
    write_scan(labels, RawScan(points=np.zeros((3, 3)), classes=np.ones(3, int)))
    assert "vh_clean_2.ply has 4 points, but scene0000_01_vh_clean_2.labels.ply has labels for 3" in only()
    write_scan(labels, RawScan(points=np.zeros((4, 3))))
    assert "labels.ply: its vertices have no 'label'" in only()
    labels.unlink()
    assert "labels.ply: there is no such file" in only()
    (tmp_path / "scannetv2_val.txt").unlink()
    with pytest.raises(UserError, match=r"no split file scannetv2_val\.txt; looked for .*Benchmark"):
        check_split(config, "val")
    assert [source.name for source in find_scans(resolve(DataConfig(root=str(tmp_path))), "train")]


def _room(root, area, room, objects):
    for name, rows in objects.items():
        path = root / area / room / "Annotations" / f"{name}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(" ".join(map(str, row)) + "\n" for row in rows))
    (root / area / room / f"{room}.txt").write_text("0 0 0 0 0 0\n")


def _s3dis(root):
    floor = [(-12.5, 3.25, 0.125, 255, 51, 0), (1, 2, 3, 0, 0, 0)]
    for area in ("Area_1", "Area_2", "Area_5"):
        _room(
            root,
            area,
            "office_1",
            {"floor_1": floor, "chair_2": [(0, 0, 1, 1, 2, 3)], "stairs_1": [(5, 5, 5, 0, 0, 0)]},
        )
    _room(root, "Area_1", "hallway_2", {"ceiling_1": floor})
    return root


def test_ids_of_the_same_name_are_one_class(tmp_path):
    (tmp_path / "train").mkdir()
    _scan(tmp_path / "train/a.npz", classes=(5, 2, 3, 0))
    config = _config(tmp_path, classes={2: "ground", 5: "vegetation", 3: "vegetation"})
    scans = load_set(config, "train")
    assert scans.class_names == ("ground", "vegetation")
    assert scans.class_ids == (2, 5)
    assert scans.scan(0).labels.tolist() == [1, 0, 1, IGNORE]
    assert scans.counts.tolist() == [1, 2]
    assert "train: scans 1, points 4 (ground 1, vegetation 2), faults 0" in check_split(config, "train").text()


def test_a_folders_own_settings_may_only_fill(tmp_path):
    (tmp_path / "dataset.yaml").write_text("classes: {2: soil}\nfeatures: [height]\nignored: [6]\n")
    wins = resolve(_config(tmp_path))
    assert (wins.classes, wins.features, wins.ignored) == ({2: "soil"}, ("height",), (6,))
    fills = resolve(_config(tmp_path, dataset_yaml="fills"))
    assert (fills.classes, fills.features, fills.ignored) == (CLASSES, ("height",), (0,))


def test_classes_of_published_sets_can_be_merged(tmp_path):
    merged = {**dict.fromkeys(range(7), "structure"), **dict.fromkeys(range(7, 13), "furniture")}
    train = load_set(DataConfig(root=str(_s3dis(tmp_path)), features=("color",), classes=merged), "train")
    assert train.class_names == ("structure", "furniture")
    # Chair, two points of the floor, and stairs, which are clutter.
    assert train.scan(1).labels.tolist() == [1, 0, 0, 1]


def test_s3dis(tmp_path):
    config = DataConfig(root=str(_s3dis(tmp_path)), features=("color",))
    train = load_set(config, "train")
    assert train.config.layout == "s3dis"
    assert train.names == ["Area_1_hallway_2", "Area_1_office_1", "Area_2_office_1"]
    assert load_set(config, "val").names == ["Area_5_office_1"]
    assert train.class_names == tuple(S3DIS_CLASSES.values())
    assert len(train.class_names) == 13
    scan = train.scan(1)
    # Chair, two points of the floor, and stairs, which are clutter; in the order of the files.
    assert [train.class_names[label] for label in scan.labels] == ["chair", "floor", "floor", "clutter"]
    assert scan.points[1].tolist() == [-12.5, 3.25, 0.125]
    np.testing.assert_allclose(scan.features[1], [1, 0.2, 0], rtol=1e-6)
    assert train.counts.tolist() == [2, 4, *[0] * 6, 2, 0, 0, 0, 2]


def test_s3dis_areas(tmp_path):
    root = str(_s3dis(tmp_path))
    config = resolve(DataConfig(root=root, val=("Area_1",)))
    assert [source.name for source in find_scans(config, "train")] == ["Area_2_office_1", "Area_5_office_1"]
    assert len(find_scans(config, "val")) == 2
    with pytest.raises(UserError, match=r"no folder Area_7, which data\.val names; areas: Area_1, Area_2, Area_5"):
        find_scans(resolve(DataConfig(root=root, val=("Area_7",))), "val")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        # The official Area_5/hallway_6 has such a line.
        (b"1 2 3 4 5 6\n22.3 1.2 3.4 185\x10187 100 90\n", "line 2: expected six numbers, x y z r g b; got"),
        (b"1 2 3 4 5 6\n1 2 3 4 5\n", "line 2: expected six numbers"),
        (b"1 2 3\n", "line 1: expected six numbers"),
        (b"1 2 3 4 5 \xff\n", "line 1: expected six numbers"),
        (b"1 2 nan 4 5 6\n", "1 of its 4 points have coordinates that are not finite"),
    ],
)
def test_s3dis_faults(tmp_path, content, message):
    root = _s3dis(tmp_path)
    (root / "Area_1/office_1/Annotations/chair_2.txt").write_bytes(content)
    (fault,) = check_split(DataConfig(root=str(root)), "train").faults
    assert fault.record == "Area_1_office_1"
    assert message in str(fault)


def test_s3dis_objects_without_points(tmp_path):
    root = _s3dis(tmp_path)
    (root / "Area_1/office_1/Annotations/chair_2.txt").write_text("")
    scan_set = load_set(DataConfig(root=str(root)), "train")
    assert len(scan_set.scan(1).points) == 3


def test_real_scans(shared):
    names = ("unclassified", "ground", "low vegetation", "medium vegetation", "high vegetation", "building")
    config = DataConfig(
        root=str(shared("lidarhd")),
        classes=dict(enumerate(names, 1)),
        ignored=(0,),
        features=("log_intensity", "return_number", "number_of_returns", "height"),
    )
    train, val = load_set(config, "train"), load_set(config, "val")
    assert (len(train), len(val)) == (4, 2)
    assert train.counts.tolist() == [9675, 116551, 3784, 5338, 65573, 72865]
    assert sum(len(val.scan(index).points) for index in range(2)) == 143_124
    for index in range(2):
        scan = val.scan(index)
        # Tiles of 50 m.
        assert (np.ptp(scan.points[:, :2], axis=0) < 50.001).all()
        height = scan.features[:, 3]
        assert 0 <= height.min() < height.max() < 30
        # Ground is low and roofs are not.
        assert np.median(height[scan.labels == 1]) < 1
        assert np.median(height[scan.labels == 5]) > 2
