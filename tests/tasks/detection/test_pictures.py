import io
import json

import numpy as np
import pytest
from PIL import Image

from latentgnn.tasks.detection.pictures import colour_of, draw_detections, side_by_side
from latentgnn.tasks.images import png_bytes, read_image

NAMES = [(3, "cat"), (8, "dog")]
GRAY = (90, 90, 90)


def record(box, category=3, **extra):
    return {"bbox": list(box), "category_id": category, **extra}


def polygon(box):
    x, y, w, h = box
    return [[x, y, x + w, y, x + w, y + h, x, y + h]]


def blank(width=900, height=300):
    return Image.new("RGB", (width, height), GRAY)


def test_a_box_has_its_colour_on_its_edge_only():
    image = blank()
    picture = draw_detections(image, [record((400, 100, 80, 60), 8, score=0.9)], NAMES)
    assert picture.size == image.size
    for edge in [(401, 130), (478, 130), (440, 101), (440, 158)]:
        assert picture.getpixel(edge) == colour_of(1)
    assert picture.getpixel((440, 130)) == GRAY
    assert picture.getpixel((380, 130)) == GRAY
    assert image == blank()


def test_a_mask_is_translucent_within_and_solid_at_its_edge():
    picture = draw_detections(blank(), [record((400, 100, 200, 100), segmentation=polygon((420, 120, 60, 60)))], NAMES)
    within = np.array(picture.getpixel((450, 150)))
    assert np.allclose(within, 0.62 * np.array(GRAY) + 0.38 * np.array(colour_of(0)), atol=1)
    assert picture.getpixel((420, 150)) == colour_of(0)
    assert picture.getpixel((410, 150)) == GRAY
    assert picture.getpixel((500, 150)) == GRAY


def test_small_objects_stay_visible_on_large_ones():
    large, small = (300, 50, 400, 200), (450, 100, 60, 60)
    objects = [record(small, 8, segmentation=polygon(small)), record(large, 3, segmentation=polygon(large))]
    pictures = [draw_detections(blank(), order, NAMES) for order in (objects, objects[::-1])]
    for picture in pictures:
        below = 0.62 * np.array(GRAY) + 0.38 * np.array(colour_of(0))
        assert np.allclose(picture.getpixel((480, 130)), 0.62 * below + 0.38 * np.array(colour_of(1)), atol=1)
        assert picture.getpixel((451, 130)) == colour_of(1)


def test_small_images_are_enlarged_by_whole_numbers():
    assert draw_detections(blank(256, 100), [], NAMES).size == (1024, 400)
    assert draw_detections(blank(799, 100), [], NAMES).size == (1598, 200)
    assert draw_detections(blank(800, 100), [], NAMES).size == (800, 100)
    picture = draw_detections(
        blank(200, 100), [record((40, 30, 50, 50), segmentation=polygon((50, 40, 20, 20)))], NAMES
    )
    assert picture.getpixel((60 * 4, 60 * 4 - 1)) == colour_of(0)
    assert picture.getpixel((60 * 4, 60 * 4)) == GRAY
    assert picture.getpixel((60 * 4, 50 * 4)) not in (GRAY, colour_of(0))
    assert picture.getpixel((49 * 4, 50 * 4)) == GRAY


def test_a_mask_of_one_pixel_survives_enlargement():
    picture = draw_detections(blank(200, 100), [record((100, 50, 0, 0), segmentation=polygon((50, 40, 1, 1)))], NAMES)
    patch = np.asarray(picture.crop((200, 160, 204, 164)))
    assert (patch == colour_of(0)).all(axis=-1).any()


def test_weak_detections_are_left_out():
    weak = record((400, 100, 80, 60), score=0.4)
    assert draw_detections(blank(), [weak], NAMES, score_threshold=0.5) == blank()
    assert draw_detections(blank(), [weak], NAMES, score_threshold=0.4) != blank()


def test_labels_are_readable_on_any_background():
    """Every label's own background carries its text: the same pixels on black, on white and on the label's colour."""
    box = (400, 100, 200, 100)
    above = (400, 70, 500, 100)
    labels = []
    for background in [(0, 0, 0), (255, 255, 255), colour_of(0)]:
        picture = draw_detections(Image.new("RGB", (900, 300), background), [record(box, score=0.87)], NAMES)
        labels.append(np.asarray(picture.crop(above)).astype(int))
    text = [np.abs(pixels - colour_of(0)).sum(axis=-1) > 250 for pixels in labels]
    assert (text[2]).sum() > 30
    assert all((marks & text[2]).sum() == text[2].sum() for marks in text)


def test_labels_do_not_cover_each_other():
    """Fifty objects in one place have room for a few labels: those of the highest scores."""
    crowd = [record((400, 150, 60, 12), score=0.5 + i / 100) for i in range(15)]
    strongest = draw_detections(blank(), [crowd[-1]], NAMES)
    picture = draw_detections(blank(), crowd, NAMES)
    label = (400, 128, 480, 148)
    assert strongest.crop(label) != blank().crop(label)
    assert picture.crop(label) == strongest.crop(label)


def test_labels_do_not_cover_small_objects():
    """The label of the lower object goes below it, because the upper one lies where it would stand."""
    upper, lower = record((400, 90, 12, 12), 3), record((400, 110.4, 40, 30), 8, score=0.9)
    alone, both = draw_detections(blank(), [lower], NAMES), draw_detections(blank(), [upper, lower], NAMES)
    assert alone.getpixel((440, 95)) == colour_of(1)
    assert both.getpixel((440, 95)) == GRAY
    assert both.getpixel((440, 145)) == colour_of(1)
    assert both.getpixel((400, 95)) == colour_of(0)


