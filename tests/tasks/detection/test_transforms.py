import pytest
import torch
from torchvision import tv_tensors
from torchvision.transforms import v2

from latentgnn.errors import UserError
from latentgnn.tasks.detection.config import AugmentConfig
from latentgnn.tasks.detection.transforms import FitBoxes, QuarterTurn, SquareCrop, Zoom, build_transform

OFF = AugmentConfig(horizontal_flip=0.0)


def sample(height=6, width=8, boxes=((1, 0, 4, 2), (5, 3, 8, 6)), masks=True):
    """An image whose first channel tells every pixel, and objects that fill their boxes."""
    image = torch.arange(height * width).reshape(1, height, width).expand(3, -1, -1) / (height * width)
    target = {
        "boxes": tv_tensors.BoundingBoxes(
            torch.tensor(boxes).float().reshape(-1, 4), format="XYXY", canvas_size=(height, width)
        ),
        "labels": torch.arange(1, len(boxes) + 1),
    }
    if masks:
        filled = torch.zeros(len(boxes), height, width, dtype=torch.uint8)
        for mask, (left, top, right, bottom) in zip(filled, boxes, strict=True):
            mask[top:bottom, left:right] = 1
        target["masks"] = tv_tensors.Mask(filled)
    return tv_tensors.Image(image.clone()), target


def filled_boxes(target):
    """The boxes that the masks fill, by the definition."""
    rows = []
    for mask in target["masks"]:
        y, x = mask.nonzero().unbind(1)
        rows.append([x.min(), y.min(), x.max() + 1, y.max() + 1])
    return torch.tensor(rows).float().reshape(-1, 4)


def run(transform, *args, **kwargs):
    return v2.Compose([transform, FitBoxes()])(*sample(*args, **kwargs))


def fix(monkeypatch, transform, **params):
    monkeypatch.setattr(transform, "make_params", lambda flat_inputs: params)


def test_nothing_happens_when_all_is_off():
    image, target = sample()
    state = torch.get_rng_state()
    same, same_target = build_transform(OFF)(image, target)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(same, image)
    for name in ("boxes", "labels", "masks"):
        assert torch.equal(same_target[name], target[name])


@pytest.mark.parametrize(
    ("turns", "first_box", "corner"),
    [
        (0, [1, 0, 4, 2], (0, 0)),
        # Counter-clockwise: the image's right edge becomes its top, so x' = y and y' = 8 - x.
        (1, [0, 4, 2, 7], (7, 0)),
        (2, [4, 4, 7, 6], (5, 7)),
        (3, [4, 1, 6, 4], (0, 5)),
    ],
)
def test_quarter_turns_are_exact(monkeypatch, turns, first_box, corner):
    turn = QuarterTurn()
    fix(monkeypatch, turn, turns=turns)
    image, target = run(turn)
    assert image.shape == ((3, 6, 8) if turns % 2 == 0 else (3, 8, 6))
    assert image[(0, *corner)] == 0  # the pixel that was at the top left
    assert target["boxes"][0].tolist() == first_box
    assert torch.equal(target["boxes"].as_subclass(torch.Tensor), filled_boxes(target))
    assert target["boxes"].canvas_size == tuple(image.shape[1:])


def test_all_quarter_turns_occur():
    torch.manual_seed(0)
    assert {QuarterTurn().make_params([])["turns"] for _ in range(60)} == {0, 1, 2, 3}


@pytest.mark.parametrize(("name", "first_box"), [("horizontal_flip", [4, 0, 7, 2]), ("vertical_flip", [1, 4, 4, 6])])
def test_flips(name, first_box):
    config = AugmentConfig(**{"horizontal_flip": 0.0, name: 1.0})
    image, target = build_transform(config)(*sample())
    original, _ = sample()
    assert torch.equal(image, original.flip(2 if name == "horizontal_flip" else 1))
    assert target["boxes"][0].tolist() == first_box
    assert torch.equal(target["boxes"].as_subclass(torch.Tensor), filled_boxes(target))


