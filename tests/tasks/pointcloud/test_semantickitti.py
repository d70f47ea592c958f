"""SemanticKITTI's layout: sequences, merged classes, labels beside the scans."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from latentgnn.errors import UserError
from latentgnn.tasks.classes import IGNORE
from latentgnn.tasks.pointcloud.check import check_split, load_set
from latentgnn.tasks.pointcloud.config import DataConfig, ModelConfig
from latentgnn.tasks.pointcloud.layouts import find_scans, resolve
from latentgnn.tasks.pointcloud.model import build_point_network
from latentgnn.tasks.pointcloud.prediction import predict_files
from latentgnn.tasks.pointcloud.scans import read_scan

# Of the benchmark's own configuration, learning_map: from ids to the classes 1 to 19, 0 being ignored.
LEARNING_MAP = (
    "0:0 1:0 10:1 11:2 13:5 15:3 16:5 18:4 20:5 30:6 31:7 32:8 40:9 44:10 48:11 49:12 50:13 51:14 52:0 60:9 70:15 "
    "71:16 72:17 80:18 81:19 99:0 252:1 253:7 254:6 255:8 256:5 257:5 258:4 259:5"
)
IDS = {int(id): int(label) for id, label in (pair.split(":") for pair in LEARNING_MAP.split())}


def write_scene(root: Path, sequence: str, number: int, ids: list[int]) -> Path:
    """A scan of a point for each id, byte by byte; objects are numbered in the upper half of the labels."""
    scan = root / "sequences" / sequence / "velodyne" / f"{number:06d}.bin"
    labels = scan.parent.parent / "labels" / f"{number:06d}.label"
    for path in (scan, labels):
        path.parent.mkdir(parents=True, exist_ok=True)
    rows = [(float(place), 2.5, -1.0, 0.25) for place in range(len(ids))]
    scan.write_bytes(np.array(rows, "<f4").tobytes())
    labels.write_bytes(b"".join(id.to_bytes(2, "little") + (7).to_bytes(2, "little") for id in ids))
    return scan


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for sequence in ("00", "07", "08", "10"):
        write_scene(tmp_path, sequence, 0, list(IDS))
    write_scene(tmp_path, "00", 1, [10, 0])
    (tmp_path / "sequences/11/velodyne").mkdir(parents=True)
    return tmp_path


def test_the_classes_are_those_of_the_benchmark(root: Path) -> None:
    train = load_set(DataConfig(root=str(root), features=("intensity",)), "train")
    assert train.config.layout == "semantickitti"
    assert train.names == ["00_000000", "00_000001", "07_000000", "10_000000"]
    assert len(train.class_names) == 19
    assert train.class_names[:5] == ("car", "bicycle", "motorcycle", "truck", "other-vehicle")
    assert train.class_names[-2:] == ("pole", "traffic-sign")
    scan = train.scan(0)
    assert scan.labels is not None
    assert scan.labels.tolist() == [label - 1 if label else IGNORE for label in IDS.values()]
    assert scan.points[1].tolist() == [1, 2.5, -1]
    assert (scan.features == 0.25).all()
    assert [file.suffix for file in train.sources[0].files] == [".bin", ".label"]
    assert load_set(DataConfig(root=str(root), features=("intensity",)), "val").names == ["08_000000"]


def test_sequences_are_chosen(root: Path) -> None:
    config = resolve(DataConfig(root=str(root), train=("07",)))
    assert [source.name for source in find_scans(config, "train")] == ["07_000000"]
    with pytest.raises(UserError, match=r"no 03/velodyne, which data.train names; sequences: 00, 07, 08, 10, 11"):
        find_scans(replace(config, train=("03",)), "train")


@pytest.mark.parametrize(
    ("name", "size", "message"),
    [
        ("velodyne/000000.bin", 40, "000000.bin: it is cut short, or something else: 40 bytes are no multiple of 16"),
        ("labels/000000.label", 7, "000000.label: it is cut short, or something else: 7 bytes are no multiple of 4"),
        ("labels/000000.label", 8, "has labels for 2"),
    ],
)
def test_faults(root: Path, name: str, size: int, message: str) -> None:
    path = root / "sequences/07" / name
    path.write_bytes(path.read_bytes()[:size])
    (fault,) = check_split(DataConfig(root=str(root)), "train").faults
    assert message in str(fault)
    assert fault.record == "07_000000"


def test_predictions_are_labels(root: Path, tmp_path: Path) -> None:
    config = resolve(DataConfig(root=str(root), features=("intensity",), crop="scan", voxel=0.0))
    network = ModelConfig(widths=(8, 8), depths=(0, 0), grids=(2.0,), neighbors=4)
    model = build_point_network(network, num_features=1, num_classes=19).eval()
    source = root / "sequences/08/velodyne/000000.bin"
    (done,) = predict_files(model, [source], config=config, out=tmp_path / "out", pictures=False)
    assert done.path == tmp_path / "out" / "000000.label"
    written = np.frombuffer(done.path.read_bytes(), "<u4")
    assert len(written) == len(IDS)
    # Of the ids of a class, that of what does not move.
    assert set(written.tolist()) <= {10, 11, 15, 18, 20, 30, 31, 32, 40, 44, 48, 49, 50, 51, 70, 71, 72, 80, 81}


def test_labels_beside_the_scan_and_none(root: Path, tmp_path: Path) -> None:
    scan = tmp_path / "alone.bin"
    scan.write_bytes((root / "sequences/00/velodyne/000001.bin").read_bytes())
    assert read_scan(scan).classes is None
    scan.with_suffix(".label").write_bytes((root / "sequences/00/labels/000001.label").read_bytes())
    classes = read_scan(scan).classes
    assert classes is not None
    assert classes.tolist() == [10, 0]
