import hashlib
import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from faster_coco_eval.core import mask as coco_mask
from PIL import Image

from latentgnn.configuration.recipes import load_recipe
from latentgnn.configuration.settings import parse_config
from latentgnn.errors import UserError
from latentgnn.tasks.detection.check import check_split
from latentgnn.tasks.detection.config import DetectionConfig
from latentgnn.tasks.detection.context_set import CATEGORIES, COLOURS, MANIFEST, SHAPES, write_context_set
from latentgnn.tasks.detection.model import build_detector

SIZE = 128


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("context") / "set"
    write_context_set(root, train=40, val=8, size=SIZE, seed=3)
    return root


def read(root, split):
    return json.loads((root / "annotations" / f"instances_{split}.json").read_text())


def pixels_of(root, split, image):
    return np.asarray(Image.open(root / split / image["file_name"])).astype(int)


def decoded(annotation):
    height, width = annotation["segmentation"]["size"]
    return coco_mask.decode(coco_mask.frPyObjects(annotation["segmentation"], height, width)).astype(bool)


def files_of(root):
    return {path.relative_to(root): path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()}


def objects_by_image(dataset):
    annotations = {image["id"]: [] for image in dataset["images"]}
    for annotation in dataset["annotations"]:
        annotations[annotation["image_id"]].append(annotation)
    return annotations


def test_same_arguments_give_the_same_bytes(root, tmp_path):
    write_context_set(tmp_path / "again", train=40, val=8, size=SIZE, seed=3)
    assert files_of(tmp_path / "again") == files_of(root)


def test_seed_and_split_change_every_picture(root, tmp_path):
    write_context_set(tmp_path / "other", train=8, val=8, size=SIZE, seed=4)
    pictures = [path.read_bytes() for folder in (root, tmp_path / "other") for path in folder.rglob("*.png")]
    assert len(set(pictures)) == len(pictures) == 40 + 8 + 8 + 8


def test_larger_set_begins_with_the_smaller(root, tmp_path):
    write_context_set(tmp_path / "fewer", train=4, val=2, size=SIZE, seed=3)
    large, small = read(root, "train"), read(tmp_path / "fewer", "train")
    assert small["images"] == large["images"][:4]
    assert small["annotations"] == large["annotations"][: len(small["annotations"])]
    for image in small["images"]:
        assert np.array_equal(pixels_of(root, "train", image), pixels_of(tmp_path / "fewer", "train", image))


def test_pixels_and_annotations_are_the_same_on_every_machine(tmp_path):
    write_context_set(tmp_path / "set", train=4, val=2, size=64)
    digest = hashlib.sha256()
    for split in ("train", "val"):
        dataset = read(tmp_path / "set", split)
        digest.update(json.dumps(dataset, sort_keys=True).encode())
        for image in dataset["images"]:
            digest.update(pixels_of(tmp_path / "set", split, image).astype(np.uint8).tobytes())
    assert digest.hexdigest() == "93e86badc93a84e6c6e1b56caf25feee170f0532d1dc0b96ca323c3e27b58be2"


@pytest.mark.parametrize("split", ["train", "val"])
def test_valid_coco(root, split):
    report = check_split(root / "annotations" / f"instances_{split}.json", root / split)
    assert report.faults == []
    assert [category["name"] for category in read(root, split)["categories"]] == list(CATEGORIES)


def test_boxes_and_areas_are_those_of_the_masks(root):
    for annotation in read(root, "train")["annotations"]:
        encoded = coco_mask.encode(np.asfortranarray(decoded(annotation).astype(np.uint8)))
        assert annotation["bbox"] == coco_mask.toBbox(encoded).tolist()
        assert annotation["area"] == coco_mask.area(encoded)
        assert annotation["area"] > 60


def test_objects_do_not_overlap(root):
    for annotations in objects_by_image(read(root, "train")).values():
        assert sum(decoded(annotation).astype(int) for annotation in annotations).max() == 1
        assert len(annotations) >= 3