def test_crop_moves_cuts_and_drops(monkeypatch):
    crop = SquareCrop(4)
    fix(monkeypatch, crop, corner=(1, 3), window=(4, 4))
    image, target = run(crop, boxes=((1, 0, 4, 2), (0, 0, 2, 2), (5, 3, 8, 6), (4, 2, 6, 4)))
    assert torch.equal(image, sample()[0][:, 1:5, 3:7])
    # The second object is gone with its label and mask; the first and third are cut; the last is only moved.
    assert target["labels"].tolist() == [1, 3, 4]
    assert target["boxes"].tolist() == [[0, 0, 1, 1], [2, 2, 4, 4], [1, 1, 3, 3]]
    assert target["masks"].shape == (3, 4, 4)
    assert torch.equal(target["boxes"].as_subclass(torch.Tensor), filled_boxes(target))


def test_crop_refits_a_cut_box_to_what_is_left_of_its_mask(monkeypatch):
    image, target = sample(boxes=((0, 0, 8, 6),))
    target["masks"][0] = 0
    target["masks"][0, :, 0] = 1  # an L: its left column and its lowest row
    target["masks"][0, 5, :] = 1
    crop = SquareCrop(4)
    fix(monkeypatch, crop, corner=(2, 3), window=(4, 4))
    _, target = v2.Compose([crop, FitBoxes()])(image, target)
    assert target["boxes"].tolist() == [[0, 3, 4, 4]]


def test_uncut_boxes_keep_their_fractions():
    image, target = sample()
    target["boxes"] = tv_tensors.BoundingBoxes(
        torch.tensor([[1.25, 0.5, 3.75, 1.5], [5.5, 3.25, 8, 6]]), format="XYXY", canvas_size=(6, 8)
    )
    _, fitted = FitBoxes()(image, target)
    assert fitted["boxes"].tolist() == target["boxes"].tolist()


def test_small_images_are_left_in_that_dimension():
    image, target = run(SquareCrop(7))
    assert image.shape == (3, 6, 7)
    assert target["masks"].shape[1:] == (6, 7)


def test_crop_reaches_every_place():
    torch.manual_seed(0)
    corners = {SquareCrop(4).make_params([sample()[0]])["corner"] for _ in range(400)}
    assert corners == {(top, left) for top in range(3) for left in range(5)}


def test_zoom_in_doubles(monkeypatch):
    zoom = Zoom(2.0, 2.0)
    params = zoom.make_params([sample()[0]])
    assert (params["window"], params["filled"]) == ((3, 4), (6, 8))
    fix(monkeypatch, zoom, **(params | {"corner": (0, 1)}))
    image, target = run(zoom)
    assert image.shape == (3, 6, 8)
    assert target["labels"].tolist() == [1]
    assert target["boxes"].tolist() == [[0, 0, 6, 4]]
    assert torch.equal(target["boxes"].as_subclass(torch.Tensor), filled_boxes(target))


def test_zoom_out_halves_on_gray(monkeypatch):
    zoom = Zoom(0.5, 0.5)
    params = zoom.make_params([sample()[0]])
    assert (params["window"], params["filled"]) == ((6, 8), (3, 4))
    fix(monkeypatch, zoom, **(params | {"place": (2, 3)}))
    image, target = run(zoom, boxes=((0, 0, 4, 2), (4, 2, 8, 6)))
    assert image.shape == (3, 6, 8)
    assert (image[:, :2] == 0.5).all()
    assert (image[:, :, :3] == 0.5).all()
    assert target["boxes"].tolist() == [[3, 2, 5, 3], [5, 3, 7, 5]]
    assert torch.equal(target["boxes"].as_subclass(torch.Tensor), filled_boxes(target))
    assert target["masks"].sum((1, 2)).tolist() == [2, 4]


