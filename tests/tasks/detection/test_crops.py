import json

import numpy as np
import pytest
import torch
from PIL import Image

from latentgnn.tasks.detection.coco import CocoAnnotations, CocoTrainingSet
from latentgnn.tasks.detection.config import AugmentConfig, CropConfig
from latentgnn.tasks.detection.crops import cut_target, draw_window
from latentgnn.tasks.detection.windows import Window


def rectangle(left, top, right, bottom):
    return [[left, top, right, top, right, bottom, left, bottom]]


BOXES = torch.tensor(
    [
        [10.0, 10, 30, 30],  # whole in the window
        [90, 40, 110, 60],  # 10 of 20 columns in it
        [96, 80, 196, 90],  # 4 of 100 columns
        [0, 0, 5, 5],  # touches its corner
        [120, 20, 140, 30],  # outside
    ]
)
LABELS = torch.tensor([1, 2, 3, 4, 5])
WINDOW, SIZE = Window(5, 5, 100, 100), (200, 120)


@pytest.mark.parametrize(("visible", "kept"), [(0.01, [1, 2, 3]), (0.1, [1, 2]), (0.5, [1, 2]), (0.51, [1])])
@pytest.mark.parametrize("with_masks", [True, False])
def test_objects_are_kept_by_their_visible_fraction(visible, kept, with_masks):
    masks = [rectangle(*box) for box in BOXES.tolist()] if with_masks else None
    target = cut_target(BOXES, LABELS, masks, WINDOW, SIZE, visible=visible)
    assert target["labels"].tolist() == kept
    expected = [[5.0, 5, 25, 25], [85, 35, 105, 55], [91, 75, 191, 85]]
    assert target["boxes"].tolist() == expected[: len(kept)]
    assert target["boxes"].canvas_size == (95, 95)
    assert ("masks" in target) == with_masks


def test_masks_are_cut_and_count_by_their_own_pixels():
    """An L of 10 x 40 and 30 x 10 pixels, of whose box a third is in the window, but 400 of 700 pixels."""
    corner = [[50, 20, 60, 20, 60, 50, 90, 50, 90, 60, 50, 60]]
    window, box = Window(0, 0, 60, 100), torch.tensor([[50.0, 20, 90, 60]])
    kept = cut_target(box, LABELS[:1], [corner], window, SIZE, visible=400 / 700)
    assert kept["masks"].shape == (1, 100, 60)
    assert kept["masks"][0, 20:60, 50:60].all()
    assert kept["masks"].sum() == 400
    assert not len(cut_target(box, LABELS[:1], [corner], window, SIZE, visible=401 / 700)["labels"])
    assert not len(cut_target(box, LABELS[:1], None, window, SIZE, visible=0.3)["labels"])


def test_a_window_without_objects_has_empty_targets():
    target = cut_target(
        BOXES, LABELS, [rectangle(*b) for b in BOXES.tolist()], Window(150, 0, 200, 20), SIZE, visible=0.1
    )
    assert target["boxes"].shape == (0, 4)
    assert target["masks"].shape == (0, 20, 50)


def windows(config, boxes, size, number=200):
    torch.manual_seed(0)
    return [draw_window(config, boxes, *size) for _ in range(number)]


def test_windows_lie_anywhere_in_the_image():
    drawn = windows(CropConfig(size=50, on_object=0.0), BOXES, (60, 200), 2000)
    assert {window.left for window in drawn} == set(range(11))
    assert {window.top for window in drawn} == set(range(151))
    assert {(window.width, window.height) for window in drawn} == {(50, 50)}
    assert windows(CropConfig(size=50), BOXES, (30, 20), 1) == [Window(0, 0, 30, 20)]


def test_windows_on_objects_hold_one_whole_wherever_it_lies_in_them():
    box = torch.tensor([[100.5, 95, 119.5, 115]])
    drawn = windows(CropConfig(size=50, on_object=1.0), box, (200, 120), 2000)
    assert {window.left for window in drawn} == set(range(70, 101))
    # At the image's lower edge there is less room.
    assert {window.top for window in drawn} == set(range(65, 71))


def test_windows_on_objects_that_are_larger_lie_within_them():
    drawn = windows(CropConfig(size=50, on_object=1.0), torch.tensor([[20.0, 0, 180, 120]]), (200, 120), 2000)
    assert {window.left for window in drawn} == set(range(20, 131))
    assert {window.top for window in drawn} == set(range(71))


def test_half_of_the_windows_hold_an_object_where_half_is_asked_for():
    box = torch.tensor([[9000.0, 9000, 9010, 9010]])
    drawn = windows(CropConfig(size=100, on_object=0.5), box, (10_000, 10_000), 1000)
    held = sum(window.left <= 9000 and window.right >= 9010 and window.top <= 9000 for window in drawn)
    assert abs(held - 500) < 80  # five standard deviations


@pytest.fixture
def annotations(tmp_path):
    random = np.random.default_rng(0)
    Image.fromarray(random.integers(0, 255, (120, 200, 3), np.uint8)).save(tmp_path / "a.png")
    records = [
        {
            "id": index,
            "image_id": 1,
            "category_id": 1,
            "bbox": [left, top, right - left, bottom - top],
            "segmentation": rectangle(left, top, right, bottom),
        }
        for index, (left, top, right, bottom) in enumerate(BOXES.tolist(), 1)
    ]
    images = [{"id": 1, "file_name": "a.png", "width": 200, "height": 120}]
    dataset = {"images": images, "annotations": records, "categories": [{"id": 1, "name": "thing"}]}
    return CocoAnnotations(json.loads(json.dumps(dataset)), tmp_path)


def test_samples_are_the_windows_pixels_masks_and_tight_boxes(annotations):
    """Every crop is somewhere in the whole sample, with what lies there, and depends on seed, epoch and image alone."""
    augment = AugmentConfig(horizontal_flip=0.0)
    whole, target = CocoTrainingSet(annotations, augment=augment, seed=3)[0, 0]
    crops = CocoTrainingSet(annotations, augment=augment, seed=3, crop=CropConfig(size=40, visible=0.2))
    places = set()
    for epoch in range(20):
        image, cut = crops[epoch, 0]
        assert image.shape == (3, 40, 40)
        ((top, left),) = [
            (y, x) for y in range(81) for x in range(161) if torch.equal(whole[:, y : y + 40, x : x + 40], image)
        ]
        places.add((top, left))
        parts = target["masks"][:, top : top + 40, left : left + 40]
        seen = parts.flatten(1).sum(1) / target["masks"].flatten(1).sum(1)
        assert torch.equal(cut["masks"], parts[seen >= 0.2])
        for mask, (x0, y0, x1, y1) in zip(cut["masks"], cut["boxes"].int().tolist(), strict=True):
            assert mask[y0:y1, x0:x1].all()
            assert mask.sum() == (y1 - y0) * (x1 - x0)
        assert torch.equal(crops[epoch, 0][0], image)
    assert len(places) > 15
