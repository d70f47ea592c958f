"""Runs of detection that were killed while their data were made, and runs whose data changed before they went on."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from latentgnn.cli import main
from latentgnn.tasks.detection.task import DetectionTask
from tests.tasks.tiny_runs import DETECTION, stop, weights_of, write_recipe, write_split

KILLED = """
import os, signal, sys
from pathlib import Path
from latentgnn.files import writing
from latentgnn.cli import main

name, *argv = sys.argv[1:]
rename = writing._rename

def killed(temporary, path):
    if Path(path).name == name:
        os.kill(os.getpid(), signal.SIGKILL)
    rename(temporary, path)

writing._rename = killed
main(argv)
"""
EMBEDDED = ["--data.embedded_train", "4", "--data.embedded_val", "2", "--data.embedded_size", "64"]


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_recipe(tmp_path_factory.mktemp("recipe"), DETECTION)


@pytest.mark.parametrize(
    ("name", "resumes"),
    [
        ("instances_val.json", True),
        ("instances_val.json", False),
        # Nothing tells yet what run it was to be.
        ("config.yaml", False),
    ],
)
def test_killed_before_the_first_step(
    recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, resumes: bool
) -> None:
    folder = tmp_path / "run"
    argv = ["train", "--config", str(recipe), "--training.steps", "1", *EMBEDDED, "--out", str(folder)]
    done = subprocess.run([sys.executable, "-c", KILLED, name, *argv], capture_output=True, text=True)
    assert done.returncode == -9, done.stderr
    assert list(folder.rglob("*.tmp"))
    assert not (folder / "data").exists()
    if name == "config.yaml":
        assert main(["train", "--resume", str(folder)]) == 1
        assert "it has no config.yaml" in capsys.readouterr().err
    assert main(["train", "--resume", str(folder)] if resumes else argv) == 0
    assert list(folder.rglob("*.tmp")) == []
    assert json.loads((folder / "metrics.json").read_text())["step"] == 1
    # Categories are known once the data are: what predict needs is in the configuration.
    assert "categories" in (folder / "config.yaml").read_text()


def edit_annotations(edit: Callable[[dict[str, Any]], None]) -> Callable[[Path], None]:
    def change(root: Path) -> None:
        path = root / "annotations" / "instances_train.json"
        content = json.loads(path.read_text())
        edit(content)
        path.write_text(json.dumps(content))

    return change


def repaint(root: Path) -> None:
    """Another picture in a file of the same size."""
    path = root / "train" / "train1.png"
    data = path.read_bytes()
    path.write_bytes((root / "train" / "train2.png").read_bytes()[: len(data)].ljust(len(data), b"\0"))


def move_box(content: dict[str, Any]) -> None:
    content["annotations"][0]["bbox"][0] += 1


def remove_image(content: dict[str, Any]) -> None:
    image = content["images"].pop(0)
    content["annotations"] = [each for each in content["annotations"] if each["image_id"] != image["id"]]


def renumber(content: dict[str, Any]) -> None:
    content["images"][3]["id"] = 99
    for annotation in content["annotations"]:
        if annotation["image_id"] == 13:
            annotation["image_id"] = 99


@pytest.fixture(scope="module")
def stopped(recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A run that did one of its two steps, and its data."""
    root = tmp_path_factory.mktemp("changed") / "data"
    write_split(root, "train", 5)
    write_split(root, "val", 3)
    folder = root.parent / "run"
    with pytest.MonkeyPatch.context() as patch:
        stop(DetectionTask, ["train", "--config", str(recipe), "--data.root", str(root)], folder, patch)
    return folder, root


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (repaint, "training set: 1 with files that were written since (train1.png)"),
        (
            lambda root: os.utime(root / "val" / "val0.png"),
            "validation set: 1 with files that were written since",
        ),
        (edit_annotations(move_box), "training set: 1 with other content (train0.png)"),
        (edit_annotations(remove_image), "training set: 1 removed (train0.png)"),
        (edit_annotations(renumber), "training set: 1 with other content (train3.png)"),
        (edit_annotations(lambda content: content["images"].reverse()), "training set: the order is another"),
    ],
)
def test_changed_data_are_told(
    stopped: tuple[Path, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    change: Callable[[Path], None],
    told: str,
) -> None:
    folder, root = stopped
    kept = Path(shutil.copytree(root, tmp_path / "kept"))
    try:
        change(root)
        assert main(["train", "--resume", str(folder)]) == 1
        error = capsys.readouterr().err
        assert told in error
        assert "--training.on_changed_data accept" in error
    finally:
        # With their times, which count.
        shutil.rmtree(root)
        shutil.copytree(kept, root)


def test_the_data_as_they_were_in_another_place_and_changed_ones_that_are_accepted(
    stopped: tuple[Path, Path], recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, root = stopped
    moved = Path(shutil.copytree(root, tmp_path / "moved", copy_function=shutil.copyfile))
    copies = [Path(shutil.copytree(folder, tmp_path / name)) for name in ("there", "accepted")]
    assert main(["train", "--resume", str(copies[0]), "--data.root", str(moved)]) == 0
    whole = tmp_path / "whole"
    assert main(["train", "--config", str(recipe), "--data.root", str(root), "--out", str(whole)]) == 0
    resumed, uninterrupted = weights_of(copies[0]), weights_of(whole)
    assert resumed.keys() == uninterrupted.keys()
    assert all((value == uninterrupted[name]).all() for name, value in resumed.items())

    edit_annotations(move_box)(moved)
    argv = ["train", "--resume", str(copies[1]), "--data.root", str(moved)]
    assert main(argv) == 1
    assert main([*argv, "--training.on_changed_data", "accept"]) == 0
    assert "1 with other content (train0.png)); they are accepted" in capsys.readouterr().out