def test_without_masks_boxes_are_clamped_and_slivers_dropped(monkeypatch):
    crop = SquareCrop(4)
    fix(monkeypatch, crop, corner=(0, 0), window=(4, 4))
    image, target = sample(masks=False)
    target["boxes"] = tv_tensors.BoundingBoxes(
        torch.tensor([[1, 1, 6, 3], [3.5, 0, 8, 4], [1, 1, 1.5, 2]]), format="XYXY", canvas_size=(6, 8)
    )
    target["labels"] = torch.tensor([1, 2, 3])
    _, target = v2.Compose([crop, FitBoxes()])(image, target)
    assert target["labels"].tolist() == [1, 3]
    assert target["boxes"].tolist() == [[1, 1, 4, 3], [1, 1, 1.5, 2]]


def test_objects_without_a_pixel_are_dropped():
    image, target = sample()
    target["masks"][0] = 0
    _, target = FitBoxes()(image, target)
    assert target["labels"].tolist() == [2]


@pytest.mark.parametrize("masks", [True, False])
def test_no_objects(masks):
    config = AugmentConfig(
        horizontal_flip=0.5, vertical_flip=0.5, quarter_turns=True, crop=4, scale=(0.5, 2.0), brightness=0.2, hue=0.1
    )
    torch.manual_seed(0)
    for _ in range(10):
        image, target = build_transform(config)(*sample(boxes=(), masks=masks))
        assert target["boxes"].shape == (0, 4)
        assert target["labels"].shape == (0,)
        if masks:
            assert target["masks"].shape == (0, *image.shape[1:])


def test_boxes_and_masks_agree_through_everything():
    config = AugmentConfig(horizontal_flip=0.5, vertical_flip=0.5, quarter_turns=True, crop=40, scale=(0.6, 1.7))
    transform = build_transform(config)
    torch.manual_seed(0)
    kept = 0
    for _ in range(100):
        image, target = transform(*sample(50, 70, boxes=((3, 4, 30, 21), (40, 10, 66, 48), (0, 0, 12, 50))))
        assert max(image.shape[1:]) <= 40
        assert target["masks"].shape[1:] == image.shape[1:]
        assert len(target["boxes"]) == len(target["labels"]) == len(target["masks"])
        # Half a pixel is what sampling a mask may move an edge by.
        assert torch.allclose(target["boxes"].as_subclass(torch.Tensor), filled_boxes(target), atol=0.51)
        kept += len(target["labels"])
    assert 100 < kept < 300


def test_colours_change_and_the_rest_does_not():
    image, target = sample()
    inverted, same = build_transform(AugmentConfig(horizontal_flip=0.0, invert=1.0))(image, target)
    assert torch.allclose(inverted, 1 - image)
    assert torch.equal(same["boxes"], target["boxes"])
    colourful = tv_tensors.Image(torch.rand(3, 6, 8, generator=torch.Generator().manual_seed(0)))
    gray, _ = build_transform(AugmentConfig(horizontal_flip=0.0, grayscale=1.0))(colourful, target)
    assert gray.shape == (3, 6, 8)
    assert torch.equal(gray[0], gray[2])
    torch.manual_seed(0)
    for name in ("brightness", "contrast", "saturation", "hue"):
        changed, _ = build_transform(AugmentConfig(**{"horizontal_flip": 0.0, name: 0.4}))(colourful, target)
        assert not torch.allclose(changed, colourful, atol=1e-3)
        assert 0 <= changed.min() <= changed.max() <= 1


@pytest.mark.parametrize(
    "values",
    [
        {"horizontal_flip": 1.5},
        {"invert": -0.1},
        {"brightness": -1.0},
        {"hue": 0.6},
        {"crop": 0},
        {"scale": (0.0, 1.0)},
        {"scale": (2.0, 1.0)},
    ],
)
def test_values_out_of_range_are_named(values):
    name, value = next(iter(values.items()))
    with pytest.raises(UserError) as caught:
        build_transform(AugmentConfig(**values))
    assert f"{name}: expected" in str(caught.value)
    assert str(list(value) if isinstance(value, tuple) else value) in str(caught.value)
