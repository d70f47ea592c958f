import copy
import json
import os

import numpy as np
import pytest
from faster_coco_eval.core import mask as coco_mask
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from latentgnn.errors import UserError
from latentgnn.tasks.detection.check import check_split
from latentgnn.tasks.detection.segmentations import decode_counts, decode_masks
from latentgnn.tasks.detection.sound_sets import load_split

# Encoded by hand: 20 * 16 = 320 pixels; runs 85 (5 + 5 * 16), 4, 12, 4 and 215 to the end.
RUNS = [85, 4, 12, 4, 215]
SQUARES = {"size": [16, 20], "counts": RUNS}


def _sound():
    """A set of three images without a fault; every test breaks one thing in it."""
    return {
        "images": [
            {"id": 10, "file_name": "a.png", "width": 20, "height": 16},
            {"id": 20, "file_name": "b.jpg", "width": 20, "height": 16},
            {"id": 30, "file_name": "empty.png", "width": 20, "height": 16},
        ],
        "annotations": [
            _annotation(1, 10, [[2, 2, 8, 2, 8, 8, 2, 8]]),
            _annotation(2, 10, SQUARES),
            _annotation(3, 20, SQUARES, iscrowd=1),
        ],
        "categories": [{"id": 4, "name": "cat"}, {"id": 9, "name": "dog"}],
    }


def _annotation(id, image_id, segmentation, **changes):
    record = {"id": id, "image_id": image_id, "category_id": 4, "bbox": [2, 2, 6, 6], "area": 36, "iscrowd": 0}
    return {**record, "segmentation": segmentation, **changes}


@pytest.fixture
def folder(tmp_path):
    """The images of `_sound`."""
    images = tmp_path / "images"
    images.mkdir()
    pixels = np.random.default_rng(0).integers(0, 255, (16, 20, 3), np.uint8)
    for name in ("a.png", "b.jpg", "empty.png"):
        Image.fromarray(pixels).save(images / name)
    return images


def _write(folder, dataset):
    path = folder.parent / "instances.json"
    path.write_text(dataset if isinstance(dataset, str) else json.dumps(dataset, default=list))
    return path


def _broken(*keys, **changes):
    """The sound set with fields of one record changed, or deleted where the value is None."""
    dataset = _sound()
    record = dataset
    for key in keys:
        record = record[key]
    for name, value in changes.items():
        if value is None:
            del record[name]
        else:
            record[name] = value
    return dataset


def _only(report):
    assert len(report.faults) == 1, report.text()
    return report.faults[0]


def test_a_sound_set(folder):
    path = _write(folder, _sound())
    report = check_split(path, folder)
    assert report.faults == []
    assert report.counts == {"images": 3, "objects": 2, "crowds": 1, "categories": 2}
    assert report.text() == f"{path}: images 3, objects 2, crowds 1, categories 2, faults 0"
    annotations = load_split(path, folder)
    assert annotations.dataset == _sound()
    assert (annotations.skipped_images, annotations.skipped_annotations, annotations.skipped) == (0, 0, "")


def _rle(**changes):
    return {**SQUARES, **changes}


