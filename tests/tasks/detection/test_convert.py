"""Sets of each format written in COCO's."""

import json
from pathlib import Path

import numpy as np
import pytest
from faster_coco_eval import COCO
from PIL import Image

from latentgnn.cli import main
from latentgnn.tasks.detection.check import check
from latentgnn.tasks.detection.config import DataConfig
from latentgnn.tasks.detection.segmentations import decode_masks
from latentgnn.tasks.detection.sets import DetectionSet
from latentgnn.tasks.detection.sound_sets import load
from tests.tasks.detection.tiny_sets import BOXES, WRITERS, write_image, write_voc, write_yolo


@pytest.mark.parametrize("format", WRITERS)
def test_each_format_becomes_coco(tmp_path, format, capsys):
    root, out = tmp_path / "set", tmp_path / "coco"
    root.mkdir()
    WRITERS[format](root)
    split = [] if format == "yolo" else ["--data.val_fraction", "0.5"]
    assert main(["convert", str(root), "--out", str(out), *split]) == 0
    assert f"latentgnn check-data --data.root {out}" in capsys.readouterr().out
    found: dict[str, set[tuple[object, ...]]] = {}
    for name in ("train", "val"):
        # Read by another library.
        coco = COCO(str(out / "annotations" / f"instances_{name}.json"))
        for image in coco.dataset["images"]:
            assert (out / name / image["file_name"]).is_file()
            records = coco.loadAnns(coco.getAnnIds(imgIds=[image["id"]]))
            labels = {category["id"]: category["name"] for category in coco.dataset["categories"]}
            found[image["file_name"]] = {
                (labels[record["category_id"]], *(round(value, 9) for value in record["bbox"])) for record in records
            }
            if format == "voc_masks":
                assert sum(coco.annToMask(record).sum() for record in records) == sum(
                    width * height for _, _, _, width, height in BOXES[image["file_name"]]
                )
    assert found == BOXES
    assert main(["check-data", "--data.root", str(out)]) == 0


def test_without_images_names_lead_to_the_set(tmp_path, capsys):
    root, out = tmp_path / "set", tmp_path / "coco"
    root.mkdir()
    write_voc(root)
    assert main(["convert", str(root), "--out", str(out), "--no-images"]) == 0
    assert not (out / "train").exists()
    printed = capsys.readouterr().out
    argv = printed.rsplit("latentgnn ", 1)[1].split()
    assert main(argv) == 0


def test_images_of_one_name_are_kept_apart(tmp_path):
    root, out = tmp_path / "set", tmp_path / "coco"
    for folder in ("x", "y"):
        write_image(root / folder / "a.png")
        (root / folder / "a.xml").write_text(
            "<annotation><object><name>cat</name><bndbox><xmin>3</xmin><ymin>4</ymin><xmax>8</xmax><ymax>9</ymax>"
            "</bndbox></object></annotation>"
        )
    assert main(["convert", str(root), "--out", str(out)]) == 0
    dataset = json.loads((out / "annotations" / "instances_train.json").read_text())
    assert [image["file_name"] for image in dataset["images"]] == ["x/a.png", "y/a.png"]
    assert [(image["width"], image["height"]) for image in dataset["images"]] == [(20, 10)] * 2


def test_faults_stop_it_and_nothing_is_left(tmp_path, capsys):
    root, out = tmp_path / "set", tmp_path / "coco"
    root.mkdir()
    write_yolo(root)
    (root / "labels" / "train" / "a.txt").write_text("1 0.25 0.6 0.3 0.6\n0 0.6 0.5 0 1.0\n")
    assert main(["convert", str(root), "--out", str(out)]) == 1
    assert "line 2" in capsys.readouterr().err
    assert not out.exists()
    assert main(["convert", str(root), "--out", str(out), "--data.on_fault", "skip"]) == 0
    assert "left out: images 0, annotations 1" in capsys.readouterr().out
    dataset = json.loads((out / "annotations" / "instances_train.json").read_text())
    assert len(dataset["annotations"]) == 1
    assert main(["convert", str(root), "--out", str(out), "--data.on_fault", "skip"]) == 1
    assert "--overwrite" in capsys.readouterr().err
    assert main(["convert", str(root), "--out", str(root)]) == 1
    assert main(["convert", str(out), "--out", str(out), "--overwrite"]) == 1
    assert "which is read" in capsys.readouterr().err
    assert (out / "train" / "a.png").is_file()


def _yolo_of(annotations, root: Path) -> None:
    """Each object's box in fractions, from the COCO records."""
    for image in annotations.images:
        lines = []
        for record in annotations.annotations_of(image.id):
            x, y, width, height = record["bbox"]
            label = annotations.label_of_category[record["category_id"]] - 1
            centre = ((x + width / 2) / image.width, (y + height / 2) / image.height)
            lines.append(f"{label} {centre[0]!r} {centre[1]!r} {width / image.width!r} {height / image.height!r}")
        path = root / "labels" / f"{Path(image.file_name).stem}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("\n".join(lines))
        (root / "images").mkdir(exist_ok=True)
        (root / "images" / Path(image.file_name).name).symlink_to(image.path)
    names = [name for _, name in annotations.categories]
    (root / "data.yaml").write_text(json.dumps({"train": "images", "names": names}))


