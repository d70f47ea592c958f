"""Sets in each format, written by hand: what is read of them, and what is wrong with them."""

import base64
import io
import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from latentgnn.errors import UserError
from latentgnn.tasks.detection.check import check
from latentgnn.tasks.detection.coco import CocoTrainingSet
from latentgnn.tasks.detection.config import AugmentConfig, DataConfig
from latentgnn.tasks.detection.formats.records import Reading
from latentgnn.tasks.detection.segmentations import decode_masks
from latentgnn.tasks.detection.sets import DetectionSet
from latentgnn.tasks.detection.sound_sets import load
from tests.tasks.detection.tiny_sets import (
    BOXES,
    CAT,
    DOG,
    HEIGHT,
    WIDTH,
    WRITERS,
    labelme_json,
    voc_xml,
    write_image,
    write_labelme,
    write_voc,
    write_voc_masks,
    write_yolo,
)

FORMATS = tuple(WRITERS)


def whole(root: Path, **settings: object) -> Reading:
    return DetectionSet(DataConfig(root=str(root), **settings)).whole()


def both(root: Path, **settings: object) -> list[Reading]:
    opened = DetectionSet(DataConfig(root=str(root), **settings))
    return [opened.reading("train"), opened.reading("val")]


def boxes(*readings: Reading) -> dict[str, set[tuple[object, ...]]]:
    """Name and box of each object, by the image's name without its folders."""
    found: dict[str, set[tuple[object, ...]]] = {}
    for reading in readings:
        names = {category["id"]: category["name"] for category in reading.dataset["categories"]}
        files = {image["id"]: Path(image["file_name"]).name for image in reading.dataset["images"]}
        found |= {name: set() for name in files.values()}
        for record in reading.dataset["annotations"]:
            rounded = (round(value, 9) for value in record["bbox"])
            found[files[record["image_id"]]].add((names[record["category_id"]], *rounded))
    return found


def only(reading: Reading):
    faults = check(reading).faults
    assert len(faults) == 1, [str(fault) for fault in faults]
    return faults[0]


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("named", [True, False])
def test_each_format_is_known_by_what_lies_there(tmp_path, format, named):
    WRITERS[format](tmp_path)
    settings = {"format": format} if named else {}
    opened = DetectionSet(DataConfig(root=str(tmp_path), **settings))
    assert opened.format == format
    readings = both(tmp_path, **settings) if opened.is_split else [opened.whole()]
    assert boxes(*readings) == BOXES
    assert [check(reading).faults for reading in readings] == [[] for _ in readings]
    assert [load(reading).has_masks for reading in readings] == [format == "voc_masks" for _ in readings]


@pytest.mark.parametrize("format", FORMATS)
def test_each_format_gives_training_samples(tmp_path, format):
    WRITERS[format](tmp_path)
    settings = {} if format == "yolo" else {"val_fraction": 0.5}
    train, _ = both(tmp_path, format=format, **settings)
    name = Path(train.dataset["images"][0]["file_name"]).name
    image, target = CocoTrainingSet(load(train), augment=AugmentConfig(horizontal_flip=0.0), seed=0)[0, 0]
    assert image.shape == (3, HEIGHT, WIDTH)
    expected = sorted([x, y, x + width, y + height] for _, x, y, width, height in BOXES[name])
    torch.testing.assert_close(torch.tensor(sorted(target["boxes"].tolist())), torch.tensor(expected))


def test_several_formats_must_be_told_apart(tmp_path):
    write_labelme(tmp_path)
    write_voc(tmp_path)
    with pytest.raises(UserError, match=r"several formats .*--data.format voc or labelme"):
        whole(tmp_path)
    (tmp_path / "none").mkdir()
    with pytest.raises(UserError, match="no set of a known format"):
        whole(tmp_path / "none")
    with pytest.raises(UserError, match=r"holds no files of YOLO|nothing names the classes"):
        check_all(tmp_path / "none", "yolo")


def check_all(root, format):
    for reading in both(root, format=format):
        load(reading)


