"""Validation splits that are drawn, and kept by runs."""

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from latentgnn.cli import main
from latentgnn.errors import UserError
from latentgnn.tasks.detection.config import DataConfig
from latentgnn.tasks.detection.sets import DetectionSet
from latentgnn.tasks.detection.sound_sets import load
from latentgnn.tasks.detection.splits import draw_split, keep_split, kept_split
from tests.tasks.detection.tiny_sets import WRITERS, write_coco, write_voc, write_yolo

NAMES = [f"clips/v{video:02}_{frame}.png" for video in range(20) for frame in range(5)]


def test_a_part_of_the_images_is_drawn():
    val = draw_split(NAMES, fraction=0.2, seed=3)
    assert len(val) == 20
    assert val < set(NAMES)
    assert draw_split(reversed(NAMES), fraction=0.2, seed=3) == val
    assert draw_split(NAMES, fraction=0.2, seed=4) != val


def test_what_was_drawn_stays_when_the_set_grows():
    val = draw_split(NAMES, fraction=0.2, seed=3)
    grown = draw_split([*NAMES, "clips/new.png"], fraction=0.2, seed=3)
    assert len(val ^ grown) <= 2


@pytest.mark.parametrize("pattern", [r"v\d+", r"(v\d+)_\d", r"(?:x|(v\d+))_"])
def test_groups_stay_together(pattern):
    val = draw_split(NAMES, fraction=0.25, seed=0, groups=pattern)
    assert len(val) == 25
    videos = {re.search(r"v\d+", name)[0] for name in val}
    assert len(videos) == 5
    assert val == {name for name in NAMES if re.search(r"v\d+", name)[0] in videos}


def test_groups_of_many_images_come_as_near_as_they_can():
    names = [f"a{n}" for n in range(90)] + [f"b{n}" for n in range(10)]
    assert {name[0] for name in draw_split(names, fraction=0.001, seed=0, groups="^.")} in ({"a"}, {"b"})
    assert 0 < len(draw_split(names, fraction=0.999, seed=0, groups="^.")) < 100


def test_what_cannot_be_drawn():
    with pytest.raises(UserError, match=r"'x\+' is not found in the image's name 'clips/v00_0.png'"):
        draw_split(NAMES, fraction=0.2, seed=0, groups="x+")
    with pytest.raises(UserError, match="all images are of one group, 'clips'"):
        draw_split(NAMES, fraction=0.2, seed=0, groups="clips")
    with pytest.raises(UserError, match="there are no 2 images"):
        draw_split(["a"], fraction=0.5, seed=0)


@pytest.mark.parametrize("format", [name for name in WRITERS if name != "yolo"])
def test_every_image_is_on_one_side(tmp_path, format):
    WRITERS[format](tmp_path)
    opened = DetectionSet(DataConfig(root=str(tmp_path), val_fraction=0.5))
    train, val = opened.reading("train"), opened.reading("val")
    assert len(train.dataset["images"]) == len(val.dataset["images"]) == 1
    for reading in (train, val):
        ids = {image["id"] for image in reading.dataset["images"]}
        assert {record["image_id"] for record in reading.dataset["annotations"]} == ids
    assert len(train.dataset["annotations"]) + len(val.dataset["annotations"]) == 3


def test_faults_of_both_sides_are_told_once(tmp_path):
    write_voc(tmp_path)
    (tmp_path / "Annotations" / "b.xml").write_text("")
    (tmp_path / "Annotations" / "a.xml").write_text((tmp_path / "Annotations" / "a.xml").read_text() * 2)
    whole = DetectionSet(DataConfig(root=str(tmp_path))).whole()
    parts = [whole.part({"JPEGImages/a.png"}, inside=inside) for inside in (True, False)]
    assert [len(part.faults) for part in parts] == [0, len(whole.faults)]
    assert [part.lost["images"] for part in parts] == [0, whole.lost["images"]]


