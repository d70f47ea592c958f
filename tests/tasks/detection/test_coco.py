import json
import pickle
import tracemalloc

import numpy as np
import pytest
import torch
from faster_coco_eval.core import mask as coco_mask
from PIL import Image
from torch.utils.data import DataLoader

from latentgnn.errors import UserError
from latentgnn.tasks.detection.coco import (
    CocoAnnotations,
    CocoTrainingSet,
    CocoValidationSet,
    decode_masks,
    find_split,
)
from latentgnn.tasks.detection.config import AugmentConfig, DataConfig
from latentgnn.tasks.detection.sound_sets import load_split
from latentgnn.training.loading import batches, make_loader

OFF = AugmentConfig(horizontal_flip=0.0)
HEIGHT, WIDTH = 8, 12


def _l_shape():
    mask = np.zeros((HEIGHT, WIDTH), np.uint8)
    mask[2:7, 3] = 1
    mask[6, 3:9] = 1
    return mask


def _uncompressed(mask):
    """Run lengths in column-major order, the first of zeros, by the format's definition."""
    counts, value, run = [], 0, 0
    for pixel in mask.flatten(order="F"):
        if pixel != value:
            counts.append(run)
            value, run = pixel, 0
        run += 1
    return {"size": list(mask.shape), "counts": [*counts, run]}


def _compressed(mask):
    encoding = coco_mask.encode(np.asfortranarray(mask))
    return {"size": [HEIGHT, WIDTH], "counts": encoding["counts"].decode()}


def _annotation(id=1, image_id=1, category_id=7, **changes):
    record = {
        "id": id,
        "image_id": image_id,
        "category_id": category_id,
        "bbox": [3, 2, 6, 5],
        "area": 10,
        "iscrowd": 0,
        "segmentation": _uncompressed(_l_shape()),
    }
    return {**record, **changes}


def _annotations(folder, annotations, images=None, categories=((7, "seven"), (3, "three"), (90, "ninety"))):
    """A set of black images, or of those in the folder."""
    if images is None:
        images = [{"id": 1, "file_name": "1.png", "width": WIDTH, "height": HEIGHT}]
    for image in images:
        if not (folder / image["file_name"]).exists():
            Image.new("RGB", (image["width"], image["height"])).save(folder / image["file_name"])
    dataset = {
        "images": images,
        "annotations": annotations,
        "categories": [{"id": id, "name": name} for id, name in categories],
    }
    return CocoAnnotations(dataset, folder)


def _touch(root, *paths):
    for path in paths:
        target = root / path
        if target.suffix:
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_text("{}")
        else:
            target.mkdir(parents=True, exist_ok=True)


@pytest.mark.parametrize(
    ("present", "file", "folder"),
    [
        (["annotations/instances_train2017.json", "train2017"], "annotations/instances_train2017.json", "train2017"),
        (
            ["annotations/instances_train2014.json", "images/train2014"],
            "annotations/instances_train2014.json",
            "images/train2014",
        ),
        (["annotations/instances_train.json", "train", "images/train"], "annotations/instances_train.json", "train"),
        # A file and a folder of one year go before a mixture.
        (
            ["annotations/instances_train2017.json", "annotations/instances_train2014.json", "train2014"],
            "annotations/instances_train2014.json",
            "train2014",
        ),
        (["annotations/instances_train.json", "train2017"], "annotations/instances_train.json", "train2017"),
    ],
)
def test_find_split_by_names(tmp_path, present, file, folder):
    _touch(tmp_path, *present)
    assert find_split(DataConfig(root=str(tmp_path)), "train") == (tmp_path / file, tmp_path / folder)


def test_find_split_as_given(tmp_path):
    _touch(tmp_path, "my.json", "pictures", "annotations/instances_val2017.json", "val2017")
    config = DataConfig(root=str(tmp_path), val_annotations="my.json", val_images="pictures")
    assert find_split(config, "val") == (tmp_path / "my.json", tmp_path / "pictures")
    config = DataConfig(root=str(tmp_path), val_images="pictures")
    assert find_split(config, "val") == (tmp_path / "annotations/instances_val2017.json", tmp_path / "pictures")


