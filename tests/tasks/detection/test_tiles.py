import itertools

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import ndimage
from torch import nn

from latentgnn.tasks.detection.merging import merge_tiles
from latentgnn.tasks.detection.results import encode_masks, records_of
from latentgnn.tasks.detection.segmentations import decode_masks
from latentgnn.tasks.detection.tiles import Tiling, detect_in_tiles
from latentgnn.tasks.detection.windows import Window
from latentgnn.tasks.images import to_tensor


@pytest.mark.parametrize(
    ("length", "size", "overlap", "starts"),
    [
        (100, 100, 0.2, [0]),
        (70, 100, 0.2, [0]),
        (101, 100, 0.2, [0, 1]),
        (180, 100, 0.2, [0, 80]),
        (181, 100, 0.2, [0, 40, 81]),
        (300, 100, 0.0, [0, 100, 200]),
        # 2 of 10 pixels is the step that 0.8 leaves.
        (14, 10, 0.8, [0, 2, 4]),
    ],
)
def test_where_tiles_begin(length, size, overlap, starts):
    tiling = Tiling(size=size, overlap=overlap)
    side = min(size, length)
    assert tiling.windows(length, 50) == [Window(x, 0, x + side, min(size, 50)) for x in starts] or size < 50
    assert [window.left for window in tiling.windows(length, size)] == starts
    assert [window.top for window in tiling.windows(size, length)] == starts


def test_tiles_cover_an_image_and_overlap_as_much_as_asked():
    for width in range(1, 400, 7):
        windows = Tiling(size=64, overlap=0.25).windows(width, 64)
        assert windows[0].left == 0
        assert windows[-1].right == width
        for a, b in itertools.pairwise(windows):
            assert a.right - b.left >= 16
            assert b.width == 64


LEFT, RIGHT = Window(0, 0, 100, 100), Window(60, 0, 160, 100)
SIZE = (160, 100)


def record(bbox, score, category=1, **extra):
    return {"image_id": 5, "category_id": category, "bbox": bbox, "score": score, **extra}


def merged(left, right, nms_threshold=0.5):
    return merge_tiles([(LEFT, left), (RIGHT, right)], SIZE, nms_threshold=nms_threshold)


def test_of_an_object_that_one_tile_shows_whole_that_is_kept():
    # From x = 50 to 90: whole on the left, cut at 60 on the right, whose score does not count.
    whole, cut = record([50, 20, 40, 40], 0.7), record([0, 20, 30, 40], 0.9)
    assert merged([whole], [cut]) == [whole]


def test_of_an_object_that_both_tiles_show_whole_the_surer_is_kept():
    assert merged([record([64, 20, 30, 40], 0.7)], [record([5, 21, 30, 40], 0.8)]) == [record([65, 21, 30, 40], 0.8)]


def test_an_object_that_both_tiles_cut_is_the_union_of_its_parts():
    # From x = 30 to 130, in the shared region from 60 to 100 on both sides.
    assert merged([record([30, 20, 70, 10], 0.6)], [record([0, 21, 70, 10], 0.8)]) == [record([30, 20, 100, 11], 0.8)]


def test_an_object_through_three_tiles_is_one():
    tiles = [Window(0, 0, 100, 50), Window(60, 0, 160, 50), Window(120, 0, 220, 50)]
    parts = [record([10, 5, 90, 10], 0.5), record([0, 5, 100, 10], 0.9), record([0, 5, 80, 10], 0.4)]
    found = [(tile, [part]) for tile, part in zip(tiles, parts, strict=True)]
    assert merge_tiles(found, (220, 50), nms_threshold=0.5) == [record([10, 5, 190, 10], 0.9)]
    assert merge_tiles(found[::-1], (220, 50), nms_threshold=0.5) == [record([10, 5, 190, 10], 0.9)]


def test_a_small_object_within_a_large_one_stays():
    large, small = record([62, 10, 34, 80], 0.9), record([20, 40, 10, 10], 0.8)
    assert merged([large], [small]) == [large, record([80, 40, 10, 10], 0.8)]


def test_objects_of_two_categories_stay():
    a, b = record([65, 20, 30, 40], 0.9), record([5, 20, 30, 40], 0.8, category=2)
    assert merged([a], [b]) == [a, record([65, 20, 30, 40], 0.8, category=2)]


def test_two_objects_of_one_tile_are_never_made_one():
    # Both overlap the right tile's by half or more (1000 / 1600 and 1200 / 1600), the second more.
    first, second = record([62, 20, 25, 40], 0.9), record([66, 20, 30, 40], 0.8)
    assert merged([first, second], [record([4, 20, 40, 40], 0.7)], nms_threshold=1.0) == [first, second]


def test_parts_with_less_than_half_in_common_stay_two_unless_the_detector_would_drop_one():
    # 20 x 40 of 60 x 40 in common: a third.
    a, b = record([60, 20, 39, 40], 0.9), record([20, 20, 39, 40], 0.8)
    assert merged([a], [b]) == [a, record([80, 20, 39, 40], 0.8)]
    assert merged([a], [b], nms_threshold=0.3) == [a]


