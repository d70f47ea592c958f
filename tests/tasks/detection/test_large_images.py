import json
import os
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image, ImageDraw

from latentgnn.cli import main
from tests.tasks.tiny_runs import DETECTION, train, write_recipe, write_split

PROGRAM = "import sys; from latentgnn.cli import main; sys.exit(main())"


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    root = tmp_path_factory.mktemp("large") / "data"
    write_split(root, "train", 4)
    write_split(root, "val", 3)
    return root


@pytest.fixture(scope="module")
def run(data):
    """A run of two steps on crops, validated by tiles."""
    settings = ["--data.crop.size", "40", "--evaluation.tiles", "40", "--evaluation.tile_overlap", "0.3"]
    return train(write_recipe(data.parent, DETECTION), data, data.parent / "run", *settings)


def predictions(folder):
    return json.loads((folder / "predictions.json").read_text())


def predict(run, out, *arguments):
    command = ["predict", str(run), *map(str, arguments), "--out", str(out), "--score-threshold", "0"]
    assert main([*command, "--model.detections_per_image", "5"]) == 0
    return predictions(out)


def test_validation_evaluation_and_prediction_look_at_images_alike(run, data, tmp_path, capsys):
    figures = json.loads((run / "metrics.json").read_text())
    assert main(["evaluate", str(run), "--out", str(tmp_path / "same")]) == 0
    assert json.loads((tmp_path / "same" / "metrics.json").read_text())["metrics"] == figures["metrics"]
    assert (
        main(["predict", str(run), str(data / "val"), "--out", str(tmp_path / "found"), "--score-threshold", "0"]) == 0
    )
    assert "memory: " in capsys.readouterr().out

    def without_names(records):
        return [{k: v for k, v in r.items() if k not in ("file_name", "image_id")} for r in records]

    assert without_names(predictions(tmp_path / "found")) == without_names(predictions(tmp_path / "same"))
    # Two columns and two rows of tiles, ten detections in each at most: more than of the whole image.
    assert max(np.bincount([record["image_id"] for record in predictions(tmp_path / "found")])) > 10
    assert main(["evaluate", str(run), "--out", str(tmp_path / "whole"), "--evaluation.tiles", "null"]) == 0
    assert len(predictions(tmp_path / "whole")) <= 30


def test_tiles_as_large_as_the_image_find_what_the_whole_image_gives(run, data, tmp_path):
    whole = predict(run, tmp_path / "whole", data / "val" / "val0.png", "--evaluation.tiles", "null")
    tiled = predict(run, tmp_path / "tiled", data / "val" / "val0.png", "--tiles", "64", "--overlap", "0.5")
    assert len(whole) == 5
    assert tiled == whole


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--tiles", "8"], "evaluation.tiles"),
        (["--tiles", "many"], "evaluation.tiles"),
        (["--overlap", "1"], "a fraction from 0 to 0.9"),
    ],
)
def test_tiles_that_make_no_sense_are_refused(run, data, tmp_path, capsys, arguments, message):
    assert main(["predict", str(run), str(data / "val"), "--out", str(tmp_path / "out"), *arguments]) == 2
    assert message in capsys.readouterr().err


def test_a_damaged_image_does_not_stop_the_others(run, data, tmp_path, capsys):
    shutil.copytree(data / "val", tmp_path / "in")
    (tmp_path / "in" / "val0.png").write_bytes(b"no image")
    assert (
        main(["predict", str(run), str(tmp_path / "in"), "--out", str(tmp_path / "out"), "--score-threshold", "0"]) == 1
    )
    assert "1 of 3 images failed" in capsys.readouterr().err
    assert {record["image_id"] for record in predictions(tmp_path / "out")} == {1, 2}


@pytest.mark.parametrize("side", [1900, pytest.param(10_000, marks=pytest.mark.slow)])
def test_a_large_image_takes_the_memory_that_is_told_before(run, tmp_path, side):
    """A process of its own: what it says first, and the most it held at the end."""
    path = tmp_path / "large.png"
    picture = Image.new("RGB", (side, side), (20, 30, 40))
    draw = ImageDraw.Draw(picture)
    for place in range(100, side - 200, 700):
        draw.rectangle((place, place, place + 300, place + 200), fill=(250, 40, 40))
    picture.save(path, compress_level=1)
    del picture, draw
    command = [sys.executable, "-c", PROGRAM, "predict", str(run), str(path), "--out", str(tmp_path / "out")]
    options = ["--tiles", "1024", "--overlap", "0.1", "--score-threshold", "0"]
    process = subprocess.Popen([*command, *options], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    output = process.stdout.read()
    process.stdout.close()
    _, status, used = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    assert process.returncode == 0
    match = re.search(r"memory: ([\d.]+) GB at most, of which the largest image ([\d.]+) GB", output)
    assert match is not None
    told, most = float(match[1]) * 1e9, used.ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    assert 0.5 * told < most < told
    assert len(predictions(tmp_path / "out")) > 15
    with Image.open(tmp_path / "out" / "pictures" / "large.png") as drawn:
        assert drawn.size == (min(side, 4096),) * 2