@pytest.mark.parametrize("text", ["{", "[]", '{"images": 3, "annotations": [], "categories": []}'])
def test_what_cannot_be_read_is_told_and_not_split(tmp_path, text):
    (tmp_path / "annotations.json").write_text(text)
    opened = DetectionSet(DataConfig(root=str(tmp_path), val_fraction=0.5))
    with pytest.raises(UserError, match=r"malformed JSON|expected a JSON object|expected a list"):
        load(opened.reading("val"))


def test_training_images_need_not_be_there_to_validate(tmp_path):
    (tmp_path / "annotations").mkdir()
    write_coco(tmp_path)
    for split in ("train", "val"):
        path = tmp_path / "annotations" / f"instances_{split}.json"
        path.write_text((tmp_path / "annotations.json").read_text())
    (tmp_path / "images").rename(tmp_path / "val")
    opened = DetectionSet(DataConfig(root=str(tmp_path)))
    assert len(load(opened.reading("val"))) == 2
    with pytest.raises(UserError, match="no image folder"):
        opened.reading("train")


def test_a_set_with_a_split_of_its_own(tmp_path):
    write_yolo(tmp_path)
    with pytest.raises(UserError, match=r"has a val split of its own: leave data.val_fraction out"):
        DetectionSet(DataConfig(root=str(tmp_path), val_fraction=0.5)).reading("train")


def test_a_set_without_one(tmp_path):
    write_voc(tmp_path)
    with pytest.raises(UserError, match=r"is not split: .*--data.val_fraction 0.2"):
        DetectionSet(DataConfig(root=str(tmp_path))).reading("train")


def test_a_run_keeps_its_split(tmp_path):
    config = DataConfig(root="x", val_fraction=0.5, val_groups=r"^.")
    assert kept_split(tmp_path, config) is None
    keep_split(tmp_path, config, train=["a"], val=["b"])
    assert kept_split(tmp_path, config) == {"b"}
    # Another draw is asked for.
    assert kept_split(tmp_path, replace(config, val_seed=1)) is None
    (tmp_path / "split.json").write_text(json.dumps({"val": [1]}))
    with pytest.raises(UserError, match="is damaged"):
        kept_split(tmp_path, config)


def test_new_images_of_a_run_go_to_training(tmp_path):
    root, run = tmp_path / "set", tmp_path / "run"
    root.mkdir()
    write_voc(root)
    config = DataConfig(root=str(root), val_fraction=0.5)
    keep_split(run, config, train=["JPEGImages/gone.png"], val=["JPEGImages/b.png"])
    opened = DetectionSet(config, run)
    assert [image["file_name"] for image in opened.reading("train").dataset["images"]] == ["JPEGImages/a.png"]
    keep_split(run, config, train=["JPEGImages/a.png"], val=["JPEGImages/gone.png"])
    with pytest.raises(UserError, match="none of the validation images"):
        DetectionSet(config, run).reading("train")


TINY = """task: detection
model:
  detector: faster_rcnn
  backbone: resnet18
  blocks: {}
  fpn_channels: 8
  min_size: [32]
  max_size: 64
  anchor_sizes: [4, 8, 16, 32, 64]
  box_head_channels: 8
training: {steps: 2, batch_size: 1, workers: 0, accelerator: cpu, checkpoint_every: 1}
evaluation: {sample_pictures: 1}
"""


@pytest.fixture
def run(tmp_path):
    """A finished run that has drawn its split."""
    root, run = tmp_path / "set", tmp_path / "run"
    root.mkdir()
    write_voc(root)
    (tmp_path / "tiny.yaml").write_text(TINY)
    argv = ["train", "--config", str(tmp_path / "tiny.yaml"), "--data.root", str(root), "--data.val_fraction", "0.5"]
    assert main([*argv, "--out", str(run)]) == 0
    return run


