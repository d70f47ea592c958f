"""``explain`` and ``diagnose``: places are those of the input, and what is said of a block is so."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import latentgnn
from latentgnn.cli import main
from latentgnn.files.outputs import LIST
from latentgnn.tasks.image_explaining import Frame
from latentgnn.tasks.pointcloud.crop import take_crop
from latentgnn.training.checkpoints import read_checkpoint, write_checkpoint
from tests.tasks.made_runs import DETECTOR, NETWORK, write_detector, write_images, write_network, write_scans

CATEGORIES = [[3, "red"], [7, "blue"]]


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_images(tmp_path_factory.mktemp("images") / "data", 3, CATEGORIES)


@pytest.fixture(scope="module")
def scans(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_scans(tmp_path_factory.mktemp("scans") / "data", "ab")


@pytest.fixture(scope="module")
def detector(tmp_path_factory: pytest.TempPathFactory, images: Path) -> Path:
    values = {
        **DETECTOR,
        "model": {**DETECTOR["model"], "blocks": {"C3": 4, "C5": [3, 2]}},
        "data": {"root": str(images), "format": "coco", "categories": CATEGORIES},
    }
    return write_detector(tmp_path_factory.mktemp("runs") / "detector", values)


@pytest.fixture(scope="module")
def network(tmp_path_factory: pytest.TempPathFactory, scans: Path) -> Path:
    values = {**NETWORK, "data": {**NETWORK["data"], "root": str(scans), "crop": "column", "crop_size": 5.0}}
    return write_network(tmp_path_factory.mktemp("runs") / "network", values)


def set_gammas(run: Path, *gammas: float) -> None:
    """Give the blocks of a run these gammas, in the order of their names."""
    path = run / "checkpoints" / "best.ckpt"
    checkpoint = read_checkpoint(path)
    names = sorted(name for name in checkpoint.weights if name.endswith("latentgnn.gamma"))
    for name, gamma in zip(names, gammas, strict=True):
        checkpoint.weights[name].fill_(gamma)
    about = {"step": checkpoint.step, "config": checkpoint.config, "course": checkpoint.course, "data": {}}
    write_checkpoint(path, {"latentgnn": about, "state_dict": checkpoint.weights, "optimizer": {}})


def test_pixels_and_nodes_belong_together() -> None:
    # An image of 200 x 100 pixels, resized to half of it, on a batch of 128 x 64: a map of stride 8 has 16 x 8 nodes,
    # of which the image covers 100 / 8 = 12.5 columns and 50 / 8 = 6.25 rows.
    frame = Frame(width=200, height=100, resized=(50, 100), padded=(64, 128))
    assert frame.inside((8, 16)) == (7, 13)
    assert frame.node((0, 0), (8, 16)) == (0, 0)
    assert frame.node((199, 99), (8, 16)) == (6, 12)
    # Half of 50 is 25, in the fourth row of 8 pixels; half of 40 is 20, in the third column.
    assert frame.node((40, 50), (8, 16)) == (3, 2)
    row = torch.zeros(8, 16)
    row[3, 2] = 1.0
    shown = frame.over_image(row, (100, 200))
    y, x = np.unravel_index(shown.argmax(), shown.shape)
    # The node's middle, pixel 28 of 50 rows and 20 of 100 columns, twice as far in the image.
    assert abs(y - 56) <= 2
    assert abs(x - 40) <= 2


def test_the_points_of_a_level_are_those_of_the_scan(network: Path, scans: Path) -> None:
    trained = latentgnn.load_run(network)
    scan = trained.transform.scan(scans / "val" / "a.laz")
    crop = take_crop(trained, scan.points, scan.features, [(770_002.0, 6_277_002.0)])
    assert crop.points[:, 0].max() < 770_006
    coarse = crop.at_level(1)
    apart = coarse - crop.hierarchy[1].coordinates.numpy()
    np.testing.assert_allclose(apart, np.broadcast_to(apart[0], apart.shape), atol=1e-3)
    values = np.arange(len(coarse), dtype=np.float32)
    nearest = ((crop.points[:, None] - coarse[None]) ** 2).sum(axis=2).argmin(axis=1)
    np.testing.assert_array_equal(crop.to_finest(values, 1), nearest)


def test_a_page_and_pictures_of_images(
    detector: Path, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "damaged.png").write_bytes(b"no image")
    out = tmp_path / "out"
    inputs = [str(images / "val" / "0.png"), str(tmp_path / "damaged.png")]
    code = main(["explain", str(detector), *inputs[:1], "--node", "60,40", "--node", "3,3", "--out", str(out)])
    told = capsys.readouterr()
    assert code == 0, told.err
    names = sorted(path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file())
    blocks = ["backbone.body.layer2.latentgnn", "backbone.body.layer4.latentgnn"]
    assert names == sorted([LIST, "explain.html", *(f"pictures/0-{block}.png" for block in blocks)])
    for block in blocks:
        with Image.open(out / "pictures" / f"0-{block}.png") as picture:
            assert picture.width > 1000
    page = (out / "explain.html").read_text()
    assert page.count('src="data:image/') == 2
    # Pictures with small text have the page's width.
    assert page.count('<div class="card wide">') == 2
    assert " · 1 image<" in page
    assert not re.search(r"""(src|href)=(?!"data:)|url\(|<script""", page)
    assert "Nodes at column, row: 1: 60, 40, 2: 3, 3" in page
    assert f"latentgnn explain {detector}" in page
    # The same again is refused, and replaced if asked; one block alone.
    again = ["explain", str(detector), *inputs[:1], "--out", str(out)]
    assert main(again) == 1
    assert "holds the results of an earlier command" in capsys.readouterr().err
    assert main([*again, "--overwrite", "--block", "layer4"]) == 0
    assert [path.name for path in (out / "pictures").iterdir()] == [f"0-{blocks[1]}.png"]


