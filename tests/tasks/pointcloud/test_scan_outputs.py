"""What the commands write where, and what they do when they cannot: as commands, on a small trained network."""

import os
import sys
from pathlib import Path

import numpy as np
import pytest

from latentgnn.cli import main
from latentgnn.tasks.pointcloud.scans import RawScan, read_scan, write_scan
from tests.tasks.tiny_runs import POINTCLOUD, TOWN, train, write_recipe, write_town


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    root = tmp_path_factory.mktemp("hamlet")
    for split in ("train", "val"):
        (root / split).mkdir()
        write_town(root / split / f"{split}.laz", len(split))
    (root / "dataset.yaml").write_text(TOWN)
    return root


@pytest.fixture(scope="module")
def run(data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained")
    return train(write_recipe(folder, POINTCLOUD), data, folder / "run", "--training.steps", "1")


@pytest.fixture
def scans(tmp_path, monkeypatch):
    """Scans ``scans/x.laz`` and ``scans/y.laz`` in the working folder."""
    folder = tmp_path / "work" / "scans"
    folder.mkdir(parents=True)
    for name in "xy":
        write_town(folder / f"{name}.laz", ord(name))
    monkeypatch.chdir(folder.parent)
    return folder


def content(folder):
    """All files but the list of results, which is hidden."""
    files = [path for path in folder.rglob("*") if path.is_file() and not path.name.startswith(".")]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


def fails(capsys, argv, code=1):
    """The message of a command that must fail without a traceback."""
    capsys.readouterr()
    assert main([str(argument) for argument in argv]) == code
    error = capsys.readouterr().err
    assert "Traceback" not in error
    assert "a fault in latentgnn" not in error
    return error


@pytest.mark.parametrize("out", [".", "scans", "scans/../scans", "linked"])
def test_predictions_do_not_replace_the_users_scans(run, scans, capsys, out):
    Path("linked").symlink_to(scans)
    before = content(scans.parent)
    for extra in ([], ["--overwrite"]):
        assert "is not empty" in fails(capsys, ["predict", run, "scans/*.laz", "--out", out, *extra])
    assert content(scans.parent) == before


def test_earlier_predictions_are_replaced_when_that_is_told(run, scans, capsys):
    argv = ["predict", str(run), "--out", "out"]
    assert main([*argv, "scans"]) == 0
    before = content(Path("out"))
    assert set(before) == {"x.laz", "y.laz", "pictures/x.png", "pictures/y.png"}
    assert "out holds the results of an earlier command (x.laz, " in fails(capsys, [*argv, "scans/y.laz"])
    # Predictions to predict again.
    Path("linked.laz").symlink_to("out/x.laz")
    for source in ("out/x.laz", "linked.laz", "out"):
        assert "which is read" in fails(capsys, [*argv, source, "--overwrite"])
    assert content(Path("out")) == before
    assert main([*argv, "scans/y.laz", "--overwrite", "--no-pictures"]) == 0
    assert set(content(Path("out"))) == {"y.laz"}
    assert [path.name for path in Path("out").iterdir() if path.is_dir()] == []


def test_predictions_by_tiles_are_those_of_whole_scans(run, scans, capsys):
    argv = ["predict", str(run), "scans"]
    assert main([*argv, "--out", "whole"]) == 0
    capsys.readouterr()
    assert main([*argv, "--out", "tiled", "--tiles", "4"]) == 0
    said = capsys.readouterr().out.splitlines()
    assert said[0].startswith("scans/x.laz: memory: 0.0 GB for the largest of ")
    assert "scans/x.laz: 1,500 points, written to tiled/x.laz" in said
    assert content(Path("tiled")) == content(Path("whole"))
    # Where a scan is not seen whole, columns take its place.
    column = ["--data.crop", "column", "--data.crop_size", "5"]
    assert main([*argv, "--out", "columns", "--no-pictures", *column]) == 0
    assert main([*argv, "--out", "not-whole", "--no-pictures", "--data.crop", "scan", "--tiles", "5"]) == 0
    assert content(Path("not-whole")) == content(Path("columns"))
    for wrong, message in (
        (["--tiles", "0"], "1 to 1,000,000 metres"),
        (["--tiles", "9", "--overlap", "0.3"], "tile_overlap"),
    ):
        error = fails(capsys, [*argv, "--out", "none", *wrong], code=2)
        assert message in error


def test_scans_of_two_folders_do_not_meet(run, tmp_path):
    for number, name in enumerate(("a/x", "b/x", "b/X")):
        path = tmp_path / "in" / f"{name}.laz"
        path.parent.mkdir(parents=True, exist_ok=True)
        write_town(path, number)
    out = tmp_path / "out"
    assert main(["predict", str(run), str(tmp_path / "in" / "**" / "*"), "--out", str(out)]) == 0
    assert set(content(out)) == {
        *("a/x.laz", "b/X.laz", "b/x-2.laz"),
        *("pictures/a/x.png", "pictures/b/X.png", "pictures/b/x-2.png"),
    }
    for source, written in (("a/x", "a/x"), ("b/X", "b/X"), ("b/x", "b/x-2")):
        points = read_scan(tmp_path / "in" / f"{source}.laz").points
        np.testing.assert_array_equal(read_scan(out / f"{written}.laz").points, points)


def test_one_bad_scan_does_not_stop_the_others(run, scans, capsys):
    (scans / "a.laz").write_bytes((scans / "x.laz").read_bytes()[:2000])
    error = fails(capsys, ["predict", run, "scans", "--no-pictures", "--out", "out"])
    assert error.startswith("latentgnn: 1 of 3 scans failed; the others are done, in out:\n  scans/a.laz: ")
    assert set(content(Path("out"))) == {"x.laz", "y.laz"}


def test_what_was_predicted_is_kept_when_the_disk_gets_full(run, scans, small_disk, capsys):
    argv = ["predict", run, "scans", "--no-pictures", "--out"]
    assert main([*map(str, argv), "whole"]) == 0
    whole = content(Path("whole"))
    disk = small_disk(f"{len(whole['x.laz']) // 1000 + 8}k")
    error = fails(capsys, [*argv, disk / "out"])
    assert error == (
        f"latentgnn: {disk / 'out' / 'y.laz'}: no space left on device: free some space, or write to another place\n"
        f"what was written before is kept in {disk / 'out'}\n"
    )
    assert content(disk / "out") == {"x.laz": whole["x.laz"]}
    assert sorted(path.name for path in (disk / "out").iterdir() if path.name.endswith(".tmp")) == []


def test_a_scan_that_is_too_large_for_the_disk_does_not_stop_the_others(run, scans, capsys, files_up_to):
    # Four times the points in the first of them.
    scan = read_scan(scans / "x.laz")
    points, columns = np.tile(scan.points, (4, 1)), {name: np.tile(value, 4) for name, value in scan.columns.items()}
    write_scan(
        scans / "a.npz", RawScan(points=points + np.random.default_rng(0).random(points.shape) / 50, columns=columns)
    )
    with files_up_to((scans / "x.laz").stat().st_size * 2):
        error = fails(capsys, ["predict", run, "scans", "--no-pictures", "--out", "out"])
    assert error == (
        "latentgnn: 1 of 3 scans failed; the others are done, in out:\n  out/a.npz: file too large: "
        "the limit on the size of files is reached (`ulimit -f`, or the file system's own)\n"
    )
    assert set(content(Path("out"))) == {"x.laz", "y.laz"}


def test_an_evaluation_that_cannot_be_written_is_told_before_the_work(run, scans, tmp_path, capsys, monkeypatch):
    def work(*_):
        raise AssertionError("this is work")

    monkeypatch.setattr("latentgnn.tasks.pointcloud.commands.load_set", work)
    (tmp_path / "file").write_bytes(b"mine")
    for out, message in (("file", "is a file"), ("file/out", "a part of this path is a file"), ("work", "not empty")):
        error = fails(capsys, ["evaluate", run, "--out", tmp_path / out])
        assert message in error
        assert len(error.splitlines()) == 1


def test_an_evaluation_is_replaced_only_when_that_is_told(run, capsys):
    assert main(["evaluate", str(run)]) == 0
    before = content(run / "evaluation")
    assert set(before) == {"metrics.json", "pictures/val.png"}
    assert "--overwrite" in fails(capsys, ["evaluate", run])
    assert content(run / "evaluation") == before
    assert main(["evaluate", str(run), "--overwrite", "--evaluation.sample_pictures", "0"]) == 0
    assert set(content(run / "evaluation")) == {"metrics.json"}


def test_pipes_and_folders_are_no_scans(run, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    os.mkfifo("pipe.laz")
    (tmp_path / "only").mkdir()
    os.mkfifo("only/pipe.npz")
    argv = ["predict", run, "--out", "out"]
    assert fails(capsys, [*argv, "pipe.laz"]) == "latentgnn: pipe.laz: expected a file; this is a pipe\n"
    assert "the folder contains no scans" in fails(capsys, [*argv, "only"])
    for area in ("Area_1", "Area_5"):
        room = tmp_path / area / "room" / "Annotations"
        room.mkdir(parents=True)
        os.mkfifo(room / "chair_1.txt")
    argv = ["check-data", "--config", "lidar_small", "--data.root", "."]
    assert main([*argv, "--data.classes", "{0: chair}", "--data.features", "[color]", "--data.ignored", "[]"]) == 1
    assert "chair_1.txt: expected a file; this is a pipe" in capsys.readouterr().out


@pytest.mark.skipif(sys.platform != "linux", reason="needs names of any bytes")
def test_a_name_that_is_no_text_is_shown_in_escapes(run, scans, capsys):
    strange = os.fsdecode(b"\xff.laz")
    (scans / "x.laz").rename(strange)
    assert main(["predict", str(run), strange, "--no-pictures", "--out", "out"]) == 0
    assert r"\udcff.laz: 1,500 points" in capsys.readouterr().out
    assert list(content(Path("out"))) == [strange]
    assert main(["predict", str(run), "scans/y.laz", "--no-pictures", "--out", "out", "--overwrite"]) == 0
    assert list(content(Path("out"))) == ["y.laz"]