def test_find_split_says_what_it_looked_for(tmp_path):
    _touch(tmp_path, "annotations/instances_train2017.json", "train2017")
    with pytest.raises(UserError) as caught:
        find_split(DataConfig(root=str(tmp_path)), "val")
    for name in ("instances_val2017.json", "instances_val2014.json", "instances_val.json", "images/val2014", "val2017"):
        assert name in str(caught.value)
    assert "data.val_annotations" in str(caught.value)
    with pytest.raises(UserError, match=r"looked for \S+nowhere; name it with data\.train_images"):
        find_split(DataConfig(root=str(tmp_path), train_images="nowhere"), "train")
    with pytest.raises(UserError, match="no folder"):
        find_split(DataConfig(root=str(tmp_path / "absent")), "train")
    with pytest.raises(UserError, match=r"data\.root is null"):
        find_split(DataConfig(), "train")


def test_labels_ascend_with_category_ids(tmp_path):
    annotations = _annotations(tmp_path, [_annotation(1, category_id=7), _annotation(2, category_id=90)])
    assert annotations.categories == [(3, "three"), (7, "seven"), (90, "ninety")]
    assert annotations.category_of_label == {1: 3, 2: 7, 3: 90}
    _, target = CocoTrainingSet(annotations, augment=OFF, seed=0)[0, 0]
    assert target["labels"].tolist() == [2, 3]
    assert target["labels"].dtype == torch.int64


def test_masks_of_every_encoding_agree(tmp_path):
    mask = _l_shape()
    rectangle = [[2, 1, 6, 1, 6, 4, 2, 4], [8, 5, 10, 5, 10, 8, 8, 8]]
    decoded = decode_masks([_uncompressed(mask), _compressed(mask), rectangle], HEIGHT, WIDTH)
    assert decoded.dtype == np.uint8
    assert np.array_equal(decoded[0], mask)
    assert np.array_equal(decoded[1], mask)
    expected = np.zeros_like(mask)
    expected[1:4, 2:6] = 1
    expected[5:8, 8:10] = 1
    assert np.array_equal(decoded[2], expected)
    assert decode_masks([], HEIGHT, WIDTH).shape == (0, HEIGHT, WIDTH)


def test_sample(tmp_path):
    crowd = _annotation(2, iscrowd=1)
    annotations = _annotations(tmp_path, [_annotation(), crowd])
    assert annotations.annotations_of(1)[1] == crowd
    image, target = CocoTrainingSet(annotations, augment=OFF, seed=0)[3, 0]
    assert type(image) is type(target["masks"]) is type(target["boxes"]) is torch.Tensor
    assert image.shape == (3, HEIGHT, WIDTH)
    assert target["boxes"].tolist() == [[3, 2, 9, 7]]
    assert target["boxes"].dtype == torch.float32
    assert np.array_equal(target["masks"].numpy(), _l_shape()[None])
    assert target["masks"].dtype == torch.uint8
    assert target["image_id"] == 1
    image, target = CocoValidationSet(annotations)[0]
    assert image.shape == (3, HEIGHT, WIDTH)
    assert target == {"image_id": 1, "size": (HEIGHT, WIDTH)}


def test_images_without_objects(tmp_path):
    _, target = CocoTrainingSet(_annotations(tmp_path, []), augment=AugmentConfig(), seed=0)[0, 0]
    assert target["boxes"].shape == (0, 4)
    assert target["labels"].shape == (0,)
    assert target["masks"].shape == (0, HEIGHT, WIDTH)


def test_boxes_a_fraction_outside_are_clamped(tmp_path):
    annotations = _annotations(tmp_path, [_annotation(bbox=[-0.5, 2, 12.9, 6.5])])
    _, target = CocoTrainingSet(annotations, augment=OFF, seed=0)[0, 0]
    assert target["boxes"].tolist() == [[0, 2, 12, 8]]


