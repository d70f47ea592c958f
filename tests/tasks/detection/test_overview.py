"""What check-data says of a set besides its faults."""

import json

import pytest
import torch
from PIL import Image
from torchvision.models.detection.transform import GeneralizedRCNNTransform

from latentgnn.cli import main
from latentgnn.tasks.detection.config import DataConfig, DetectionConfig, EvaluationConfig, ModelConfig
from latentgnn.tasks.detection.fit import misfits
from latentgnn.tasks.detection.sets import DetectionSet
from latentgnn.tasks.detection.sound_sets import load
from latentgnn.tasks.detection.summary import scale, summarize
from tests.tasks.detection.tiny_sets import WRITERS, voc_xml, write_voc, write_yolo

# Images of 20 x 10 are doubled.
DOUBLED = ModelConfig(min_size=(20,), max_size=64)


def of(root, model=DOUBLED, **settings):
    return summarize(load(DetectionSet(DataConfig(root=str(root), **settings)).whole()), model)


@pytest.mark.parametrize("size", [(640, 480), (480, 640), (2000, 300), (33, 1000)])
def test_images_are_resized_as_torchvision_does(size):
    config = ModelConfig(min_size=(600, 800), max_size=1333)
    transform = GeneralizedRCNNTransform(list(config.min_size), config.max_size, [0.0] * 3, [1.0] * 3).eval()
    images, _ = transform([torch.zeros(3, size[1], size[0])])
    height, width = images.image_sizes[0]
    assert (round(size[0] * scale(*size, config)), round(size[1] * scale(*size, config))) == pytest.approx(
        (width, height), abs=1
    )


def test_the_figures_of_a_set(tmp_path):
    """A cat of 6 x 6 on both images, a dog of 4 x 10 on one."""
    WRITERS["coco"](tmp_path)
    found = of(tmp_path).to_json()
    assert found["images"] == 2
    assert found["images_without_objects"] == 0
    assert found["sizes"] == [{"width": 20, "height": 10, "images": 2}]
    assert (found["objects"], found["crowds"], found["has_masks"]) == (3, 0, False)
    # 1 and 2 objects; percentiles lie on the line between.
    assert found["objects_an_image"] == pytest.approx([1, 1.05, 1.5, 1.95, 2])
    # Twice 6, 6 and sqrt(40).
    assert found["sides_at_recipe_scale"] == pytest.approx([12, 12, 12, 12 + 0.9 * (2 * 40**0.5 - 12), 2 * 40**0.5])
    assert found["shares_at_recipe_scale"] == {"small": 1.0, "medium": 0.0, "large": 0.0}
    assert found["height_over_width"] == pytest.approx([1, 1, 1, 2.35, 2.5])
    assert found["categories"] == [
        {"id": 5, "name": "dog", "objects": 1, "images": 1},
        {"id": 2, "name": "cat", "objects": 2, "images": 2},
    ]
    text = of(tmp_path).text()
    assert "images: 2, 0 without objects; width x height 20 x 10 (2)" in text
    assert "dog        1  33.3%        1" in text


def test_objects_of_crops_and_tiles_are_as_large_as_the_network_sees_them(tmp_path):
    """A window of 5 x 5 becomes 20 x 20, and a cat's side of 6 becomes 24."""
    WRITERS["coco"](tmp_path)
    annotations = load(DetectionSet(DataConfig(root=str(tmp_path))).whole())
    found = summarize(annotations, DOUBLED, window=5)
    assert sorted(found.sides) == pytest.approx([24, 24, 4 * 40**0.5])
    assert list(summarize(annotations, DOUBLED, window=20).sides) == list(summarize(annotations, DOUBLED).sides)


def test_masks_and_images_without_objects(tmp_path):
    WRITERS["voc_masks"](tmp_path)
    assert of(tmp_path).has_masks
    (tmp_path / "x").mkdir()
    write_voc(tmp_path / "x")
    (tmp_path / "x" / "Annotations" / "b.xml").write_text(voc_xml("b.png", ("cat", (3, 4, 8, 9), 1)))
    found = of(tmp_path / "x")
    assert (found.objects, found.crowds, found.without_objects) == (2, 1, 1)


def fits(root, model, detections=(1, 10, 100), tiles=None):
    config = DetectionConfig(model=model, evaluation=EvaluationConfig(max_detections=detections, tiles=tiles))
    opened = DetectionSet(DataConfig(root=str(root)))
    parts = {split: opened.reading(split) for split in ("train", "val")} if opened.is_split else {"all": opened.whole()}
    return misfits(config, {split: summarize(load(reading), model) for split, reading in parts.items()})


def model(**changes):
    sizes = {"detector": "faster_rcnn", "min_size": (20,), "max_size": 64, "anchor_sizes": (4, 8, 16, 32, 64)}
    return ModelConfig(**{**sizes, **changes})


def test_a_recipe_that_fits(tmp_path):
    write_yolo(tmp_path)
    assert fits(tmp_path, model()) == ["val: 1 categories have no example here, and have one in train: dog"]