IMAGE = "images[1], id 20"
OBJECT = "annotations[1], id 2"
RECORD_FAULTS = {
    "duplicated image": (_broken("images", 2, id=10), "images[2], id 10", "duplicated id: images[0], id 10"),
    "duplicated annotation": (
        _broken("annotations", 1, id=1),
        "annotations[1], id 1",
        "duplicated id: annotations[0], id 1",
    ),
    "width of text": (_broken("images", 1, width="20"), IMAGE, 'expected a width of 1 or more, but it is "20"'),
    "no height": (_broken("images", 1, height=None), IMAGE, "height of 1 or more, but it is missing"),
    "no file name": (_broken("images", 1, file_name=None), IMAGE, "file_name, but it is missing"),
    "image id of text": (_broken("images", 2, id="30"), "images[2]", 'integer id of 0 or more, but it is "30"'),
    "no annotation id": (
        _broken("annotations", 1, id=None),
        "annotations[1]",
        "integer id of 0 or more, but it is missing",
    ),
    "no category": (_broken("annotations", 1, category_id=None), OBJECT, "category_id, but it is missing"),
    "unknown category": (_broken("annotations", 1, category_id=5), OBJECT, "unknown category: category_id 5"),
    "no image": (_broken("annotations", 1, image_id=None), OBJECT, "image_id, but it is missing"),
    "unknown image": (_broken("annotations", 1, image_id=11), OBJECT, "unknown image: image_id 11"),
    "iscrowd": (_broken("annotations", 1, iscrowd=2), OBJECT, "iscrowd of 0 or 1, but it is 2"),
    "area": (_broken("annotations", 1, area="large"), OBJECT, 'an area of 0 or more, but it is "large"'),
    "no box": (_broken("annotations", 1, bbox=None), OBJECT, "bbox of four numbers, but it is missing"),
    "box of three": (_broken("annotations", 1, bbox=[1, 2, 3]), OBJECT, "four numbers, but it is [1, 2, 3]"),
    "negative id": (_broken("images", 2, id=-30), "images[2]", "integer id of 0 or more, but it is -30"),
    "negative area": (_broken("annotations", 1, area=-1), OBJECT, "an area of 0 or more, but it is -1"),
    "crowd of true": (_broken("annotations", 1, iscrowd=True), OBJECT, "iscrowd of 0 or 1, but it is true"),
    "huge image": (_broken("images", 2, width=50_000, height=50_000), "images[2], id 30", "50,000 x 50,000 pixels"),
    "oblong image": (_broken("images", 2, width=20_000, height=1), "images[2], id 30", "20000 x 1 pixels are too"),
    "mask of no pixel": (
        _broken("annotations", 1, segmentation={"size": [16, 20], "counts": [320]}),
        OBJECT,
        "the mask does not decode: it has no pixel",
    ),
    "polygon of no pixel": (
        _broken("annotations", 1, segmentation=[[4.1, 4.1, 4.2, 4.1, 4.2, 4.2]]),
        OBJECT,
        "its polygons enclose no pixel",
    ),
    "mask of a float size": (
        _broken("annotations", 1, segmentation={"size": [16.0, 20.0], "counts": [100, 20, 200]}),
        OBJECT,
        "its size (height, width) is [16.0, 20.0], but the image's is [16, 20]",
    ),
    "flat box": (
        _broken("annotations", 1, bbox=[2, 2, 6, 0]),
        OBJECT,
        "[2, 2, 6, 0] (x, y, width, height) has no area",
    ),
    "box inside out": (_broken("annotations", 1, bbox=[8, 2, -6, 6]), OBJECT, "has no area"),
    "box right out": (_broken("annotations", 1, bbox=[15, 2, 6.1, 6]), OBJECT, "lies outside the image of 20 x 16"),
    "box out above": (_broken("annotations", 1, bbox=[2, -1.1, 6, 6]), OBJECT, "lies outside"),
    "box in the tolerance alone": (_broken("annotations", 1, bbox=[20, 2, 0.5, 6]), OBJECT, "lies outside"),
    "no mask": (_broken("annotations", 1, segmentation=[]), OBJECT, "no segmentation, which other"),
    "mask of text": (_broken("annotations", 1, segmentation="x"), OBJECT, "expected polygons or a run-length encoding"),
    "odd polygon": (
        _broken("annotations", 1, segmentation=[[1, 1, 5, 1, 5, 5, 1]]),
        OBJECT,
        "does not decode: polygon 0 has 7 numbers",
    ),
    "short polygon": (
        _broken("annotations", 1, segmentation=[[1, 1, 5, 1, 5, 5], [1, 1, 5, 5]]),
        OBJECT,
        "polygon 1 has 4 numbers",
    ),
    "polygon of text": (
        _broken("annotations", 1, segmentation=[[1, 1, 5, 1, 5, "5"]]),
        OBJECT,
        "not a list of numbers",
    ),
    "flat polygon": (_broken("annotations", 1, segmentation=[1, 1, 5, 1, 5, 5]), OBJECT, "polygon 0 is 1, not a list"),
    "far polygon": (_broken("annotations", 1, segmentation=[[1, 1, 9e9, 1, 5, 5]]), OBJECT, "reaches far outside"),
    "mask of another size": (
        _broken("annotations", 1, segmentation=_rle(size=[20, 16])),
        OBJECT,
        "does not decode: its size (height, width) is [20, 16], but the image's is [16, 20]",
    ),
    "no counts": (_broken("annotations", 1, segmentation={"size": [16, 20]}), OBJECT, "counts as a string or a list"),
    "counts of text": (_broken("annotations", 1, segmentation=_rle(counts=[320, "1"])), OBJECT, "list of integers"),
    "short runs": (_broken("annotations", 1, segmentation=_rle(counts=[85, 4])), OBJECT, "add up to 89 pixels"),
    "negative run": (_broken("annotations", 1, segmentation=_rle(counts=[321, -1])), OBJECT, "a run of -1 pixels"),
    "cut string": (_broken("annotations", 1, segmentation=_rle(counts="e24<0`")), OBJECT, "are cut short"),
    "bad letter": (
        _broken("annotations", 1, segmentation=_rle(counts="e2 4")),
        OBJECT,
        "outside the encoding's alphabet",
    ),
    "no ASCII": (_broken("annotations", 1, segmentation=_rle(counts="e2☃")), OBJECT, "outside the encoding's alphabet"),
    "empty string": (_broken("annotations", 1, segmentation=_rle(counts="")), OBJECT, "counts are empty"),
    "long number": (_broken("annotations", 1, segmentation=_rle(counts="oooooooooo0")), OBJECT, "more than 32 bits"),
}