def test_a_set_of_boxes_alone(tmp_path):
    record = _annotation()
    del record["segmentation"], record["area"], record["iscrowd"]
    annotations = _annotations(tmp_path, [record])
    assert not annotations.has_masks
    assert annotations.dataset["annotations"][0]["area"] == 30
    assert annotations.dataset["annotations"][0]["iscrowd"] == 0
    _, target = CocoTrainingSet(annotations, augment=OFF, seed=0)[0, 0]
    assert "masks" not in target


def test_a_missing_area_is_the_masks(tmp_path):
    record = _annotation()
    del record["area"]
    assert _annotations(tmp_path, [record]).dataset["annotations"][0]["area"] == 10


@pytest.mark.parametrize("mode", ["L", "LA", "RGBA", "P", "CMYK", "1", "I;16"])
def test_image_modes(tmp_path, mode):
    pixels = np.zeros((HEIGHT, WIDTH), np.uint8)
    pixels[:4] = 255
    name = "1.tif" if mode == "CMYK" else "1.png"
    image = Image.fromarray(pixels.astype(np.uint16) * 257) if mode == "I;16" else Image.fromarray(pixels)
    if mode != "I;16":
        image = image.convert("RGB").convert(mode)
    image.save(tmp_path / name)
    with Image.open(tmp_path / name) as stored:
        assert stored.mode == mode
    images = [{"id": 1, "file_name": name, "width": WIDTH, "height": HEIGHT}]
    annotations = _annotations(tmp_path, [_annotation()], images)
    for sample in (CocoTrainingSet(annotations, augment=OFF, seed=0)[0, 0], CocoValidationSet(annotations)[0]):
        assert torch.equal(sample[0], torch.from_numpy(pixels / 255).float().expand(3, -1, -1))


@pytest.mark.parametrize("annotated", ["upright", "stored"])
def test_exif_orientation_follows_the_annotated_size(tmp_path, annotated):
    stored = np.zeros((HEIGHT, WIDTH, 3), np.uint8)
    stored[0, 0] = 255
    exif = Image.Exif()
    exif[0x0112] = 6  # shown turned clockwise by a quarter: the top left goes to the top right
    Image.fromarray(stored).save(tmp_path / "1.png", exif=exif)
    width, height = (HEIGHT, WIDTH) if annotated == "upright" else (WIDTH, HEIGHT)
    images = [{"id": 1, "file_name": "1.png", "width": width, "height": height}]
    polygon = [[1, 1, 4, 1, 4, 4, 1, 4]]
    annotations = _annotations(tmp_path, [_annotation(bbox=[1, 1, 3, 3], segmentation=polygon)], images)
    image, target = CocoTrainingSet(annotations, augment=OFF, seed=0)[0, 0]
    assert image.shape == (3, height, width)
    assert target["masks"].shape == (1, height, width)
    assert image[0].nonzero().tolist() == ([[0, HEIGHT - 1]] if annotated == "upright" else [[0, 0]])


def test_groups(tmp_path):
    sizes = [(12, 8), (8, 12), (9, 9)]
    images = [{"id": i, "file_name": f"{i}.png", "width": w, "height": h} for i, (w, h) in enumerate(sizes)]
    annotations = _annotations(tmp_path, [], images)
    grouped = CocoTrainingSet(annotations, augment=OFF, seed=0)
    assert [grouped.group_of(index) for index in range(len(grouped))] == [0, 1, 0]
    ungrouped = CocoTrainingSet(annotations, augment=OFF, seed=0, group_by_aspect=False)
    assert [ungrouped.group_of(index) for index in range(len(ungrouped))] == [0, 0, 0]


BUSY = AugmentConfig(
    horizontal_flip=0.5, vertical_flip=0.5, quarter_turns=True, crop=24, scale=(0.7, 1.5), brightness=0.4, hue=0.2
)