@pytest.mark.parametrize("split", ["train", "val"])
def test_category_follows_from_the_key_in_the_picture(root, split):
    dataset = read(root, split)
    objects = objects_by_image(dataset)
    for image in dataset["images"]:
        pixels = pixels_of(root, split, image)
        # The frame is the only white thing, and its middle is the key's.
        rows, columns = np.nonzero(pixels.min(axis=2) > 220)
        y, x = int(rows.mean().round()), int(columns.mean().round())
        red, _, blue = pixels[y - 3 : y + 3, x - 3 : x + 3].mean(axis=(0, 1))
        assert abs(red - blue) > 100
        assert image["key"]["colour"] == ("orange" if red > blue else "blue")
        for annotation in objects[image["id"]]:
            assert CATEGORIES[annotation["category_id"] - 1] == ("warm" if red > blue else "cool")


def test_objects_have_the_colours_that_their_attributes_name(root):
    dataset = read(root, "train")
    objects = objects_by_image(dataset)
    for image in dataset["images"]:
        pixels = pixels_of(root, "train", image)
        for annotation in objects[image["id"]]:
            fill = np.median(pixels[decoded(annotation)], axis=0)
            assert np.abs(fill - COLOURS[annotation["attributes"]["colour"]]).max() < 60


def test_two_images_of_a_scene_differ_in_the_key_and_in_every_category(root):
    dataset = read(root, "train")
    objects = objects_by_image(dataset)
    for first, second in zip(dataset["images"][::2], dataset["images"][1::2], strict=True):
        assert first["scene"] == second["scene"]
        assert {first["key"]["colour"], second["key"]["colour"]} == {"orange", "blue"}
        differs = (pixels_of(root, "train", first) != pixels_of(root, "train", second)).any(axis=2)
        x, y, width, height = first["key"]["bbox"]
        assert differs[y : y + height, x : x + width].any()
        differs[y : y + height, x : x + width] = False
        assert not differs.any()
        for object_1, object_2 in zip(objects[first["id"]], objects[second["id"]], strict=True):
            assert {object_1["category_id"], object_2["category_id"]} == {1, 2}
            for field in ("bbox", "segmentation", "attributes"):
                assert object_1[field] == object_2[field]


def test_nothing_local_tells_the_category(root):
    dataset = read(root, "train")
    objects = objects_by_image(dataset)
    counts = Counter()
    for annotations in objects.values():
        for annotation in annotations:
            x, y, width, height = annotation["bbox"]
            local = {
                **annotation["attributes"],
                "column": x // 16,
                "row": y // 16,
                "width": width,
                "height": height,
                "area": annotation["area"] // 50,
                "objects": len(annotations),
                "same colour nearby": sum(
                    other["attributes"]["colour"] == annotation["attributes"]["colour"] for other in annotations
                ),
            }
            for item in (*local.items(), tuple(sorted(local.items()))):
                counts[item, annotation["category_id"]] += 1
    assert len({item for item, _ in counts}) > 50
    assert all(counts[item, 1] == counts[item, 2] for item, _ in list(counts))


def test_every_kind_of_object_and_both_ends_appear(root):
    dataset = read(root, "train")
    attributes = [annotation["attributes"] for annotation in dataset["annotations"]]
    assert {attribute["colour"] for attribute in attributes} == set(COLOURS)
    assert {attribute["shape"] for attribute in attributes} == set(SHAPES)
    left = sum(image["key"]["bbox"][0] < SIZE for image in dataset["images"][::2]) / 20
    assert 0.15 < left < 0.85


@pytest.mark.parametrize("size", [64, SIZE, 200])
def test_key_is_further_away_than_the_images_height(tmp_path, size):
    write_context_set(tmp_path / "set", train=10, val=2, size=size)
    dataset = read(tmp_path / "set", "train")
    objects = objects_by_image(dataset)
    for image in dataset["images"]:
        assert (image["width"], image["height"]) == (2 * size, size)
        left, top, width, height = image["key"]["bbox"]
        assert left >= 0 <= top
        assert left + width <= 2 * size
        assert top + height <= size
        assert objects[image["id"]]
        for annotation in objects[image["id"]]:
            x, _, extent, _ = annotation["bbox"]
            assert max(x - (left + width), left - (x + extent)) >= size


