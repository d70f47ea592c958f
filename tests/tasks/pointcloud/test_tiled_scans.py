"""Scans that are larger than memory: tile by tile, the same classes as in one piece."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import laspy
import numpy as np
import pytest
import torch

import latentgnn
from latentgnn.errors import UserError
from latentgnn.files.unfinished import WORK
from latentgnn.tasks.pointcloud.cells import Cells, SortedPoints, record_kind
from latentgnn.tasks.pointcloud.config import DataConfig
from latentgnn.tasks.pointcloud.features import features_of
from latentgnn.tasks.pointcloud.model import PointNetwork
from latentgnn.tasks.pointcloud.prediction import Tiles, predict_files
from latentgnn.tasks.pointcloud.scans import RawScan, read_scan, scan_chunks, write_classes, write_scan
from latentgnn.tasks.pointcloud.tiles import predict_in_tiles
from latentgnn.tasks.pointcloud.voting import Part, predict_scan
from latentgnn.tasks.pointcloud.voxels import Bounds

CLASSES = {2: "ground", 5: "tree", 6: "roof"}
IDS = np.array([2, 5, 6])
MIDDLE = np.array([770_000.0, 6_277_000.0, 20.0])


def _config(**changes):
    settings = {"voxel": 0.4, "crop": "column", "crop_size": 3.0, "overlap": 0.3, "height_radius": 1.0}
    return DataConfig(classes=CLASSES, **{**settings, "features": ("intensity", "height"), **changes})


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    network = PointNetwork(2, 3, widths=(8, 16), depths=(1, 1), grids=(0.8,), neighbors=5)
    latentgnn.insert(network, {"encoder.1": 4}, example_input=network.example_input())
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if name.endswith("gamma"):
                parameter.fill_(0.5)
    for module in network.modules():
        if isinstance(module, torch.nn.BatchNorm1d):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
    network.eval()
    raw = _raw()
    with torch.no_grad():
        network.head[-1].weight *= 30
        votes = predict_scan(network, raw.points, features_of("", raw, _config()), _config())
        # All classes occur.
        network.head[-1].bias -= torch.from_numpy(np.log(votes)).mean(dim=0)
    return network


def _raw(number=1500, seed=0):
    """Hills with walls on them, in an order that has nothing to do with their place."""
    rng = np.random.default_rng(seed)
    points = np.round(rng.random((number, 3)) * [12, 8, 1], 3)
    columns = {"intensity": rng.integers(1, 3, number).astype(np.uint16)}
    return RawScan(points=points + MIDDLE, columns=columns, classes=rng.choice([0, 2], number))


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    path = tmp_path_factory.mktemp("large") / "scan.laz"
    write_scan(path, _raw())
    return path


@pytest.mark.parametrize("edge", [0.7, 2.5, 100.0])
def test_squares_of_cells_hold_their_points_and_those_around(tmp_path, edge):
    raw = _raw(500)
    points = raw.points
    # Also on the edges of cells, and beside the origin.
    points[:50, :2] = np.round(points[:50, :2] / edge) * edge
    points[50:100] -= MIDDLE
    chunks = np.array_split(points, 7)
    cells = Cells.count(chunks, edge=edge, path=tmp_path)
    columns = {"intensity": raw.columns["intensity"]}
    file = SortedPoints(tmp_path / "points", cells, record_kind(columns))
    parts = np.array_split(columns["intensity"], 7)
    file.write(((c, {"intensity": i}) for c, i in zip(chunks, parts, strict=True)), source=tmp_path)
    assert cells.number == 500
    place = np.floor(points[:, :2] / edge).astype(int)
    seen = []
    for square in cells.squares(2):
        records, wanted = file.read(cells.runs(square, side=2, margin=3))
        low, high = np.array(square) * 2, np.array(square) * 2 + 2
        around = ((place >= low - 3) & (place < high + 3)).all(axis=1)
        own = ((place >= low) & (place < high)).all(axis=1)
        assert records["index"].tolist() == np.flatnonzero(around).tolist()
        assert records["index"][wanted].tolist() == np.flatnonzero(own).tolist()
        np.testing.assert_array_equal(records["point"], points[around])
        np.testing.assert_array_equal(records["intensity"], columns["intensity"][around])
        seen += records["index"][wanted].tolist()
    assert sorted(seen) == list(range(500))


@pytest.mark.parametrize(("shape", "votes"), [("column", 1), ("column", 2), ("sphere", 1)])
def test_a_part_of_a_scan_gets_the_probabilities_of_the_whole(model, shape, votes):
    raw = _raw()
    config = _config(crop=shape)
    features = features_of("", raw, config)
    whole = predict_scan(model, raw.points, features, config, votes=votes)
    inner = (np.abs(raw.points - MIDDLE - [7, 5, 1])[:, :2] < 1).all(axis=1)
    near = (np.abs(raw.points - MIDDLE - [7, 5, 1])[:, :2] < 1 + 3.001).all(axis=1)
    part = Part(Bounds.of(raw.points), inner[near])
    found = predict_scan(model, raw.points[near], features[near], config, votes=votes, part=part)
    np.testing.assert_array_equal(found, whole[inner])
    # What is missing of a crop would be noticed.
    near = (np.abs(raw.points - MIDDLE - [7, 5, 1])[:, :2] < 1 + 2).all(axis=1)
    part = Part(Bounds.of(raw.points), inner[near])
    found = predict_scan(model, raw.points[near], features[near], config, votes=votes, part=part)
    assert (found != whole[inner]).any()


@pytest.mark.parametrize(("shape", "side"), [("column", 2.0), ("column", 5.0), ("sphere", 5.0), ("column", 1e5)])
def test_tiles_give_the_classes_of_the_whole_scan(model, path, tmp_path, shape, side):
    config = _config(crop=shape)
    raw = read_scan(path)
    expected = IDS[predict_scan(model, raw.points, features_of(path, raw, config), config).argmax(axis=1)]
    assert len(np.unique(expected)) == 3
    needs, told = [], []
    scan = predict_in_tiles(
        model,
        path,
        config,
        side=side,
        ids=IDS,
        votes=1,
        folder=tmp_path / "work",
        chunk=400,
        on_points=lambda *progress: told.append(progress),
        on_need=needs.append,
    )
    np.testing.assert_array_equal(scan.classes, expected)
    (need,) = needs
    corners = np.unique(np.floor(raw.points[:, :2] / side), axis=0)
    assert need.tiles == len(corners)
    assert need.disk == sum(file.stat().st_size for file in (tmp_path / "work").glob("*.bin")) + 1500
    assert [progress for progress in told if progress[0] == "reading"][-1] == ("reading", 1500, 1500)
    segmented = [done for doing, done, total in told if doing == "segmenting"]
    assert segmented == sorted(segmented)
    assert len(set(segmented)) > need.tiles
    assert told[-1] == ("segmenting", 1500, 1500)


def test_colours_are_those_of_the_whole_file(tmp_path):
    # The first chunk alone looks as if it had 8 bits, and had no intensity.
    header = laspy.LasHeader(point_format=3, version="1.2")
    las = laspy.LasData(header)
    las.xyz = _raw(30).points - MIDDLE
    las.red, las.intensity = np.arange(30) * 20, np.arange(30) // 20
    las.write(tmp_path / "a.laz")
    whole = read_scan(tmp_path / "a.laz")
    chunks = scan_chunks(tmp_path / "a.laz", 10)
    assert np.concatenate(list(chunks.points())).tolist() == whole.points.tolist()
    scans = list(chunks.scans())
    assert len(scans) == 3
    for name in ("color", "intensity"):
        np.testing.assert_array_equal(np.concatenate([s.columns[name] for s in scans]), whole.columns[name])
    assert whole.columns["color"].max() == np.float32(580 / 65535)


def _files(folder):
    return {path.name: path.read_bytes() for path in folder.rglob("*") if path.is_file() and path.name[0] != "."}


def test_files_are_those_of_scans_read_whole(model, path, tmp_path):
    said = []
    paths = [path, path.with_name("b.npz")]
    write_scan(paths[1], _raw(500, seed=1))
    predict_files(model, paths, config=_config(), out=tmp_path / "whole")
    tiles = Tiles(side=5.0, say=said.append)
    done = predict_files(model, paths, config=_config(), out=tmp_path / "tiled", tiles=tiles)
    assert _files(tmp_path / "tiled") == _files(tmp_path / "whole")
    assert set(_files(tmp_path / "whole")) == {"scan.laz", "scan.png", "b.npz", "b.png"}
    assert [scan.counts.sum() for scan in done] == [1500, 500]
    assert not (tmp_path / "tiled" / WORK).exists()
    assert said[0].startswith(f"{path}: memory: 0.0 GB for the largest of ")


def test_what_was_ended_goes_on_where_it_was(model, path, tmp_path):
    first = path.with_name("a.npz")
    write_scan(first, _raw(400, seed=2))
    paths, out = [first, path], tmp_path / "out"
    predict_files(model, paths, config=_config(), out=tmp_path / "whole")

    work, said = out / WORK / "1", []

    def run(stop=None, **changes):
        """Stop after so many tiles of the second scan."""

        def on_points(scan, *progress):
            done = work / "done.txt"
            if scan == path and done.exists() and len(done.read_text().splitlines()) == stop:
                raise KeyboardInterrupt

        options = {"config": _config(), "out": out, **changes}
        predict_files(model, paths, tiles=Tiles(side=5.0, on_points=on_points, say=said.append), **options)

    with pytest.raises(UserError, match=r"interrupted; what was written before is kept .*; the same command goes on"):
        run(stop=3)
    assert set(_files(out)) >= {"a.npz", "a.png"}
    # What the process was ended in the middle of.
    with (work / "done.txt").open("a") as file:
        file.write("1540")
    # The tiles that are done are not looked at again.
    classes = np.load(work / "classes.npy")
    np.save(work / "classes.npy", np.where(classes == 0, 0, 5).astype(np.uint8))
    finished = (out / "a.npz").stat()
    with pytest.raises(UserError, match="holds unfinished work of an earlier command: give that command again"):
        run(config=_config(voxel=0.5))
    with pytest.raises(UserError, match="unfinished work"):
        predict_files(model, paths, config=_config(), out=out)
    said.clear()
    run()
    assert said[0] == f"{first}: done before, in {out / 'a.npz'}"
    assert os.path.samestat((out / "a.npz").stat(), finished)
    expected = read_scan(tmp_path / "whole" / "scan.laz").classes
    np.testing.assert_array_equal(read_scan(out / "scan.laz").classes, np.where(classes == 0, expected, 5))
    assert not (out / WORK).exists()
    assert 0 < (classes == 0).sum() < 1500


def test_begun_anew_with_overwrite(model, path, tmp_path):
    def stop(scan, doing, done, total):
        if doing == "segmenting":
            raise KeyboardInterrupt

    for _ in range(2):
        with pytest.raises(UserError, match="interrupted"):
            predict_files(
                model, [path], config=_config(), out=tmp_path, tiles=Tiles(side=5.0, on_points=stop), overwrite=True
            )
    predict_files(model, [path], config=_config(voxel=0.5), out=tmp_path, overwrite=True, pictures=False)
    assert set(_files(tmp_path)) == {"scan.laz"}
    assert not (tmp_path / WORK).exists()


def test_faults_are_told(model, path, tmp_path):
    write_scan(tmp_path / "plain.laz", RawScan(points=_raw(50).points))
    write_scan(tmp_path / "none.npz", RawScan(points=np.empty((0, 3))))
    write_scan(tmp_path / "far.npz", RawScan(points=np.full((3, 3), 1e9)))
    (tmp_path / "cut.laz").write_bytes(path.read_bytes()[:3000])
    paths = [tmp_path / name for name in ("plain.laz", "none.npz", "far.npz", "cut.laz")]
    with pytest.raises(UserError) as fault:
        predict_files(model, paths, config=_config(), out=tmp_path / "out", tiles=Tiles(side=5.0))
    told = str(fault.value).splitlines()
    assert told[0].startswith("4 of 4 scans failed")
    for line, end in zip(
        told[1:],
        ("has no intensity", "it has no points", "coordinates of 1e+09 m", "damaged or cut short"),
        strict=True,
    ):
        assert end in line


def test_a_disk_that_is_too_small_is_told_before_the_work(model, path, tmp_path, small_disk):
    disk = small_disk("64k")
    with pytest.raises(UserError, match=r"scan.laz: by tiles, it takes 0\.0 GB of disk .* are free: free some space"):
        predict_files(model, [path], config=_config(), out=disk / "out", tiles=Tiles(side=5.0))


def test_a_scan_that_memory_cannot_hold_is_refused(model, path, tmp_path, monkeypatch):
    monkeypatch.setattr("latentgnn.tasks.pointcloud.prediction.memory_bytes", lambda: 100_000)
    with pytest.raises(UserError, match=r"its 1,500 points take about 0 GB .* this machine has 0 GB: .* --tiles 200"):
        predict_files(model, [path], config=_config(), out=tmp_path / "out")


def test_a_far_outlier_costs_nothing(model, tmp_path):
    raw = _raw(400)
    points = np.concatenate([raw.points, MIDDLE[None] + [5e7, -7e7, 0]])
    columns = {"intensity": np.append(raw.columns["intensity"], np.uint16(1))}
    write_scan(tmp_path / "a.npz", RawScan(points=points, columns=columns))
    config = _config(crop_size=30.0)
    outs = [
        predict_files(
            model, [tmp_path / "a.npz"], config=config, out=tmp_path / str(tiles), tiles=tiles, pictures=False
        )[0].path
        for tiles in (None, Tiles(side=1.0))
    ]
    whole, tiled = (read_scan(out).classes for out in outs)
    np.testing.assert_array_equal(tiled, whole)


@pytest.mark.parametrize("suffix", ["las", "laz"])
def test_classes_are_written_chunk_by_chunk(tmp_path, monkeypatch, suffix):
    header = laspy.LasHeader(point_format=6, version="1.4")
    header.vlrs.append(laspy.VLR("copc", 1, "", bytes(160)))
    header.vlrs.append(laspy.VLR("mine", 7, "", b"kept"))
    las = laspy.LasData(header)
    las.xyz = _raw(95).points - MIDDLE
    las.gps_time = np.arange(95.0)
    las.evlrs = laspy.vlrs.vlrlist.VLRList([laspy.VLR("copc", 1000, "", bytes(32)), laspy.VLR("mine", 8, "", b"too")])
    las.write(tmp_path / f"a.{suffix}")
    monkeypatch.setattr("latentgnn.tasks.pointcloud.las.CHUNK", 10)
    classes = np.arange(95) + 100
    write_classes(tmp_path / "b.laz", classes, source=tmp_path / f"a.{suffix}")
    written = laspy.read(tmp_path / "b.laz")
    np.testing.assert_array_equal(written.classification, classes)
    for name in set(las.point_format.dimension_names) - {"classification"}:
        np.testing.assert_array_equal(written[name], las[name])
    assert [(vlr.user_id, vlr.record_data_bytes()) for vlr in written.vlrs] == [("mine", b"kept")]
    assert [(vlr.user_id, vlr.record_data_bytes()) for vlr in written.evlrs] == [("mine", b"too")]
    for number in (94, 96):
        with pytest.raises(UserError, match=f"has 95 points, but there are classes for {number}"):
            write_classes(tmp_path / "c.laz", np.zeros(number, np.uint8), source=tmp_path / "b.laz")


LARGE = """
import sys
from pathlib import Path

