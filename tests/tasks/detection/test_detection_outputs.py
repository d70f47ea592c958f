"""What the commands write where, and what they do when they cannot: as commands, on a small trained detector."""

import json
import os
import shutil
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from latentgnn.cli import main
from latentgnn.tasks.detection import prediction
from tests.tasks.tiny_runs import DETECTION, train, write_recipe, write_split


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    root = tmp_path_factory.mktemp("squares") / "data"
    write_split(root, "train", 2)
    write_split(root, "val", 2)
    return root


@pytest.fixture(scope="module")
def recipe(data):
    return write_recipe(data.parent, DETECTION)


@pytest.fixture(scope="module")
def run(data, recipe):
    return train(recipe, data, data.parent / "run", "--training.steps", "1")


@pytest.fixture
def images(tmp_path, monkeypatch):
    """Images ``pictures/x.png`` and ``pictures/y.png`` in the working folder."""
    folder = tmp_path / "work" / "pictures"
    folder.mkdir(parents=True)
    for name in ("x", "y"):
        write_image(folder / f"{name}.png")
    monkeypatch.chdir(folder.parent)
    return folder


def write_image(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(len(path.name)).integers(0, 255, (48, 64, 3), dtype=np.uint8)).save(path)
    return path


def content(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def fails(capsys, argv, code=1):
    """The message of a command that must fail without a traceback."""
    capsys.readouterr()
    assert main([str(argument) for argument in argv]) == code
    error = capsys.readouterr().err
    assert "Traceback" not in error
    assert "a fault in latentgnn" not in error
    return error


@pytest.mark.parametrize("out", [".", "pictures/..", "../work", "linked", "pictures"])
def test_predictions_do_not_replace_the_users_pictures(run, images, capsys, out):
    Path("linked").symlink_to(images.parent)
    before = content(images.parent)
    for extra in ([], ["--overwrite"]):
        error = fails(capsys, ["predict", run, "pictures/*.png", "--out", out, *extra])
        assert "is not empty" in error
        assert "--out" in error
    assert content(images.parent) == before


def test_earlier_predictions_are_replaced_when_that_is_told(run, images, capsys):
    argv = ["predict", run, "--out", "out", "--score-threshold", "0"]
    assert main([*map(str, argv), "pictures/x.png", "pictures/y.png"]) == 0
    before = content(Path("out"))
    assert "pictures/x.png" in before
    assert "out holds the results of an earlier command" in fails(capsys, [*argv, "pictures/y.png"])
    assert content(Path("out")) == before
    # The earlier results are what is read.
    assert "which is read" in fails(capsys, [*argv, "out/pictures/x.png", "--overwrite"])
    Path("hard.png").hardlink_to("out/pictures/y.png")
    assert "which is read" in fails(capsys, [*argv, "hard.png", "--overwrite"])
    assert content(Path("out")) == before
    assert main([*map(str, argv), "pictures/y.png", "--overwrite"]) == 0
    assert sorted(path for path in content(Path("out")) if not path.startswith(".")) == [
        "pictures/y.png",
        "predictions.json",
    ]


def test_pictures_of_two_folders_do_not_meet(run, tmp_path):
    for folder in "ab":
        write_image(tmp_path / "in" / folder / "x.png")
    assert main(["predict", str(run), str(tmp_path / "in" / "**" / "*.png"), "--out", str(tmp_path / "out")]) == 0
    assert {"pictures/a/x.png", "pictures/b/x.png"} <= set(content(tmp_path / "out"))


def test_pictures_of_a_run_and_of_its_evaluation_do_not_meet(data, recipe, tmp_path):
    root = tmp_path / "data"
    shutil.copytree(data, root)
    # Two validation images of one name.
    annotations = root / "annotations" / "instances_val.json"
    text = annotations.read_text()
    for number in (0, 1):
        (root / "val" / str(number)).mkdir()
        (root / "val" / f"val{number}.png").rename(root / "val" / str(number) / "x.png")
        text = text.replace(f"val{number}.png", f"{number}/x.png")
    annotations.write_text(text)
    run = tmp_path / "run"
    argv = ["train", "--config", recipe, "--data.root", root, "--out", run, "--training.steps", "1"]
    assert main([str(argument) for argument in argv]) == 0
    assert main(["evaluate", str(run)]) == 0
    for folder in (run / "pictures", run / "evaluation" / "pictures"):
        samples = {name for name in content(folder) if not name.startswith(("worst", "best"))}
        assert samples == {"0/x.png", "1/x.png"}


def test_an_evaluation_is_replaced_only_when_that_is_told(run, tmp_path, capsys):
    out = tmp_path / "out"
    assert main(["evaluate", str(run), "--out", str(out)]) == 0
    before = content(out)
    capsys.readouterr()
    assert "--overwrite" in fails(capsys, ["evaluate", run, "--out", out])
    # The results that are to be scored are not removed.
    argv = ["evaluate", run, "--results", out / "predictions.json", "--out", out, "--overwrite"]
    assert "which is read" in fails(capsys, argv)
    assert content(out) == before
    assert main(["evaluate", str(run), "--out", str(out), "--overwrite", "--evaluation.sample_pictures", "0"]) == 0
    assert sorted(path for path in content(out) if not path.startswith(".")) == ["metrics.json", "predictions.json"]


@pytest.mark.parametrize("command", ["train", "evaluate", "predict"])
def test_a_place_that_cannot_be_written_to_is_told_before_the_work(
    run, data, recipe, images, tmp_path, capsys, monkeypatch, command
):
    argv = {
        "train": ["train", "--config", recipe, "--data.root", data],
        "evaluate": ["evaluate", run],
        "predict": ["predict", run, "pictures"],
    }[command]

    def work(*_):
        raise AssertionError("this is work")

    monkeypatch.setattr("latentgnn.tasks.detection.run_sets.load", work)
    monkeypatch.setattr(prediction, "read_image", work)
    (tmp_path / "file").write_bytes(b"mine")
    for out, message in (
        ("file", "is a file"),
        ("file/out", "a part of this path is a file"),
        ("x" * 300, "name too long"),
        ("loop/out", "circle"),
        ("/proc/out", "/proc/out"),
    ):
        if out == "loop/out":
            (tmp_path / "loop").symlink_to("loop")
        error = fails(capsys, [*argv, "--out", tmp_path / out])
        assert message in error
        assert len(error.splitlines()) == 1
    assert (tmp_path / "file").read_bytes() == b"mine"


@pytest.mark.parametrize("command", ["train", "evaluate", "predict"])
def test_a_disk_that_is_full_is_told_before_the_work(run, data, recipe, images, small_disk, capsys, command):
    disk = small_disk("64k")
    with suppress(OSError):
        (disk / "full").write_bytes(bytes(1_000_000))
    argv = {
        "train": ["train", "--config", recipe, "--data.root", data],
        "evaluate": ["evaluate", run],
        "predict": ["predict", run, "pictures"],
    }[command]
    error = fails(capsys, [*argv, "--out", disk / "out"])
    assert error == f"latentgnn: {disk / 'out'}: no space left on device: free some space, or write to another place\n"


def test_what_was_found_is_kept_when_the_disk_gets_full(run, tmp_path, small_disk, capsys):
    for number in range(6):
        write_image(tmp_path / "in" / f"{number}.png")
    argv = ["predict", str(run), str(tmp_path / "in"), "--score-threshold", "0", "--out"]
    assert main([*argv, str(tmp_path / "whole")]) == 0
    whole = json.loads((tmp_path / "whole" / "predictions.json").read_text())
    sizes = [path.stat().st_size for path in sorted((tmp_path / "whole" / "pictures").iterdir())]
    assert whole

    disk = small_disk(f"{(sum(sizes[:3]) + len(json.dumps(whole)) + 40_000) // 1000}k")
    error = fails(capsys, [*argv, disk / "out"])
    assert "no space left on device" in error
    assert f"what was written before is kept in {disk / 'out'}" in error
    kept = json.loads((disk / "out" / "predictions.json.partial").read_text())
    files = sorted({Path(record["file_name"]).name for record in kept})
    assert 1 <= len(files) < 6
    assert kept == [record for record in whole if Path(record["file_name"]).name in files]
    written = sorted((disk / "out" / "pictures").iterdir())
    assert written
    for path in written:
        # Each whole: none under its name before that.
        assert path.read_bytes() == (tmp_path / "whole" / "pictures" / path.name).read_bytes()


def test_pictures_that_cannot_be_written_do_not_stop_the_results(run, images, capsys, files_up_to):
    argv = ["predict", run, "pictures", "--score-threshold", "0", "--out", "out"]
    with files_up_to(20_000):
        error = fails(capsys, argv)
    assert "2 of 2 images failed" in error
    assert "out/pictures/x.png: file too large" in error
    assert "out/pictures/y.png: file too large" in error
    found = json.loads(Path("out/predictions.json").read_text())
    assert {record["file_name"] for record in found} == {"pictures/x.png", "pictures/y.png"}


def test_training_on_a_full_disk_says_how_to_go_on(data, recipe, small_disk, capsys):
    disk = small_disk("2m")
    argv = ["train", "--config", recipe, "--data.root", data, "--out", disk / "run", "--training.steps", "1"]
    error = fails(capsys, argv)
    first, second = error.splitlines()
    assert first.startswith(f"latentgnn: {disk / 'run'}")
    assert first.endswith("no space left on device: free some space, or write to another place")
    assert second == f"then continue with: latentgnn train --resume {disk / 'run'}"
    subprocess.run(["mount", "-o", "remount,size=1g", str(disk)], check=True)
    assert main(["train", "--resume", str(disk / "run")]) == 0


def test_output_into_a_closed_pipe(run, data, recipe, images, tmp_path, capsys, monkeypatch):
    def closed(buffering=-1):
        reader, writer = os.pipe()
        os.close(reader)
        return open(writer, "w", buffering)

    # As with `| head`: nobody wants more of it.
    with monkeypatch.context() as patch, closed() as pipe:
        patch.setattr("sys.stdout", pipe)
        code = main(["predict", str(run), "pictures", "--out", "out"])
    assert (code, capsys.readouterr().err) == (141, "")
    assert Path("out/predictions.json").is_file()
    # Training goes on without a reader.
    argv = ["train", "--config", recipe, "--data.root", data, "--training.steps", "1", "--out"]
    with monkeypatch.context() as patch, closed() as pipe:
        patch.setattr("sys.stdout", pipe)
        code = main([str(argument) for argument in [*argv, tmp_path / "whole"]])
    assert (code, capsys.readouterr().err) == (141, "")
    assert (tmp_path / "whole" / "metrics.json").is_file()
    # What ends before the first step is not given up without a word.
    argv.append(tmp_path / "run")
    with monkeypatch.context() as patch, closed(buffering=1) as pipe:
        patch.setattr("sys.stdout", pipe)
        code = main([str(argument) for argument in argv])
    assert (code, capsys.readouterr().err) == (
        1,
        "latentgnn: standard output: broken pipe: the program that took the output has ended\n"
        f"then continue with: latentgnn train --resume {tmp_path / 'run'}\n",
    )
    assert main(["train", "--resume", str(tmp_path / "run")]) == 0


def test_evaluating_on_a_full_disk_still_shows_the_figures(run, small_disk, capsys, tmp_path):
    assert main(["evaluate", str(run), "--out", str(tmp_path / "whole")]) == 0
    table = capsys.readouterr().out.rpartition("written to")[0]
    size = (tmp_path / "whole" / "predictions.json").stat().st_size
    disk = small_disk(f"{size // 1000 + 20}k")
    assert main(["evaluate", str(run), "--out", str(disk / "out")]) == 1
    shown = capsys.readouterr()
    assert shown.out == table
    assert "no space left on device" in shown.err
    assert "Traceback" not in shown.err
    assert (disk / "out" / "predictions.json").read_bytes() == (tmp_path / "whole" / "predictions.json").read_bytes()


def test_a_run_that_can_only_be_read_is_evaluated_elsewhere(run, small_disk, tmp_path, capsys):
    disk = small_disk("300m")
    (disk / "run" / "checkpoints").mkdir(parents=True)
    for name in ("config.yaml", "checkpoints/best.ckpt"):
        shutil.copy(run / name, disk / "run" / name)
    subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
    error = fails(capsys, ["evaluate", disk / "run"])
    assert error == f"latentgnn: {disk / 'run' / 'evaluation'}: read-only file system: write to another place\n"
    assert main(["evaluate", str(disk / "run"), "--out", str(tmp_path / "out")]) == 0
    error = fails(capsys, ["train", "--resume", disk / "run"])
    assert "read-only file system" in error


def test_an_interrupted_prediction_keeps_what_it_has_found(run, images, capsys, monkeypatch):
    draw = prediction.draw_detections
    drawn = []

    def interrupted(*arguments):
        drawn.append(arguments)
        if len(drawn) == 2:
            raise KeyboardInterrupt
        return draw(*arguments)

    monkeypatch.setattr(prediction, "draw_detections", interrupted)
    error = fails(capsys, ["predict", run, "pictures", "--score-threshold", "0", "--out", "out"])
    assert error == "latentgnn: interrupted; what was written before is kept in out\n"
    found = json.loads(Path("out/predictions.json.partial").read_text())
    assert {record["file_name"] for record in found} == {"pictures/x.png", "pictures/y.png"}
    assert [path.name for path in Path("out/pictures").iterdir()] == ["x.png"]


def test_a_killed_prediction_keeps_what_it_has_found(run, tmp_path):
    for number in range(100):
        write_image(tmp_path / "in" / f"{number:03}.png")
    program = "import sys; from latentgnn.cli import main; sys.exit(main())"
    argv = ["predict", run, tmp_path / "in", "--score-threshold", "0", "--out", tmp_path / "out"]
    with subprocess.Popen([sys.executable, "-c", program, *map(str, argv)]) as process:
        while not (tmp_path / "out" / "pictures" / "002.png").exists():
            assert process.poll() is None
            time.sleep(0.01)
        process.kill()
    found = json.loads((tmp_path / "out" / "predictions.json.partial").read_text())
    assert {f"00{number}.png" for number in range(3)} <= {Path(record["file_name"]).name for record in found}
    assert not (tmp_path / "out" / "predictions.json").exists()
    for path in (tmp_path / "out" / "pictures").glob("*.png"):
        with Image.open(path) as picture:
            picture.load()


def test_one_bad_image_does_not_stop_the_others(run, images, capsys):
    (images / "w.png").write_bytes((images / "x.png").read_bytes()[:900])
    error = fails(capsys, ["predict", run, "pictures", "--score-threshold", "0", "--out", "out"])
    assert "1 of 3 images failed; the others are done, in out:\n  pictures/w.png: " in error
    found = json.loads(Path("out/predictions.json").read_text())
    assert {record["file_name"] for record in found} == {"pictures/x.png", "pictures/y.png"}


def test_pipes_devices_and_folders_are_no_inputs(run, data, images, tmp_path, capsys):
    os.mkfifo("pipe.png")
    Path("folder.png").mkdir()
    Path("zero.png").symlink_to("/dev/zero")
    predict, evaluate = ["predict", run], ["evaluate", run, "--out", "out", "--results"]
    assert fails(capsys, [*predict, "pipe.png"]) == "latentgnn: pipe.png: expected a file; this is a pipe\n"
    assert fails(capsys, [*predict, "zero.png"]) == "latentgnn: zero.png: expected a file; this is a device\n"
    assert "the pattern matches no image" in fails(capsys, [*predict, "*.png"])
    assert "pipe.png: expected a file; this is a pipe" in fails(capsys, [*evaluate, "pipe.png"])
    assert "folder.png: expected a file; this is a folder" in fails(capsys, [*evaluate, "folder.png"])
    assert "pipe.png" in fails(capsys, ["evaluate", "pipe.png"])
    # In a data set.
    root = tmp_path / "data"
    shutil.copytree(data, root)
    for number, kind in enumerate(("pipe", "folder")):
        (root / "val" / f"val{number}.png").unlink()
        Path(f"{kind}.png").rename(root / "val" / f"val{number}.png")
    assert main(["check-data", "--data.root", str(root)]) == 1
    shown = capsys.readouterr().out
    assert "expected a file; this is a pipe" in shown
    assert "expected a file; this is a folder" in shown


def test_a_checkpoint_that_cannot_be_read_is_named(run, tmp_path, capsys):
    # A file whose end, where reading begins, cannot be found, by root neither.
    unreadable = Path("/proc/self/mem")
    if not unreadable.is_file():
        pytest.skip("needs /proc/self/mem")
    error = fails(capsys, ["evaluate", unreadable])
    assert error == f"latentgnn: {unreadable}: invalid argument\n"