def test_a_resumed_run_takes_its_split_again(run, capsys):
    split = json.loads((run / "split.json").read_text())
    assert {*split["train"], *split["val"]} == {"JPEGImages/a.png", "JPEGImages/b.png"}
    assert (split["val_fraction"], split["val_seed"], split["val_groups"]) == (0.5, 0, None)

    # The other way round: the run, not the draw, says which images are which.
    swapped = {**split, "train": split["val"], "val": split["train"]}
    (run / "split.json").write_text(json.dumps(swapped))
    capsys.readouterr()
    assert main(["train", "--resume", str(run)]) == 1
    assert "the data are not those that the run was stopped with" in capsys.readouterr().err
    (run / "split.json").write_text(json.dumps(split))
    assert main(["train", "--resume", str(run)]) == 0
    assert main(["evaluate", str(run)]) == 0
    records = json.loads((run / "evaluation" / "metrics.json").read_text())
    assert "metrics" in records


@pytest.mark.parametrize("override", [("val_seed", "5", "0"), ("val_fraction", "null", "0.5")])
def test_a_refused_resume_leaves_the_split_as_it_was(run, capsys, override):
    name, text, was = override
    before = (run / "split.json").read_bytes()
    assert main(["train", "--resume", str(run), f"--data.{name}", text]) == 1
    assert f"data.{name} is {text}, but the run has drawn its split with {was} ({run / 'split.json'}): " in (
        capsys.readouterr().err
    )
    # Also before its first step, when the split is all that it has.
    shutil.rmtree(run / "checkpoints")
    assert main(["train", "--resume", str(run), f"--data.{name}", text]) == 1
    assert (run / "split.json").read_bytes() == before


@pytest.mark.parametrize(("name", "text"), [("val_seed", "5"), ("val_fraction", "0.4"), ("val_groups", "^.")])
def test_a_run_is_not_evaluated_on_another_split(run, capsys, name, text):
    assert main(["evaluate", str(run), f"--data.{name}", text]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"latentgnn: --data.{name} {text}: the model in {run} is trained with ")
    assert "images that it was trained on would be scored; leave it out" in error
    assert not (run / "evaluation").exists()


def test_a_drawn_run_is_evaluated_on_a_set_with_a_split_of_its_own(run, tmp_path):
    root, out = tmp_path / "other", tmp_path / "out"
    shutil.copytree(tmp_path / "set", root)
    for split, name in (("train", "a"), ("val", "b")):
        (root / split).mkdir()
        (root / "JPEGImages" / f"{name}.png").rename(root / split / f"{name}.png")
        (root / "Annotations" / f"{name}.xml").rename(root / split / f"{name}.xml")
    argv = ["evaluate", str(run), "--out", str(out), "--data.root", str(root)]
    assert main(argv) == 1
    assert main([*argv, "--data.val_fraction", "null"]) == 0


def test_a_checkpoint_in_a_run_is_evaluated_on_the_split_of_the_run(run, tmp_path, capsys, monkeypatch):
    split = json.loads((run / "split.json").read_text())
    (run / "split.json").write_text(json.dumps({**split, "train": split["val"], "val": split["train"]}))
    monkeypatch.chdir(run / "checkpoints")
    assert main(["evaluate", "last.ckpt", "--out", str(tmp_path / "out")]) == 0
    [picture] = (tmp_path / "out" / "pictures").rglob("*.png")
    assert Path(split["train"][0]).stem in picture.name

    alone = tmp_path / "alone.ckpt"
    shutil.copy("last.ckpt", alone)
    capsys.readouterr()
    assert main(["evaluate", str(alone), "--out", str(tmp_path / "other")]) == 1
    assert f"{alone} does not lie in a run's folder with its split.json: give the run's" in capsys.readouterr().err


def test_boxes_without_masks_stop_a_mask_rcnn_before_training(tmp_path, capsys):
    root = tmp_path / "set"
    root.mkdir()
    write_yolo(root)
    (tmp_path / "tiny.yaml").write_text(TINY.replace("faster_rcnn", "mask_rcnn"))
    argv = ["train", "--config", str(tmp_path / "tiny.yaml"), "--data.root", str(root), "--out", str(tmp_path / "run")]
    assert main(argv) == 1
    message = capsys.readouterr().err
    assert "boxes and no masks, which a Mask R-CNN learns from" in message
    assert "--model.detector faster_rcnn or retinanet" in message