def test_a_page_and_pictures_of_scans(network: Path, scans: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert main(["explain", str(network), str(scans / "val"), "--out", str(out)]) == 0
    assert {path.name for path in (out / "pictures").iterdir()} == {
        "a-encoder.1.latentgnn.png",
        "b-encoder.1.latentgnn.png",
    }
    assert (out / "explain.html").read_text().count('src="data:image/') == 2


def test_errors_are_one_line(
    detector: Path, network: Path, images: Path, scans: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    values = {**NETWORK, "model": {**NETWORK["model"], "blocks": {}}}
    bare = write_network(tmp_path / "bare", values)
    image, scan = str(images / "val" / "0.png"), str(scans / "val" / "a.laz")
    (tmp_path / "bad.png").write_bytes(b"no image")
    for arguments, code, message in (
        (["explain", str(bare), scan], 1, "has no LatentGNN blocks (model.blocks is empty)"),
        (["diagnose", str(bare)], 1, "has no LatentGNN blocks (model.blocks is empty)"),
        (["explain", str(detector), str(tmp_path / "bad.png")], 1, "bad.png"),
        (
            ["explain", str(detector), image, "--node", "64,3"],
            1,
            "the node 64,3 is outside the image, which is 64 x 48",
        ),
        (
            ["explain", str(network), scan, "--node", "1,2"],
            1,
            "the node 1,2 is outside the scan, which goes from 770000",
        ),
        (["explain", str(detector), image, "--node", "here"], 2, "expected x,y such as 120,80; got 'here'"),
        (["explain", str(detector), image, "--block", "C9"], 1, "has no block 'C9'; it has backbone.body.layer2"),
        (["explain", str(detector), image, *["--node", "1,1"] * 7], 2, "at most 6 nodes"),
        (["explain", str(tmp_path / "none"), image], 1, "there is no run folder or checkpoint at"),
        (["explain", str(detector), str(tmp_path / "none.png")], 1, "no such file or folder"),
        (["diagnose", str(detector), "--samples", "0"], 2, "--samples: expected 1 or more; got 0"),
    ):
        place = ["--out", str(tmp_path / "out")] if arguments[0] == "explain" else []
        assert main([*arguments, *place]) == code
        told = capsys.readouterr().err
        assert message in told
        assert "Traceback" not in told
        assert not (tmp_path / "out").exists()


def test_diagnose_says_which_block_does_nothing(detector: Path, capsys: pytest.CaptureFixture[str]) -> None:
    set_gammas(detector, 0.0, 2.0)
    assert main(["diagnose", str(detector), "--json"]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    asleep, awake = found["blocks"]
    assert asleep["statistics"]["samples"] == awake["statistics"]["samples"] == 3
    assert [asleep["statistics"]["gamma"], awake["statistics"]["gamma"]] == [0.0, 2.0]
    assert asleep["statistics"]["change"]["most"] == 0.0
    assert asleep["output_change"] == 0.0
    assert asleep["findings"][0]["name"] == "gamma_zero"
    assert awake["statistics"]["change"]["least"] > 0.01
    assert awake["output_change"] > 0
    assert awake["findings"][0]["name"] != "gamma_zero"
    assert 0 < asleep["time_share"] + awake["time_share"] < 1
    assert main(["diagnose", str(detector), "--samples", "1"]) == 0
    told = capsys.readouterr().out
    assert "gamma is 0: the block passes its input on unchanged" in told
    assert "layer4" in told


def test_diagnose_of_scans(network: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["diagnose", str(network), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    [block] = found["blocks"]
    assert block["name"] == "encoder.1.latentgnn"
    assert block["statistics"]["samples"] == 2


@pytest.mark.parametrize("command", ["diagnose", "explore"])
def test_settings_that_are_not_used_are_not_listed(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([command, "--help"]) == 0
    shown = capsys.readouterr().out
    listed = set(re.findall(r"^  --([a-z_.]+)  ", shown, re.MULTILINE))
    assert {name for name in listed if name.startswith("training.")} == {"training.accelerator"}
    # Of a detector, a segmenter of images and a point network.
    assert {"data.root", "data.val_images", "data.on_fault", "data.layout", "data.scale", "data.crop_size"} <= listed
    assert not {"model.blocks", "model.weights", "data.augment.crop", "loss.lovasz"} & listed


def test_diagnose_looks_at_another_place_of_the_set(
    detector: Path, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    elsewhere = tmp_path / "moved"
    elsewhere.symlink_to(images)
    command = ["diagnose", str(detector), "--samples", "1"]
    assert main([*command, "--data.root", str(elsewhere)]) == 0
    assert main([*command, "--data.root", str(tmp_path / "none")]) == 1
    assert f"data.root: there is no folder {tmp_path / 'none'}" in capsys.readouterr().err
    assert main([*command, "--training.steps", "3"]) == 2
    assert "--training.steps is a setting that this command does not use: leave it out" in capsys.readouterr().err