@pytest.mark.parametrize("name", RECORD_FAULTS)
def test_faults_in_records(folder, name):
    dataset, record, message = RECORD_FAULTS[name]
    path = _write(folder, dataset)
    report = check_split(path, folder)
    fault = _only(report)
    assert fault.file == path
    assert fault.record == record
    assert message in fault.message
    assert not fault.fatal
    assert f"{path}: {record}: " in report.text()

    with pytest.raises(UserError) as caught:
        load_split(path, folder)
    assert str(fault) in str(caught.value)
    assert "--data.on_fault skip" in str(caught.value)

    kept = load_split(path, folder, "skip")
    assert str(fault) in kept.skipped
    assert kept.skipped_images + kept.skipped_annotations > 0
    assert len(kept.images) == 3 - kept.skipped_images
    assert len(kept.dataset["annotations"]) == 3 - kept.skipped_annotations
    left = _write(folder, kept.dataset)
    assert check_split(left, folder).faults == []


def test_a_box_a_pixel_outside_is_no_fault(folder):
    path = _write(folder, _broken("annotations", 1, bbox=[-1, -1, 22, 18]))
    assert check_split(path, folder).faults == []


def test_records_that_are_no_objects(folder):
    dataset = _sound()
    dataset["annotations"].append("x")
    fault = _only(check_split(_write(folder, dataset), folder))
    assert (fault.record, fault.message) == ("annotations[3]", 'expected an object, but it is "x"')
    assert load_split(_write(folder, dataset), folder, "skip").skipped_annotations == 1


def test_skipping_leaves_out_what_it_names(folder):
    kept = load_split(_write(folder, _broken("annotations", 1, category_id=5)), folder, "skip")
    assert [record["id"] for record in kept.dataset["annotations"]] == [1, 3]
    assert (kept.skipped_images, kept.skipped_annotations) == (0, 1)
    assert kept.skipped.endswith("left out: images 0, annotations 1")
    (folder / "a.png").unlink()
    kept = load_split(_write(folder, _sound()), folder, "skip")
    assert [image.id for image in kept.images] == [20, 30]
    assert [record["id"] for record in kept.dataset["annotations"]] == [3]
    assert (kept.skipped_images, kept.skipped_annotations) == (1, 2)


def test_nothing_left(folder):
    for name in ("a.png", "b.jpg", "empty.png"):
        (folder / name).unlink()
    with pytest.raises(UserError, match="no image is left"):
        load_split(_write(folder, _sound()), folder, "skip")