def _voc_of(annotations, root: Path) -> None:
    (root / "Annotations").mkdir(parents=True)
    (root / "JPEGImages").mkdir()
    names = dict(annotations.categories)
    for image in annotations.images:
        objects = ""
        for record in annotations.annotations_of(image.id):
            x, y, width, height = record["bbox"]
            objects += (
                f"<object><name>{names[record['category_id']]}</name><bndbox><xmin>{x + 1!r}</xmin>"
                f"<ymin>{y + 1!r}</ymin><xmax>{x + width!r}</xmax><ymax>{y + height!r}</ymax></bndbox></object>"
            )
        size = f"<size><width>{image.width}</width><height>{image.height}</height></size>"
        stem = Path(image.file_name).stem
        (root / "Annotations" / f"{stem}.xml").write_text(f"<annotation>{size}{objects}</annotation>")
        (root / "JPEGImages" / Path(image.file_name).name).symlink_to(image.path)


def _labelme_of(annotations, root: Path) -> None:
    root.mkdir()
    names = dict(annotations.categories)
    for image in annotations.images:
        shapes = []
        for record in annotations.annotations_of(image.id):
            x, y, width, height = record["bbox"]
            shapes.append(
                {
                    "label": names[record["category_id"]],
                    "shape_type": "rectangle",
                    "points": [[x, y], [x + width, y + height]],
                }
            )
        content = {"shapes": shapes, "imagePath": image.path.name, "imageData": None}
        (root / f"{image.path.stem}.json").write_text(json.dumps(content))
        (root / image.path.name).symlink_to(image.path)


def _voc_masks_of(annotations, root: Path) -> None:
    for kind in ("JPEGImages", "SegmentationObject", "SegmentationClass"):
        (root / kind).mkdir(parents=True)
    (root / "labelmap.txt").write_text("background:0,0,0::\nnucleus:128,0,0::\n")
    for image in annotations.images:
        records = annotations.annotations_of(image.id)
        masks = decode_masks([record["segmentation"] for record in records], image.height, image.width)
        objects = np.zeros((image.height, image.width), np.uint16)
        for number, mask in enumerate(masks, 1):
            objects[mask.astype(bool)] = number
        classes = np.zeros((image.height, image.width, 3), np.uint8)
        classes[objects > 0] = (128, 0, 0)
        Image.fromarray(objects).save(root / "SegmentationObject" / f"{image.path.stem}.png")
        Image.fromarray(classes).save(root / "SegmentationClass" / f"{image.path.stem}.png")
        (root / "JPEGImages" / image.path.name).symlink_to(image.path)


def _real(shared, name, split, most):
    root = shared(name)
    annotations = load(DetectionSet(DataConfig(root=str(root))).reading(split))
    kept = annotations.images[:most]
    ids = {image.id for image in kept}
    records = [r for r in annotations.dataset["annotations"] if r["image_id"] in ids and not r["iscrowd"]]
    images = [image for image in annotations.dataset["images"] if image["id"] in ids]
    return type(annotations)({**annotations.dataset, "images": images, "annotations": records}, annotations.folder)


@pytest.mark.parametrize("write", [_yolo_of, _voc_of, _labelme_of])
@pytest.mark.parametrize("name", ["nuclei", "coco_mini"])
def test_real_boxes_through_each_format(shared, tmp_path, name, write):
    annotations = _real(shared, name, "val", 20)
    write(annotations, tmp_path / "set")
    reading = DetectionSet(DataConfig(root=str(tmp_path / "set"))).whole()
    # A box of a pixel in VOC's counting has no area, as xmax is xmin.
    narrow = sum(min(r["bbox"][2:]) <= 1 for r in annotations.dataset["annotations"]) if write is _voc_of else 0
    assert len(check(reading).faults) == narrow
    there = _by_image(load(reading, "skip"))
    for file_name, expected in _by_image(annotations).items():
        wanted = [box for box in expected if write is not _voc_of or min(box[3:]) > 1]
        found = there[file_name]
        assert [box[0] for box in found] == [box[0] for box in wanted]
        np.testing.assert_allclose(
            np.array([box[1:] for box in found]).reshape(-1, 4),
            np.array([box[1:] for box in wanted]).reshape(-1, 4),
            atol=1e-6,
        )


def test_real_masks_through_pictures(shared, tmp_path):
    """Where objects overlap, as on two images of this set, the last one has the pixel."""
    annotations = _real(shared, "nuclei", "val", 20)
    _voc_masks_of(annotations, tmp_path / "set")
    found = load(DetectionSet(DataConfig(root=str(tmp_path / "set"))).whole())
    assert len(found.dataset["annotations"]) == len(annotations.dataset["annotations"])
    masks_of = {Path(image.file_name).name: found.annotations_of(image.id) for image in found.images}
    for image in annotations.images:
        expected = _masks(annotations.annotations_of(image.id), image)
        for number, mask in enumerate(expected):
            mask[expected[number + 1 :].any(axis=0)] = 0
        np.testing.assert_array_equal(_masks(masks_of[image.path.name], image), expected)


def _masks(records, image):
    return decode_masks([record["segmentation"] for record in records], image.height, image.width)


def _by_image(annotations):
    names = dict(annotations.categories)
    return {
        Path(image.file_name).name: [
            (names[record["category_id"]], *record["bbox"]) for record in annotations.annotations_of(image.id)
        ]
        for image in annotations.images
    }