def test_plain_detector_of_the_recipe_cannot_see_the_key_and_the_one_with_blocks_can(root):
    config = parse_config(DetectionConfig, {k: v for k, v in load_recipe("context").items() if k != "description"})
    assert config.data.embedded_size == SIZE
    assert config.model.blocks
    dataset = read(root, "train")
    objects = objects_by_image(dataset)

    def largest_change(model):
        changes = []
        for first, second in zip(dataset["images"][:8:2], dataset["images"][1:8:2], strict=True):
            pair = [
                torch.tensor(pixels_of(root, "train", image) / 255).permute(2, 0, 1).float()
                for image in (first, second)
            ]
            boxes = torch.tensor([annotation["bbox"] for annotation in objects[first["id"]]]).float()
            boxes[:, 2:] += boxes[:, :2]
            boxes += torch.tensor([-3, -3, 3, 3])  # proposals are not exact
            with torch.no_grad():
                images, _ = model.transform(pair)
                heads = model.roi_heads
                pooled = heads.box_roi_pool(model.backbone(images.tensors), [boxes, boxes], images.image_sizes)
                logits, _ = heads.box_predictor(heads.box_head(pooled))
            logits_1, logits_2 = logits.chunk(2)
            changes.append((logits_1 - logits_2).abs().max().item() / logits_1.abs().max().item())
        return max(changes)

    def build(model_config):
        torch.manual_seed(0)
        model = build_detector(model_config, len(CATEGORIES)).eval()
        for module in model.modules():
            # timm starts the last norm of each residual branch at zero, which would hide most of the network.
            if isinstance(module, torch.nn.BatchNorm2d):
                torch.nn.init.ones_(module.weight)
        return model

    assert largest_change(build(replace(config.model, blocks={}))) < 1e-6
    assert largest_change(build(config.model)) > 1e-4


def test_writing_again_leaves_the_folder_alone(root):
    before = {path: path.stat().st_mtime_ns for path in root.rglob("*")}
    write_context_set(root, train=40, val=8, size=SIZE, seed=3)
    assert {path: path.stat().st_mtime_ns for path in root.rglob("*")} == before


def test_another_set_or_other_files_in_the_folder_are_left_alone(root, tmp_path):
    with pytest.raises(UserError, match=r"'train': 40.*'train': 42.*another folder"):
        write_context_set(root, train=42, val=8, size=SIZE, seed=3)
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="holds something else"):
        write_context_set(tmp_path, train=4, val=2, size=SIZE)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_an_empty_folder_is_filled(tmp_path):
    root = tmp_path / "set"
    root.mkdir()
    write_context_set(str(root), train=2, val=2, size=64)
    assert (root / MANIFEST).is_file()


def test_a_failure_leaves_nothing_behind(tmp_path, monkeypatch):
    def fail(*args, **kwargs):
        raise OSError("no space left on device")

    monkeypatch.setattr(Image.Image, "save", fail)
    with pytest.raises(OSError, match="no space"):
        write_context_set(tmp_path / "set", train=2, val=2, size=64)
    assert list(tmp_path.iterdir()) == []


def test_another_process_may_be_faster(tmp_path, monkeypatch):
    root = tmp_path / "set"
    replace_folder = Path.replace

    def beaten(self, target):
        if Path(target) == root and not root.exists():
            monkeypatch.setattr(Path, "replace", replace_folder)
            write_context_set(root, train=2, val=2, size=64)
        return replace_folder(self, target)

    monkeypatch.setattr(Path, "replace", beaten)
    monkeypatch.setattr("os.getpid", iter(range(100)).__next__)
    write_context_set(root, train=2, val=2, size=64)
    assert [path.name for path in tmp_path.iterdir()] == ["set"]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"train": 3}, "data.embedded_train: expected an even number"),
        ({"train": 0}, "data.embedded_train: expected an even number"),
        ({"val": 5}, "data.embedded_val: expected an even number"),
        ({"size": 32}, "data.embedded_size: expected at least 64"),
    ],
)
def test_counts_and_size_are_checked(tmp_path, wrong, message):
    with pytest.raises(UserError, match=message):
        write_context_set(tmp_path / "set", **{"train": 4, "val": 2, "size": SIZE, **wrong})
    assert not (tmp_path / "set").exists()