import torch
from latentgnn.tasks.pointcloud.config import DataConfig
from latentgnn.tasks.pointcloud.model import PointNetwork
from latentgnn.tasks.pointcloud.prediction import Tiles, predict_files

torch.manual_seed(0)
model = PointNetwork(1, 2, widths=(8, 16), depths=(1, 1), grids=(4.0,), neighbors=4).eval()
classes = {2: "ground", 6: "roof"}
config = DataConfig(classes=classes, features=("intensity",), voxel=2.0, crop="column", crop_size=25.0, overlap=0.0)
(done,) = predict_files(model, [Path("large.laz")], config=config, out=Path("out"), tiles=Tiles(side=100.0))
assert done.counts.sum() == 10**7
print(next(line for line in open("/proc/self/status") if line.startswith("VmHWM:")).split()[1])
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="asks /proc for the peak of memory")
def test_ten_million_points_take_the_memory_of_a_tile(tmp_path):
    rng = np.random.default_rng(0)
    header = laspy.LasHeader(point_format=6, version="1.4")
    header.scales = [0.001] * 3
    with laspy.open(tmp_path / "large.laz", mode="w", header=header) as file:
        for _ in range(10):
            # Nothing in the file's order says where a point is.
            records = laspy.ScaleAwarePointRecord.zeros(10**6, header=header)
            records.x, records.y, records.z = (rng.random((10**6, 3)) * [600, 600, 20]).T
            records["intensity"], records["gps_time"] = rng.integers(1, 9, 10**6), rng.random(10**6)
            file.write_points(records)
    command = [sys.executable, "-c", LARGE]
    done = tmp_path / "out" / WORK / "0" / "done.txt"
    # The first is killed after some tiles of 36, and the second goes on.
    with subprocess.Popen(command, cwd=tmp_path) as first:
        while first.poll() is None and not (done.exists() and len(done.read_text().splitlines()) > 5):
            time.sleep(0.05)
        sorting = re.search(r"VmHWM:\s*(\d+)", Path(f"/proc/{first.pid}/status").read_text())
        first.kill()
    assert first.returncode == -signal.SIGKILL
    assert not (tmp_path / "out" / "large.laz").exists()
    second = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    # Coordinates and records alone are 0.5 GB; PyTorch and the libraries are 0.5 GB, a chunk 0.3 GB.
    for peak in (sorting[1], second.stdout):
        assert int(peak) * 1024 < 1.3e9  # 0.65 GB of it are the libraries
    with laspy.open(tmp_path / "large.laz") as source, laspy.open(tmp_path / "out" / "large.laz") as written:
        for given, made in zip(source.chunk_iterator(10**6), written.chunk_iterator(10**6), strict=True):
            assert np.isin(made["classification"], (2, 6)).all()
            made["classification"] = np.asarray(given["classification"])
            np.testing.assert_array_equal(made.array, given.array)