def test_what_only_coco_has_is_refused_elsewhere(tmp_path):
    write_voc(tmp_path)
    with pytest.raises(UserError, match=r"data\.val_annotations only applies to COCO-format sets; .* is read as voc"):
        whole(tmp_path, format="voc", val_annotations="val.json")


@pytest.mark.parametrize(
    "text", ["cat:1,2:::", "cat:1,2,256::", "cat:1,2,3\ncat:3,2,1", "cat:1,2,3\ndog:1,2,3", ":1,2,3", ""]
)
def test_labelmaps_without_sense(tmp_path, text):
    write_voc_masks(tmp_path)
    (tmp_path / "labelmap.txt").write_text(text)
    with pytest.raises(UserError, match=r"labelmap\.txt"):
        whole(tmp_path)


def test_voc_folders_and_lists_of_splits(tmp_path):
    inner = tmp_path / "VOCdevkit" / "VOC2012"
    inner.mkdir(parents=True)
    write_voc(inner)
    (inner / "Annotations" / "c.xml").write_text(voc_xml("c.png"))
    (inner / "ImageSets" / "Main").mkdir(parents=True)
    (inner / "ImageSets" / "Main" / "train.txt").write_text("a\n")
    (inner / "ImageSets" / "Main" / "val.txt").write_text("\nb \n")
    train, val = both(tmp_path)
    assert boxes(train) == {"a.png": BOXES["a.png"]}
    assert boxes(val) == {"b.png": BOXES["b.png"]}
    assert train.dataset["categories"] == val.dataset["categories"]
    assert any("1 files are in no list" in note for note in train.notes)

    roboflow = tmp_path / "roboflow"
    for split, name in (("train", "a"), ("valid", "b"), ("test", "a")):
        write_image(roboflow / split / f"{name}.png")
        (roboflow / split / f"{name}.xml").write_text((inner / "Annotations" / f"{name}.xml").read_text())
    train, val = both(roboflow)
    assert boxes(train) == {"a.png": BOXES["a.png"]}
    assert boxes(val) == {"b.png": BOXES["b.png"]}


def test_difficult_voc_objects_are_crowds_and_polygons_are_masks(tmp_path):
    write_voc(tmp_path)
    polygon = "<polygon><x1>3</x1><y1>4</y1><x2>9</x2><y2>4</y2><x3>9</x3><y3>10</y3></polygon></object>"
    text = voc_xml("b.png", ("cat", (3, 4, 8, 9), 1)).replace("</object>", polygon)
    (tmp_path / "Annotations" / "b.xml").write_text(text)
    (tmp_path / "Annotations" / "a.xml").unlink()
    record = whole(tmp_path).dataset["annotations"][0]
    assert record["iscrowd"] == 1
    assert record["segmentation"] == [[2.0, 3.0, 8.0, 3.0, 8.0, 9.0]]


VOC_FAULTS = {
    "no area": (voc_xml("b.png", ("cat", (3, 4, 3, 9), 0)), "object 1, line 4", "(3, 4) to (3, 9) has no area"),
    "inside out": (voc_xml("b.png", ("cat", (8, 4, 3, 9), 0)), "object 1, line 4", "has no area"),
    "outside": (
        voc_xml("b.png", ("cat", (3, 4, 22, 9), 0)),
        "object 1, line 4 (cat)",
        "lies outside the image of 20 x 10",
    ),
    "text": (
        voc_xml("b.png", ("cat", ("x", 4, 8, 9), 0)),
        "object 1, line 4",
        "expected a number as xmin of its bndbox",
    ),
    "not finite": (voc_xml("b.png", ("cat", ("nan", 4, 8, 9), 0)), "object 1, line 4", "but it is 'nan'"),
    "no box": (voc_xml("b.png", ("cat", (3, 4, 8, 9), 0)).replace("bndbox", "box"), "object 1, line 4", "no bndbox"),
    "no name": (voc_xml("b.png", ("", (3, 4, 8, 9), 0)), "object 1, line 4", "it has no name"),
    "size": (voc_xml("b.png").replace("<width>20", "<width>30"), "annotated in {file}", "is 20 x 10 pixels"),
    "no size": (voc_xml("b.png").replace("<width>20", "<width>0"), "", "expected a width of 1 or more, but it is 0"),
    "cut short": (voc_xml("b.png")[:57], "line 3, column 16", "malformed XML: no element found"),
    "entities": (
        "<!DOCTYPE a [<!ENTITY b 'bb'>]>" + voc_xml("b.png", ("&b;", (3, 4, 8, 9), 0)),
        "line 1",
        "it has a document type",
    ),
    "deep": ("<a>" * 100, "line 1", "nested too deeply; expected at most 64"),
    "other": ("<svg></svg>", "line 1", "expected <annotation> at the top, but it is <svg>"),
}