@pytest.fixture
def noise(tmp_path):
    """Six images of noise."""
    generator = np.random.default_rng(0)
    images = [{"id": i, "file_name": f"{i}.png", "width": 32, "height": 28} for i in (5, 8, 13, 21, 34, 55)]
    for image in images:
        Image.fromarray(generator.integers(0, 255, (28, 32, 3), np.uint8)).save(tmp_path / image["file_name"])
    polygon = [[4, 4, 28, 4, 28, 24, 4, 24]]
    records = [_annotation(i["id"], i["id"], bbox=[4, 4, 24, 20], segmentation=polygon) for i in images]
    return _annotations(tmp_path, records, images)


def _samples(training_set, epoch, workers):
    keys = [(epoch, index) for index in range(len(training_set))]
    return list(DataLoader(training_set, sampler=keys, batch_size=None, num_workers=workers))


def _equal(a, b):
    return a[0].shape == b[0].shape and torch.equal(a[0], b[0]) and all(torch.equal(a[1][k], b[1][k]) for k in KEYS)


KEYS = ("boxes", "labels", "masks")


def test_randomness_depends_on_seed_epoch_and_image_alone(noise):
    training_set = CocoTrainingSet(noise, augment=BUSY, seed=1)
    here = _samples(training_set, 0, 0)
    torch.manual_seed(99)
    there = _samples(training_set, 0, 2)
    assert all(_equal(a, b) for a, b in zip(here, there, strict=True))
    assert _equal(training_set[0, 3], here[3])  # in any order
    for other in (_samples(training_set, 1, 0), _samples(CocoTrainingSet(noise, augment=BUSY, seed=2), 0, 0)):
        assert not any(_equal(a, b) for a, b in zip(here, other, strict=True))


def test_randomness_follows_the_image_not_its_place(noise, tmp_path):
    dataset = noise.dataset
    reordered = CocoAnnotations({**dataset, "images": dataset["images"][::-1]}, tmp_path)
    forward = CocoTrainingSet(noise, augment=BUSY, seed=1)[4, 1]
    backward = CocoTrainingSet(reordered, augment=BUSY, seed=1)[4, 4]
    assert forward[1]["image_id"] == backward[1]["image_id"] == 8
    assert _equal(forward, backward)


def _write_many(folder, *, images=100, objects=20):
    """A file of megabytes: outlines of a hundred numbers, and one image for all records."""
    Image.new("RGB", (64, 48)).save(folder / "1.jpg")
    outline = np.linspace(0, 2 * np.pi, 50)
    polygon = np.stack([30 + 20 * np.cos(outline), 24 + 18 * np.sin(outline)], axis=1).ravel().tolist()
    annotation = {"category_id": 7, "bbox": [10, 6, 40, 36], "area": 1100, "iscrowd": 0, "segmentation": [polygon]}
    # The objects of an image do not lie together.
    records = [{**annotation, "id": id, "image_id": 1 + id % images} for id in range(images * objects)]
    pictures = [{"id": id, "file_name": "1.jpg", "width": 64, "height": 48} for id in range(1, images + 1)]
    path = folder / "many.json"
    path.write_text(
        json.dumps({"images": pictures, "annotations": records, "categories": [{"id": 7, "name": "seven"}]})
    )
    return path


def test_annotations_stay_in_their_file(tmp_path):
    path = _write_many(tmp_path)
    tracemalloc.start()
    try:
        annotations = load_split(path, tmp_path)
        training_set = CocoTrainingSet(annotations, augment=OFF, seed=0)
        held, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    # What is held of a record are places and numbers; the text of one is 50 times as long.
    assert held < path.stat().st_size / 20
    # What processes get that are not forked.
    sent = pickle.dumps(training_set)
    assert len(sent) < path.stat().st_size / 20
    image, target = pickle.loads(sent)[0, 99]
    assert image.shape == (3, 48, 64)
    assert target["boxes"].tolist() == [[10, 6, 50, 42]] * 20
    assert target["image_id"] == 100
    assert [record["id"] for record in annotations.annotations_of(5)] == list(range(4, 2000, 100))