def test_masks_decide_where_there_are_some():
    """Two crossing bars have the same box; in the shared region their masks meet in 4 x 4 of 2 x 4 x 30 pixels."""
    level, upright = np.zeros((2, 100, 100), np.uint8)
    level[35:39, 65:95] = 1
    upright[22:52, 18:22] = 1  # at 78 in the image
    first, second = ({"segmentation": encode_masks(torch.from_numpy(mask)[None])[0]} for mask in (level, upright))
    a, b = record([65, 22, 30, 30], 0.9, **first), record([5, 22, 30, 30], 0.8, **second)
    assert len(merged([a], [b], nms_threshold=1.0)) == 2
    assert len(merged([record(a["bbox"], 0.9)], [record(b["bbox"], 0.8)], nms_threshold=1.0)) == 1


def test_the_mask_of_a_cut_object_is_the_union():
    left, right = np.zeros((2, 100, 100), np.uint8)
    left[20:30, 30:100] = 1
    right[21:31, 0:70] = 1
    parts = [encode_masks(torch.from_numpy(mask)[None])[0] for mask in (left, right)]
    (found,) = merged(
        [record([30, 20, 70, 10], 0.6, segmentation=parts[0])], [record([0, 21, 70, 10], 0.8, segmentation=parts[1])]
    )
    expected = np.zeros((100, 160), np.uint8)
    expected[20:30, 30:100] = 1
    expected[21:31, 60:130] = 1
    assert np.array_equal(decode_masks([found["segmentation"]], 100, 160)[0], expected)


class Squares(nn.Module):
    """A detector whose answer is known: what hangs together in red or in green."""

    def forward(self, images):
        (image,) = images
        boxes, labels, scores, masks = [], [], [], []
        for channel in (0, 1):
            parts, number = ndimage.label(image[channel].numpy() > 0.4, np.ones((3, 3)))
            for index, (rows, columns) in enumerate(ndimage.find_objects(parts), 1):
                boxes.append([columns.start, rows.start, columns.stop, rows.stop])
                labels.append(channel + 1)
                # The object's brightness, so that a score says which object it is.
                scores.append(float(image[channel][parts == index].max()))
                masks.append(parts == index)
            assert number == len(ndimage.find_objects(parts))
        shape = (len(masks), 1, *image.shape[1:])
        return [
            {
                "boxes": torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4),
                "labels": torch.tensor(labels, dtype=torch.int64),
                "scores": torch.tensor(scores),
                "masks": torch.from_numpy(np.array(masks, np.float32).reshape(shape)),
            }
        ]


def found_whole(image):
    (output,) = Squares()([to_tensor(image)])
    return records_of(output, 1, {1: 3, 2: 8})


def found_in_tiles(image, tiling):
    def records(output):
        return records_of(output, 1, {1: 3, 2: 8})

    return detect_in_tiles(Squares(), image, tiling, records, device="cpu", nms_threshold=0.5)


def ordered(records):
    return sorted(records, key=lambda r: (r["category_id"], r["bbox"]))


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(("size", "overlap"), [(100, 0.3), (128, 0.5), (97, 0.34), (1000, 0.2)])
def test_objects_inside_tiles_are_found_as_in_the_whole_image(seed, size, overlap):
    """Objects of at most 24 pixels on a grid of 28: each is whole in a tile that overlaps by 30 or more."""
    random = np.random.default_rng(seed)
    pixels = random.integers(0, 50, (309, 407, 3), dtype=np.uint8)
    brightness = iter(random.permutation(np.arange(110, 256)))
    for top in range(0, 280, 28):
        for left in range(0, 380, 28):
            if random.random() < 0.7:
                width, height = random.integers(3, 25, 2)
                pixels[top : top + height, left : left + width, random.integers(0, 2)] = next(brightness)
    image = Image.fromarray(pixels)
    whole = found_whole(image)
    assert len(whole) > 70
    assert ordered(found_in_tiles(image, Tiling(size=size, overlap=overlap))) == ordered(whole)


def test_objects_longer_than_tiles_are_found_as_in_the_whole_image():
    pixels = np.zeros((300, 400, 3), np.uint8)
    pixels[40:46, 10:390, 0] = 200  # a long one
    pixels[60:290, 200:205, 0] = 220  # an upright one
    pixels[100:260, 20:160, 1] = 180  # larger than a tile in both directions
    pixels[120:128, 300:308, 1] = 255
    image = Image.fromarray(pixels)
    assert ordered(found_in_tiles(image, Tiling(size=100, overlap=0.2))) == ordered(found_whole(image))


def test_progress_counts_tiles_and_an_image_without_objects_has_none():
    seen = []
    tiling = Tiling(size=100, overlap=0.2)
    found = detect_in_tiles(
        Squares(),
        Image.new("RGB", (180, 100)),
        tiling,
        lambda output: records_of(output, 1, {}),
        device="cpu",
        nms_threshold=0.5,
        on_tile=lambda *numbers: seen.append(numbers),
    )
    assert found == []
    assert seen == [(1, 2), (2, 2)]