@pytest.mark.parametrize("name", VOC_FAULTS)
def test_faults_in_voc_files(tmp_path, name):
    text, record, message = VOC_FAULTS[name]
    write_voc(tmp_path)
    file = tmp_path / "Annotations" / "b.xml"
    file.write_text(text)
    fault = only(whole(tmp_path))
    assert fault.file == (tmp_path / "JPEGImages" / "b.png" if name == "size" else file)
    assert fault.record == record.format(file=file)
    assert message in fault.message
    with pytest.raises(UserError, match=r"data\.on_fault skip"):
        load(whole(tmp_path))
    kept = load(whole(tmp_path), "skip")
    assert kept.skipped_images + kept.skipped_annotations > 0
    assert boxes(whole(tmp_path))["a.png"] == BOXES["a.png"]


def test_missing_and_doubled_images(tmp_path):
    write_voc(tmp_path)
    (tmp_path / "JPEGImages" / "b.png").unlink()
    fault = only(whole(tmp_path))
    assert fault.file == tmp_path / "Annotations" / "b.xml"
    assert f"there is no image b.* in {tmp_path}" in fault.message
    kept = load(whole(tmp_path), "skip")
    assert (kept.skipped_images, kept.skipped_annotations) == (1, 1)
    (tmp_path / "Annotations" / "b.xml").write_text(voc_xml("C:\\shots\\a.png"))
    assert "is annotated twice" in only(whole(tmp_path)).message
    write_image(tmp_path / "other" / "a.png")
    (tmp_path / "Annotations" / "b.xml").unlink()
    assert "several images have its name" in only(whole(tmp_path)).message


def test_unknown_and_alike_categories(tmp_path):
    write_voc(tmp_path)
    (tmp_path / "Annotations" / "b.xml").write_text(voc_xml("b.png", ("Cat", (3, 4, 8, 9), 0)))
    assert any("'Cat' and 'cat'" in note for note in whole(tmp_path).notes)
    fault = only(whole(tmp_path, categories=((7, "dog"), (3, "cat"))))
    assert fault.record == "object 1, line 4 (Cat)"
    assert fault.message == "unknown category 'Cat'; expected one of dog, cat"
    (tmp_path / "labelmap.txt").write_text("# a comment\nbackground:0,0,0::\ndog:1,2,3::\n")
    assert {fault.message for fault in check(whole(tmp_path)).faults} == {
        "unknown category 'Cat'; expected one of dog",
        "unknown category 'cat'; expected one of dog",
    }


YOLO_FAULTS = {
    "unknown class": ("2 0.5 0.5 0.2 0.2", "unknown class 2; expected one of 0 to 1"),
    "no area": ("1 0.5 0.5 0 0.2", "has no area"),
    "outside": ("1 1.5 0.5 0.2 0.2", "lies outside the image of 20 x 10"),
    "pixels": ("1 12 5 4 4", "expected fractions of the image's size, from 0 to 1, but one is 12"),
    "text": ("1 a 0.5 0.2 0.2", "expected numbers, but one is 'a'"),
    "not finite": ("1 nan 0.5 0.2 0.2", "expected numbers, but one is 'nan'"),
    "too few": ("1 0.5 0.5", "3 numbers; expected a class and a box"),
    "a score": ("1 0.5 0.5 0.2 0.2 0.9", "6 numbers; expected a class and a box"),
    "half a point": ("1 0.1 0.1 0.2 0.2 0.3 0.1 0.5", "8 numbers; expected"),
    "flat outline": ("1 0.1 0.1 0.2 0.1 0.3 0.1", "has no area"),
}