@pytest.mark.parametrize("workers", [0, 2])
def test_a_file_that_changes_under_a_run_is_told(tmp_path, workers):
    path = _write_many(tmp_path, images=3)
    training_set = CocoTrainingSet(load_split(path, tmp_path), augment=OFF, seed=0)
    path.write_text(path.read_text().replace('"area": 1100', '"area": 1101'))
    loader = make_loader(training_set, list, workers=workers, seed=0, batch_sampler=[[(0, 0)], [(0, 1)]])
    with pytest.raises(UserError, match=r"many\.json has changed since it was checked"), batches(loader) as loaded:
        list(loaded)


def test_the_process_keeps_its_generator(noise):
    state = torch.get_rng_state()
    CocoTrainingSet(noise, augment=BUSY, seed=1)[0, 0]
    assert torch.equal(torch.get_rng_state(), state)


def test_flips_are_fair_across_neighbouring_epochs_and_images(noise):
    training_set = CocoTrainingSet(noise, augment=AugmentConfig(horizontal_flip=0.5), seed=0)
    plain = CocoValidationSet(noise)
    flips = np.array(
        [[not torch.equal(training_set[epoch, i][0], plain[i][0]) for i in range(6)] for epoch in range(100)]
    )
    assert abs(flips.mean() - 0.5) < 0.1  # five standard deviations
    assert (np.abs(flips.mean(0) - 0.5) < 0.25).all()
    assert abs((flips[:-1] == flips[1:]).mean() - 0.5) < 0.1


@pytest.mark.parametrize(
    ("name", "split", "images", "objects", "crowds", "categories"),
    [
        ("nuclei", "train", 427, 12909, 0, 1),
        ("nuclei", "val", 108, 3422, 0, 1),
        ("coco_mini", "train", 100, 740, 6, 69),
        ("coco_mini", "val", 100, 707, 5, 72),
    ],
)
def test_real_sets(shared, name, split, images, objects, crowds, categories):
    annotations = load_split(*find_split(DataConfig(root=str(shared(name))), split))
    assert len(annotations) == len(annotations.images) == images
    assert annotations.skipped == ""
    records = annotations.dataset["annotations"]
    assert sum(record["iscrowd"] == 0 for record in records) == objects
    assert sum(record["iscrowd"] == 1 for record in records) == crowds
    assert len({record["category_id"] for record in records}) == categories
    training_set = CocoTrainingSet(annotations, augment=OFF, seed=0)
    seen = 0
    for index in range(0, images, max(1, images // 20)):
        image, target = training_set[0, index]
        record = annotations.images[index]
        seen += len(target["labels"])
        assert image.shape == (3, record.height, record.width)
        own = [a for a in annotations.annotations_of(record.id) if not a["iscrowd"]]
        assert len(own) == len(target["boxes"])
        assert target["masks"].sum((1, 2)).tolist() == [a["area"] for a in own]
        assert [annotations.category_of_label[label] for label in target["labels"].tolist()] == [
            a["category_id"] for a in own
        ]
        corners = [[x, y, x + w, y + h] for x, y, w, h in (a["bbox"] for a in own)]
        assert target["boxes"].tolist() == corners
    assert seen > 0


def test_a_real_set_of_polygons_and_uncompressed_crowds(shared):
    path = shared("coco_eval") / "instances_val2014_100.json"
    annotations = CocoAnnotations(json.loads(path.read_text()), path.parent)
    for image in annotations.images:
        records = annotations.annotations_of(image.id)
        masks = decode_masks([record["segmentation"] for record in records], image.height, image.width)
        for mask, record in zip(masks, records, strict=True):
            if record["iscrowd"]:
                counts = record["segmentation"]["counts"]
                expected = np.repeat(np.arange(len(counts)) % 2, counts).reshape(mask.shape, order="F")
                assert np.array_equal(mask, expected)
            elif len(record["segmentation"]) == 1:  # the pieces of several may overlap, and are counted twice
                # The area is the polygon's; rasterising moves its outline by up to half a pixel.
                outline = 2 * (record["bbox"][2] + record["bbox"][3])
                assert abs(int(mask.sum()) - record["area"]) <= outline