MISFITS = {
    "masks": ({"detector": "mask_rcnn"}, "boxes and no masks, which a Mask R-CNN learns from"),
    "small": (
        {"anchor_sizes": (16, 32, 64, 128, 256)},
        "train: 2 of 2 objects are smaller than the smallest anchor, 16",
    ),
    "large": ({"anchor_sizes": (1, 2, 3, 4, 5)}, "train: 2 of 2 objects are more than twice as large as the largest"),
    "tall": ({"anchor_ratios": (0.5, 1.0)}, "train: 1 of 2 objects are much taller or wider than any anchor"),
    "many": ({"detections_per_image": 1}, "train: 1 images have more than 1 objects, 2 at most: raise model.detec"),
}


@pytest.mark.parametrize("name", MISFITS)
def test_what_does_not_fit(tmp_path, name):
    changes, message = MISFITS[name]
    write_yolo(tmp_path)
    assert any(message in line for line in fits(tmp_path, model(**changes)))


def test_by_tiles_the_detections_of_a_whole_image_are_not_limited(tmp_path):
    write_yolo(tmp_path)
    assert not any("detections" in line for line in fits(tmp_path, model(detections_per_image=1), tiles=64))


def test_no_val_split_is_told(tmp_path):
    write_voc(tmp_path)
    assert "there is no val split" in fits(tmp_path, model())[-1]


def test_the_command_prints_writes_and_speaks_to_programs(tmp_path, capsys):
    root, out = tmp_path / "set", tmp_path / "found"
    root.mkdir()
    write_yolo(root)
    argv = ["check-data", "--data.root", str(root), "--config", "nuclei_small"]
    assert main([*argv, "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    assert f"{root / 'data.yaml'}: images 1, objects 2, crowds 0, categories 2, faults 0" in printed
    assert "train (yolo):" in printed
    assert "what does not fit the recipe nuclei_small:" in printed
    assert sorted(path.name for path in out.iterdir()) == [
        ".latentgnn-results",
        "samples_train.png",
        "samples_val.png",
        "summary.json",
    ]
    with Image.open(out / "samples_train.png") as sheet:
        assert sheet.width > 480
    assert main([*argv, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told == json.loads((out / "summary.json").read_text())
    assert (told["faultless"], told["format"], told["recipe"]) == (True, "yolo", "nuclei_small")
    assert told["splits"]["train"]["summary"]["objects"] == 2

    (root / "labels" / "val" / "b.txt").write_text("9 0.5 0.5 0.1 0.1\n")
    assert main([*argv, "--json"]) == 1
    told = json.loads(capsys.readouterr().out)
    assert not told["faultless"]
    assert told["splits"]["val"]["faults"] == [
        {
            "file": str(root / "labels" / "val" / "b.txt"),
            "record": "line 1",
            "message": "unknown class 9; expected one of 0 to 1",
            "fatal": False,
        }
    ]
    assert main([*argv, "--out", str(out)]) == 1
    assert "--overwrite" in capsys.readouterr().err


def test_the_check_ends_with_the_command_that_may_follow(tmp_path, capsys):
    root = tmp_path / "my set"
    root.mkdir()
    write_voc(root)

    def last_line(*settings):
        main(["check-data", "--config", "nuclei_small", "--data.root", str(root), *settings])
        return capsys.readouterr().out.splitlines()[-1].partition("   #")

    train = f"next: latentgnn train --config nuclei_small --data.root '{root}'"
    assert last_line() == (f"{train} --data.val_fraction 0.2", "   #", " with changes for what does not fit")
    drawn = ("--data.val_fraction", "0.5", "--data.val_groups", "^.*$", "--out", str(tmp_path / "out"))
    assert last_line(*drawn)[0] == f"{train} --data.val_fraction 0.5 --data.val_groups '^.*$'"
    (root / "Annotations" / "a.xml").write_text("")
    assert last_line()[0] == f"next: latentgnn check-data --config nuclei_small --data.root '{root}'"


def test_images_that_are_in_both_splits(tmp_path, capsys):
    write_yolo(tmp_path)
    (tmp_path / "data.yaml").write_text("train: images/train\nval: images/train\nnames: [dog, cat]\n")
    assert main(["check-data", "--data.root", str(tmp_path)]) == 0
    assert "1 images are in both splits" in capsys.readouterr().out


def test_only_what_is_used_is_listed_and_taken(tmp_path, capsys):
    assert main(["check-data", "--help"]) == 0
    listed = capsys.readouterr().out
    assert "--data.val_fraction" in listed
    assert "--training." not in listed
    assert "--data.augment" not in listed
    assert len(listed.splitlines()) < 130  # of three tasks' settings
    assert main(["check-data", "--data.root", str(tmp_path), "--training.steps", "3"]) == 2
    assert "--training.steps is a setting that this command does not use" in capsys.readouterr().err