@pytest.mark.parametrize("name", YOLO_FAULTS)
def test_faults_in_yolo_labels(tmp_path, name):
    line, message = YOLO_FAULTS[name]
    write_yolo(tmp_path)
    file = tmp_path / "labels" / "train" / "a.txt"
    file.write_text(f"\n{line}\n")
    faults = [fault for fault in check(both(tmp_path)[0]).faults if "does not decode" not in fault.message]
    assert len(faults) == 1
    assert (faults[0].file, faults[0].record) == (file, "line 2")
    assert message in faults[0].message


def test_yolo_outlines_and_images_without_labels(tmp_path):
    write_yolo(tmp_path)
    outline = "1 0.1 0.3 0.4 0.3 0.4 0.9 0.1 0.9\n"
    (tmp_path / "labels" / "train" / "a.txt").write_text(outline)
    write_image(tmp_path / "images" / "train" / "c.png")
    train, _ = both(tmp_path)
    assert boxes(train) == {"a.png": {("cat", *CAT)}, "c.png": set()}
    mask = decode_masks([train.dataset["annotations"][0]["segmentation"]], HEIGHT, WIDTH)[0]
    expected = np.zeros((HEIGHT, WIDTH), np.uint8)
    expected[3:9, 2:8] = 1
    np.testing.assert_array_equal(mask, expected)
    assert load(train).has_masks
    assert any("1 images have no file of labels" in note for note in train.notes)
    # A box among outlines has no mask.
    (tmp_path / "labels" / "train" / "a.txt").write_text(outline + "0 0.6 0.5 0.2 1.0\n")
    assert only(both(tmp_path)[0]).record == "line 2"


YAML = "names: [dog, cat]\n"
YOLO_LAYOUTS = {
    "from elsewhere": ("path: /somewhere/else\ntrain: images/train\nval: images/val\n" + YAML, None),
    "a step too high": ("train: ../images/train\nval: ../images/val\nnc: 2\n" + YAML, None),
    "lists": ("train: lists/train.txt\nval: [lists/val.txt]\n" + YAML, None),
    "no yaml": (None, "dog\ncat\n"),
}


@pytest.mark.parametrize("name", YOLO_LAYOUTS)
def test_yolo_layouts(tmp_path, name):
    yaml, classes = YOLO_LAYOUTS[name]
    write_yolo(tmp_path)
    (tmp_path / "data.yaml").unlink()
    if yaml is not None:
        (tmp_path / "data.yaml").write_text(yaml)
    if classes is not None:
        (tmp_path / "classes.txt").write_text(classes)
    (tmp_path / "lists").mkdir()
    (tmp_path / "lists" / "train.txt").write_text("../images/train/a.png\n")
    (tmp_path / "lists" / "val.txt").write_text("./images/val/b.png\n")
    assert boxes(*both(tmp_path)) == BOXES


FATAL_YAML = {
    "nc": ("train: images/train\nval: images/val\nnc: 3\n" + YAML, "nc is 3, but names has 2 classes"),
    "twice": ("train: images/train\nval: images/val\nnames: [cat, cat]\n", "expected each class once"),
    "gap": ("train: images/train\nval: images/val\nnames: {0: dog, 2: cat}\n", "a class for each number from 0 on"),
    "no folder": ("train: pictures\nval: images/val\n" + YAML, "train: there is no"),
    "key points": ("train: images/train\nval: images/val\nkpt_shape: [17, 3]\n" + YAML, "a set of key points"),
}


@pytest.mark.parametrize("name", FATAL_YAML)
def test_what_data_yaml_must_say(tmp_path, name):
    text, message = FATAL_YAML[name]
    write_yolo(tmp_path)
    (tmp_path / "data.yaml").write_text(text)
    fault = check(both(tmp_path)[0]).faults[0]
    assert fault.fatal
    assert fault.file == tmp_path / "data.yaml"
    assert message in fault.message