def test_every_object_is_drawn_within_the_picture():
    """Boxes that stick out, have no area or lie outside, and names longer than the image, do no harm."""
    boxes = [(-20, -20, 60, 60), (880, 280, 100, 100), (300, 100, 0, 0), (2000, 2000, 5, 5), (-50, -50, 10, 10)]
    names = [(3, "a category of a name that is longer than the whole image is wide, " * 4)]
    picture = draw_detections(blank(), [record(box) for box in boxes], names)
    assert picture.size == (900, 300)
    assert picture.getpixel((300, 100)) != GRAY


def test_colours_are_distinct_and_stable():
    colours = np.array([colour_of(i) for i in range(80)], float)
    distance = np.abs(colours[:, None] - colours[None]).sum(-1) + 1e9 * np.eye(80)
    assert distance.min() > 15
    near = [np.abs(colours[i] - colours[j]).sum() for i in range(80) for j in range(i + 1, min(i + 5, 80))]
    assert min(near) > 120
    assert [colour_of(i) for i in range(80)] == [tuple(c) for c in colours.astype(int)]


def test_colours_follow_categories_or_objects():
    first, second = (100, 100, 60, 60), (600, 100, 60, 60)
    two = [record(first, 8, score=0.9), record(second, 8, score=0.8)]
    by_category = draw_detections(blank(), two, NAMES)
    assert by_category.getpixel((101, 130)) == by_category.getpixel((601, 130)) == colour_of(1)
    by_object = draw_detections(blank(), two[::-1], [(8, "dog")])
    assert [by_object.getpixel((x, 130)) for x in (101, 601)] == [colour_of(0), colour_of(1)]


def test_unknown_categories_are_named():
    with pytest.raises(ValueError, match=r"\[4\] are not among the names"):
        draw_detections(blank(), [record((0, 0, 5, 5), 4)], NAMES)


def test_side_by_side_shows_truth_left_and_predictions_right():
    truth = [record((400, 100, 80, 60), 8)]
    predictions = [record((100, 100, 80, 60), 3, score=0.9), record((600, 100, 80, 60), 3, score=0.3)]
    sheet = side_by_side(blank(), truth, predictions, NAMES)
    panels = [draw_detections(blank(), truth, NAMES), draw_detections(blank(), predictions[:1], NAMES)]
    margin = (sheet.width - 2 * 900) // 3
    top = sheet.height - margin - 300
    for left, panel in zip((margin, 900 + 2 * margin), panels, strict=True):
        assert sheet.crop((left, top, left + 900, top + 300)) == panel
        caption = np.asarray(sheet.crop((left, 0, left + 300, top)).convert("L"))
        assert (caption < 100).sum() > 50
    assert np.asarray(sheet.crop((margin + 400, 0, margin + 900, top)).convert("L")).min() > 240


def test_real_annotations_are_drawn(shared):
    """Every kind of segmentation that the sets hold, on a picture of each."""
    for name, split, image_folder in [("nuclei", "val", "val"), ("coco_mini", "val2017", "val2017")]:
        root = shared(name)
        data = json.loads((root / "annotations" / f"instances_{split}.json").read_text())
        names = sorted((c["id"], c["name"]) for c in data["categories"])
        image = data["images"][0]
        objects = [a for a in data["annotations"] if a["image_id"] == image["id"]]
        pixels = read_image(root / image_folder / image["file_name"])
        picture = draw_detections(pixels, objects, names)
        plain = draw_detections(pixels, [], names)
        changed = (np.asarray(picture) != np.asarray(plain)).any(axis=-1)
        area = sum(a["area"] for a in objects) / (image["width"] * image["height"])
        assert changed.mean() > 0.5 * area


def test_png_round_trip():
    picture = draw_detections(blank(), [record((400, 100, 80, 60))], NAMES)
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(png_bytes(picture)))), np.asarray(picture))


def test_a_long_image_is_drawn_smaller_with_its_objects_in_place():
    """240 x 120 pixels as 60 x 30: a mask from (80, 40) to (160, 80) lies from (20, 10) to (40, 20)."""
    image = Image.new("RGB", (240, 120), (100, 100, 100))
    record = {
        "bbox": [80, 40, 80, 40],
        "category_id": 1,
        "segmentation": [[80, 40, 160, 40, 160, 80, 80, 80]],
    }
    picture = draw_detections(image, [record], [(1, "a"), (2, "b")], min_side=1, max_side=60)
    assert picture.size == (60, 30)
    changed = (np.asarray(picture) != 100).any(axis=2)
    assert changed[10:20, 20:40].all()
    # Elsewhere is the label alone, which lies above or below.
    assert not changed[10:20, :20].any()
    assert not changed[10:20, 40:].any()
    assert np.ptp(np.asarray(picture)[15, 30].astype(int)) > 20  # coloured
    # A line of one pixel does not get lost.
    thin = {"bbox": [0, 100, 240, 1], "category_id": 1, "segmentation": [[0, 100, 240, 100, 240, 101, 0, 101]]}
    assert (np.asarray(draw_detections(image, [thin], [(1, "a"), (2, "b")], min_side=1, max_side=60))[25] != 100).any()