FATAL = {
    "a number that is none": (
        _broken("annotations", 1, bbox=[1, 2, float("nan"), 3]),
        "annotations[1].bbox[2]",
        "nan is not a finite number",
    ),
    "a key twice": ('{"images": [], "images": []}', "", 'the key "images" is given twice'),
    "deep": ('{"images": ' + "[" * 100_000, "", "nested too deeply"),
    "malformed": ('{"images": [],\n "annotations": [}', "line 2, column 18", "malformed JSON"),
    "empty file": ("", "line 1, column 1", "malformed JSON"),
    "cut short": ('{\n "images": [', "line 2, column 13", "malformed JSON"),
    "a list": ("[1]", "", "expected a JSON object at the top, but it is [1]"),
    "no list": (_broken(annotations=None), "", "the list 'annotations' is missing"),
    "wrong kind": (_broken(categories={"4": "cat"}), "categories", 'expected a list, but it is {"4": "cat"}'),
    "no images": (_broken(images=[]), "images", "the list is empty"),
    "duplicated category": (
        _broken("categories", 1, id=4),
        "categories[1], id 4",
        "duplicated id: categories[0], id 4",
    ),
    "category without name": (_broken("categories", 1, name=None), "categories[1], id 9", "a name, but it is missing"),
}


@pytest.mark.parametrize("name", FATAL)
def test_faults_that_cannot_be_skipped(folder, name):
    dataset, record, message = FATAL[name]
    path = _write(folder, dataset)
    fault = _only(check_split(path, folder))
    assert fault.file == path
    assert fault.record.startswith(record)
    assert message in fault.message
    assert fault.fatal
    for policy in ("stop", "skip"):
        with pytest.raises(UserError) as caught:
            load_split(path, folder, policy)
        assert str(fault) in str(caught.value)
        assert "on_fault" not in str(caught.value)


def test_text_that_is_no_utf8(folder):
    path = folder.parent / "instances.json"
    path.write_bytes(b'{"images":\n "\xff"}')
    fault = _only(check_split(path, folder))
    assert (fault.record, fault.fatal) == ("line 2, column 3", True)


def test_missing_file_and_folder(folder, tmp_path):
    report = check_split(tmp_path / "absent.json", tmp_path / "nowhere")
    assert [str(fault) for fault in report.faults] == [
        f"{tmp_path / 'absent.json'}: there is no such annotation file",
        f"{tmp_path / 'nowhere'}: no such image folder",
    ]
    with pytest.raises(UserError, match="no such annotation file"):
        load_split(tmp_path / "absent.json", folder, "skip")


def _file_fault(folder, name, record):
    path = _write(folder, _sound())
    report = check_split(path, folder)
    fault = _only(report)
    assert fault.file == folder / name
    assert fault.record == record
    assert report.bad_images == {int(record.split()[-1])}
    assert load_split(path, folder, "skip").skipped_images == 1
    return fault.message


def test_missing_image(folder):
    (folder / "b.jpg").unlink()
    assert "there is no such image" in _file_fault(folder, "b.jpg", "images[1], id 20")


@pytest.mark.parametrize(("name", "record"), [("a.png", "images[0], id 10"), ("b.jpg", "images[1], id 20")])
@pytest.mark.parametrize("left", [0.4, 0.97])
def test_truncated_image(folder, name, record, left):
    data = (folder / name).read_bytes()
    (folder / name).write_bytes(data[: int(left * len(data))])
    assert "cannot be read" in _file_fault(folder, name, record)