def test_yolo_labels_without_an_image(tmp_path):
    write_yolo(tmp_path)
    (tmp_path / "labels" / "val" / "gone.txt").write_text("0 0.5 0.5 0.1 0.1\n")
    fault = only(both(tmp_path)[1])
    assert fault.file == tmp_path / "labels" / "val" / "gone.txt"
    assert fault.message == f"there is no image gone.* in {tmp_path / 'images' / 'val'}"


def _shape(kind, *points, label="cat", **more):
    return {"label": label, "shape_type": kind, "points": list(points), **more}


SQUARE = ([2, 3], [8, 3], [8, 9], [2, 9])
LABELME_FAULTS = {
    "line": (_shape("line", [1, 1], [5, 5]), 'a shape of the type "line" is no object'),
    "no label": (_shape("polygon", *SQUARE, label=None), "expected a label, but it is null"),
    "two points": (_shape("polygon", [1, 1], [5, 5]), "expected 3 or more points as [x, y] for a polygon"),
    "points of text": (_shape("rectangle", [1, "1"], [5, 5]), "expected 2 points as [x, y] for a rectangle"),
    "flat": (_shape("rectangle", [1, 1], [5, 1]), "has no area"),
    "outside": (_shape("rectangle", [1, 1], [50, 5]), "lies outside the image of 20 x 10"),
    "group of text": (_shape("rectangle", *SQUARE[::2], group_id=[1]), "expected a whole number as group_id"),
    "mask of text": (_shape("mask", [1, 1], [5, 5], mask="!!"), "the mask is not in base64"),
    "mask of nothing": (_shape("mask", [1, 1], [5, 5]), "the mask cannot be read"),
    "mask outside": (_shape("mask", [1, 1], [50, 5], mask=""), "the mask lies outside the image"),
}


@pytest.mark.parametrize("name", LABELME_FAULTS)
def test_faults_in_labelme_files(tmp_path, name):
    shape, message = LABELME_FAULTS[name]
    write_labelme(tmp_path)
    (tmp_path / "b.json").write_text(labelme_json("b.png", shape))
    fault = only(whole(tmp_path))
    assert fault.file == tmp_path / "b.json"
    assert fault.record.startswith("shapes[0]")
    assert message in fault.message


def test_labelme_shapes(tmp_path):
    pixels = np.zeros((3, 4), np.uint8)
    pixels[0, 0] = pixels[2, 3] = 255
    buffer = io.BytesIO()
    Image.fromarray(pixels).convert("1").save(buffer, "png")
    mask = _shape("mask", [5, 2], [8, 4], mask=base64.b64encode(buffer.getvalue()).decode())
    parts = [
        _shape("polygon", [0, 0], [2, 0], [2, 2], [0, 2], group_id=4),
        _shape("rectangle", [6, 6], [8, 8], group_id=4),
    ]
    write_image(tmp_path / "a.png")
    (tmp_path / "a.json").write_text(labelme_json("a.png", mask, *parts, _shape("circle", [10, 5], [14, 5])))
    reading = whole(tmp_path)
    assert check(reading).faults == []
    records = reading.dataset["annotations"]
    assert [record["bbox"] for record in records[:2]] == [[5, 2, 4, 3], [0, 0, 8, 8]]
    assert records[2]["bbox"] == pytest.approx([6, 1, 8, 8], abs=0.05)
    masks = decode_masks([record["segmentation"] for record in records], HEIGHT, WIDTH)
    assert np.argwhere(masks[0]).tolist() == [[2, 5], [4, 8]]
    assert masks[1].sum() == 8
    assert masks[2].sum() == pytest.approx(np.pi * 16, abs=4)


def test_labelme_rectangles_alone_are_boxes(tmp_path):
    write_labelme(tmp_path)
    assert not load(whole(tmp_path)).has_masks
    (tmp_path / "b.json").write_text(labelme_json("b.png", _shape("polygon", *SQUARE)))
    loaded = load(whole(tmp_path))
    assert loaded.has_masks
    mask = decode_masks([loaded.dataset["annotations"][1]["segmentation"]], HEIGHT, WIDTH)[0]
    expected = np.zeros((HEIGHT, WIDTH), np.uint8)
    expected[:, 10:14] = 1
    np.testing.assert_array_equal(mask, expected)