def test_damaged_and_foreign_files(folder):
    data = bytearray((folder / "a.png").read_bytes())
    data[len(data) // 2] ^= 0xFF
    (folder / "a.png").write_bytes(data)
    assert "cannot be read" in _file_fault(folder, "a.png", "images[0], id 10")
    (folder / "a.png").write_text("no image")
    assert "not an image" in _file_fault(folder, "a.png", "images[0], id 10")


@pytest.mark.parametrize(("name", "record"), [("a.png", "images[0], id 10"), ("b.jpg", "images[1], id 20")])
def test_size_that_disagrees(folder, name, record):
    Image.new("RGB", (16, 20)).save(folder / name)
    message = _file_fault(folder, name, record)
    assert "16 x 20" in message
    assert "20 x 16" in message


@pytest.mark.parametrize("suffix", ["png", "jpg"])
def test_size_as_stored_or_upright_agrees(folder, suffix):
    dataset = _sound()
    exif = Image.Exif()
    exif[0x0112] = 6
    dataset["images"][0]["file_name"] = f"turned.{suffix}"
    for size in ((20, 16), (16, 20)):
        Image.new("RGB", size).save(folder / f"turned.{suffix}", exif=exif)
        assert check_split(_write(folder, dataset), folder).faults == []
    Image.new("RGB", (20, 17)).save(folder / f"turned.{suffix}", exif=exif)
    assert len(check_split(_write(folder, dataset), folder).faults) == 1


def test_every_fault_is_reported_at_once(folder):
    dataset = _sound()
    (folder / "empty.png").unlink()
    dataset["annotations"][0]["category_id"] = 77
    dataset["annotations"][1].update(bbox=[0, 0, 0, 0], segmentation=[[1]])
    report = check_split(_write(folder, dataset), folder)
    assert [fault.record for fault in report.faults] == [
        "annotations[0], id 1",
        "annotations[1], id 2",
        "annotations[1], id 2",
        "images[2], id 30",
    ]
    assert report.bad_annotations == {1, 2}
    assert report.bad_images == {30}
    assert report.text().endswith("faults 4")


def test_an_error_lists_twenty_faults_and_counts_the_rest(folder):
    dataset = _sound()
    dataset["annotations"] = [_annotation(id, 10, SQUARES, category_id=77) for id in range(1, 26)]
    path = _write(folder, dataset)
    with pytest.raises(UserError) as caught:
        load_split(path, folder)
    assert str(caught.value).count("unknown category") == 20
    assert "... and 5 more" in str(caught.value)
    assert check_split(path, folder).text().count("unknown category") == 25


def test_a_set_of_boxes_alone_is_sound(folder):
    dataset = _sound()
    for annotation in dataset["annotations"]:
        del annotation["segmentation"]
    path = _write(folder, dataset)
    assert check_split(path, folder).faults == []
    assert not load_split(path, folder).has_masks


def test_records_are_not_changed_by_the_check(folder):
    dataset = _sound()
    before = copy.deepcopy(dataset)
    check_split(_write(folder, dataset), folder)
    assert dataset == before


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(0, 5000), min_size=1, max_size=40))
def test_counts_decode_as_the_coco_api_encodes_them(runs):
    height, width = 1, sum(runs)
    if width == 0:
        return
    encoded = coco_mask.frPyObjects({"size": [height, width], "counts": runs}, height, width)["counts"]
    assert decode_counts(encoded.decode()).tolist() == runs


def test_sound_compressed_counts_pass(folder):
    mask = decode_masks([SQUARES], 16, 20)[0]
    compressed = {"size": [16, 20], "counts": coco_mask.encode(np.asfortranarray(mask))["counts"].decode()}
    assert decode_counts(compressed["counts"]).tolist() == RUNS
    assert check_split(_write(folder, _broken("annotations", 1, segmentation=compressed)), folder).faults == []


def test_masks_that_memory_should_not_hold(folder):
    dataset = _sound()
    dataset["images"][2] |= {"width": 4000, "height": 4000}
    Image.new("L", (4000, 4000)).save(folder / "empty.png")
    whole = {"size": [4000, 4000], "counts": [0, 16_000_000]}
    # 134 masks of 16 million bytes are less than 2 GiB, 135 are more.
    dataset["annotations"] += [_annotation(100 + number, 30, whole) for number in range(134)]
    assert check_split(_write(folder, dataset), folder).faults == []
    dataset["annotations"].append(_annotation(500, 30, whole))
    fault = _only(check_split(_write(folder, dataset), folder))
    assert fault.record == "images[2], id 30"
    assert "the masks of its 135 objects take 2.0 GiB" in fault.message


def test_what_is_no_file(folder):
    (folder / "empty.png").unlink()
    os.mkfifo(folder / "empty.png")
    fault = _only(check_split(_write(folder, _sound()), folder))
    assert "expected a file; this is a pipe" in fault.message