def test_labelme_names_are_those_of_labels_txt(tmp_path):
    write_labelme(tmp_path)
    (tmp_path / "labels.txt").write_text("__ignore__\n_background_\ndog\ncat\n")
    assert whole(tmp_path).dataset["categories"] == [{"id": 1, "name": "dog"}, {"id": 2, "name": "cat"}]


def test_voc_masks_in_colours_and_with_other_classes(tmp_path):
    """As some tools write them: colours in both pictures, and the classes in labelmap.txt."""
    write_image(tmp_path / "JPEGImages" / "a.png")
    objects, classes = np.zeros((2, HEIGHT, WIDTH, 3), np.uint8)
    objects[3:9, 2:8], classes[3:9, 2:8] = (0, 0, 255), (10, 20, 30)
    objects[:, 10:14], classes[:, 10:14] = (200, 0, 0), (40, 50, 60)
    for kind, pixels in (("SegmentationObject", objects), ("SegmentationClass", classes)):
        (tmp_path / kind).mkdir()
        Image.fromarray(pixels).save(tmp_path / kind / "a.png")
    (tmp_path / "labelmap.txt").write_text("background:0,0,0::\ndog:40,50,60::\ncat:10,20,30::\n")
    reading = whole(tmp_path)
    assert check(reading).faults == []
    assert boxes(reading) == {"a.png": {("cat", *CAT), ("dog", *DOG)}}
    assert reading.dataset["categories"] == [{"id": 1, "name": "dog"}, {"id": 2, "name": "cat"}]


def test_voc_masks_in_vocs_own_colours(tmp_path):
    write_voc_masks(tmp_path)
    for kind in ("SegmentationObject", "SegmentationClass"):
        for name in ("a", "b"):
            path = tmp_path / kind / f"{name}.png"
            Image.open(path).convert("RGB").save(path)
    assert boxes(whole(tmp_path)) == BOXES


def test_faults_in_voc_masks(tmp_path):
    write_voc_masks(tmp_path)
    path = tmp_path / "SegmentationClass" / "b.png"
    with Image.open(path) as picture:
        values = np.asarray(picture).copy()
    values[3, 2] = 12
    Image.fromarray(values).save(path)
    fault = only(whole(tmp_path))
    assert (fault.file.name, fault.record) == ("b.png", "object 1")
    assert "expected pixels of one class" in fault.message
    values[3:9, 2:8] = 77
    Image.fromarray(values).save(path)
    assert "unknown class 77" in only(whole(tmp_path)).message
    Image.fromarray(values[:, :5]).save(path)
    assert "5 x 10" in only(whole(tmp_path)).message
    path.unlink()
    assert "there is no such picture" in only(whole(tmp_path)).message


def test_coco_of_other_names(tmp_path):
    (tmp_path / "whole").mkdir()
    WRITERS["coco"](tmp_path / "whole")
    dataset = json.loads((tmp_path / "whole" / "annotations.json").read_text())
    root = tmp_path / "roboflow"
    for split, images in (("train", dataset["images"][:1]), ("valid", dataset["images"][1:])):
        ids = {image["id"] for image in images}
        records = [record for record in dataset["annotations"] if record["image_id"] in ids]
        write_image(root / split / images[0]["file_name"])
        content = {**dataset, "images": images, "annotations": records}
        (root / split / "_annotations.coco.json").write_text(json.dumps(content))
    train, val = both(root)
    assert boxes(train) == {"a.png": BOXES["a.png"]}
    assert boxes(val) == {"b.png": BOXES["b.png"]}


def test_links_that_lead_in_a_circle(tmp_path):
    write_voc(tmp_path)
    os.symlink(tmp_path, tmp_path / "Annotations" / "again")
    assert boxes(whole(tmp_path)) == BOXES
