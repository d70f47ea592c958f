"""Layouts, label pictures, random changes and windows of segmentation, against values worked out by hand."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from latentgnn.configuration.recipes import load_recipe
from latentgnn.configuration.settings import parse_config
from latentgnn.errors import UserError
from latentgnn.tasks.segmentation.check import check_split, load_set
from latentgnn.tasks.segmentation.config import (
    AugmentConfig,
    DataConfig,
    EvaluationConfig,
    LossConfig,
    ModelConfig,
    SegmentationConfig,
)
from latentgnn.tasks.segmentation.datasets import Augment, TrainingImages, scaled
from latentgnn.tasks.segmentation.layouts import resolve
from latentgnn.tasks.segmentation.model import build_segmenter
from latentgnn.tasks.segmentation.prediction import predict_image
from latentgnn.tasks.segmentation.task import Batch, SegmentationTask

PLAIN = AugmentConfig(scale=None, crop=None, flip=0, color=0)


def save(path, array, palette=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    picture = Image.fromarray(np.asarray(array, np.uint8))
    if palette is not None:
        picture.putpalette(palette)
    picture.save(path)


def rgb(height=2, width=3):
    return np.full((height, width, 3), 77)


def test_cityscapes(tmp_path):
    for split in ("train", "val"):
        name = f"{split}/bonn/bonn_000000_000019"
        save(tmp_path / "leftImg8bit" / f"{name}_leftImg8bit.png", rgb())
        save(tmp_path / "gtFine" / f"{name}_gtFine_labelIds.png", [[7, 26, 0], [255, 33, 4]])
        save(tmp_path / "gtFine" / f"{name}_gtFine_color.png", rgb())
    images = load_set(DataConfig(root=str(tmp_path), augment=PLAIN), "train")
    assert [source.name for source in images.sources] == ["bonn/bonn_000000_000019"]
    assert len(images.class_names) == 19
    # Road, car and bicycle are the first, the 14th and the last class of Cityscapes' trainIds.
    assert images[0].labels.tolist() == [[0, 13, -1], [-1, 18, -1]]


def test_pascal_voc_has_a_palette_or_colours(tmp_path):
    (tmp_path / "ImageSets" / "Segmentation").mkdir(parents=True)
    (tmp_path / "ImageSets" / "Segmentation" / "train.txt").write_text("2007_1\n2007_2\n")
    for name in ("2007_1", "2007_2", "2007_3"):
        save(tmp_path / "JPEGImages" / f"{name}.jpg", rgb())
    ids = np.array([[0, 1, 15], [255, 20, 0]])
    save(tmp_path / "SegmentationClass" / "2007_1.png", ids, palette=[*range(256)] * 3)
    # The colours that Pascal VOC's development kit gives aeroplane, person, the border and tvmonitor.
    colours = {0: (0, 0, 0), 1: (128, 0, 0), 15: (192, 128, 128), 255: (224, 224, 192), 20: (0, 64, 128)}
    save(tmp_path / "SegmentationClass" / "2007_2.png", [[colours[id] for id in row] for row in ids.tolist()])
    images = load_set(DataConfig(root=str(tmp_path)), "train")
    assert len(images) == 2
    assert images[0].labels.tolist() == images[1].labels.tolist() == [[0, 1, 15], [-1, 20, 0]]


def test_ade20k_takes_its_names_from_its_table(tmp_path):
    (tmp_path / "objectInfo150.txt").write_text(
        "Idx\tRatio\tTrain\tVal\tName\n1\t0.1\t1\t1\twall\n2\t0.1\t1\t1\tbuilding, edifice\n"
    )
    save(tmp_path / "images" / "training" / "a.jpg", rgb())
    save(tmp_path / "annotations" / "training" / "a.png", [[0, 1, 2], [2, 1, 0]])
    config = DataConfig(root=str(tmp_path))
    images = load_set(config, "train")
    assert images.class_names == ("wall", "building")
    assert images[0].labels.tolist() == [[-1, 0, 1], [1, 0, -1]]
    assert resolve(config).val == "validation"


@pytest.mark.parametrize(
    ("table", "told"),
    [
        (b"Idx\tName\n", "expected a table whose first column is an id, 0 to 65,535, and whose last is a name"),
        (b"Idx\tName\n70000\twall\n", "expected a table whose first column is an id"),
        (b"Idx\tName\n1\tw\xffll\n", "line 2, column 4: not UTF-8 text"),
    ],
)
def test_tables_that_are_none(tmp_path, table, told):
    save(tmp_path / "images" / "training" / "a.jpg", rgb())
    save(tmp_path / "annotations" / "training" / "a.png", [[0, 1, 2], [2, 1, 0]])
    (tmp_path / "objectInfo150.txt").write_bytes(table)
    with pytest.raises(UserError, match=rf"objectInfo150\.txt: {told}"):
        load_set(DataConfig(root=str(tmp_path)), "train")


def test_lists_with_names_that_no_file_has(tmp_path):
    (tmp_path / "ImageSets" / "Segmentation").mkdir(parents=True)
    (tmp_path / "ImageSets" / "Segmentation" / "train.txt").write_text(f"a\0b {'x' * 300}\n")
    for folder in ("JPEGImages", "SegmentationClass"):
        (tmp_path / folder).mkdir()
    faults = check_split(DataConfig(root=str(tmp_path)), "train").faults
    assert [fault.message for fault in faults] == [f"there is no label picture for {n}" for n in ("a\0b", "x" * 300)]


def test_colours_without_an_id_are_a_fault(tmp_path):
    save(tmp_path / "images" / "train" / "a.png", rgb())
    save(tmp_path / "labels" / "train" / "a.png", rgb())
    config = DataConfig(root=str(tmp_path), classes={0: "sky"}, colors={0: (1, 2, 3)})
    assert "1 colours that data.colors does not name: [77, 77, 77]" in check_split(config, "train").text()
    with pytest.raises(UserError, match="mend these images"):
        load_set(config, "train")


def test_ids_beyond_16_bits_are_a_fault(tmp_path):
    save(tmp_path / "images" / "train" / "a.png", rgb())
    (tmp_path / "labels" / "train").mkdir(parents=True)
    Image.fromarray(np.array([[0, 1, 70_000]] * 2, np.int32)).save(tmp_path / "labels" / "train" / "a.tif")
    told = check_split(DataConfig(root=str(tmp_path), classes={0: "sky", 1: "road"}), "train").text()
    assert "a.tif: ids of 0 to 70000; expected 0 to 65,535" in told


def test_random_changes_depend_on_seed_epoch_and_index_alone(tmp_path):
    rng = np.random.default_rng(0)
    for name in "ab":
        save(tmp_path / "images" / "train" / f"{name}.png", rng.integers(0, 255, (40, 50, 3)))
        save(tmp_path / "labels" / "train" / f"{name}.png", rng.integers(0, 2, (40, 50)))
    augment = AugmentConfig(crop=(32, 64))
    images = load_set(DataConfig(root=str(tmp_path), classes={0: "a", 1: "b"}, augment=augment), "train")
    first, again = TrainingImages(images, seed=3), TrainingImages(images, seed=3)
    state = torch.get_rng_state()
    sample = first[1, 0]
    assert torch.equal(torch.get_rng_state(), state)
    again[0, 1]
    assert torch.equal(again[1, 0].image, sample.image)
    assert torch.equal(again[1, 0].labels, sample.labels)
    others = [first[0, 0], first[1, 1], TrainingImages(images, seed=4)[1, 0]]
    assert not any(torch.equal(sample.image, other.image) for other in others)
    assert sample.image.shape == (3, 32, 64)


def test_labels_follow_the_image():
    # A label that can be read off the image, through size, crop and mirror: bright is 1.
    labels = torch.zeros(40, 40, dtype=torch.int64)
    labels[5:20, 3:30] = 1
    image = labels.float().expand(3, -1, -1).mul(0.8).add(0.1).clone()
    for seed in range(4):
        torch.manual_seed(seed)
        changed, mask = Augment(AugmentConfig(scale=(2, 2), crop=(96, 64), color=0), scale=1.0)(image, labels)
        padding = mask == -1
        assert padding.sum() == 16 * 64
        assert float(changed[:, padding].max()) == 0
        bright = changed[0] > 0.5
        assert int((bright != (mask == 1)).sum()) < 0.03 * mask.numel()


def test_windows_of_a_pointwise_network_give_what_the_whole_image_gives():
    torch.manual_seed(0)

    class Pointwise(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Conv2d(3, 4, 1)

        def forward(self, x):
            return {"out": self.layer(x)}

    model, image = Pointwise().eval(), torch.rand(3, 90, 70)
    whole = predict_image(model, image, SegmentationConfig())
    tiled = predict_image(model, image, SegmentationConfig(evaluation=EvaluationConfig(tiles=32, tile_overlap=0.3)))
    assert (whole == tiled).float().mean() > 0.999
    # Without the network's size: at half of it, the classes of single pixels of noise are others.
    half = SegmentationConfig(data=DataConfig(scale=0.5))
    assert predict_image(model, image, half).shape == (90, 70)
    assert scaled((90, 70), 0.5) == [45, 35]


def task_of(tmp_path, weighting, names=("a", "b", "c")):
    """A task whose network gives what it is given, on 12 pixels of a, 4 of b and none of c."""
    save(tmp_path / "images" / "train" / "x.png", rgb(4, 4))
    save(tmp_path / "labels" / "train" / "x.png", [[0] * 4] * 3 + [[1] * 4])
    data = DataConfig(root=str(tmp_path), classes=dict(enumerate(names)), class_weighting=weighting)
    images = load_set(data, "train")
    network = nn.Module()
    network.forward = lambda logits: {"out": logits, "aux": logits.flip(1)}
    model = ModelConfig(image_mean=(0, 0, 0), image_std=(1, 1, 1))
    config = SegmentationConfig(model=model, data=data, loss=LossConfig(auxiliary=0.5))
    return SegmentationTask(network, config, train=images, val=images)


@pytest.mark.parametrize(
    ("weighting", "weights"),
    # 12 and 4 of 16 pixels: frequencies of 3/4 and 1/4. What a class without a pixel weighs is never asked.
    [(0.0, (1, 1, 1)), (1.0, (1, 3, 0)), (0.5, (1, 3**0.5, 0)), ((2.0, 1.0, 5.0), (2, 1, 5))],
)
def test_classes_weigh_in_both_losses(tmp_path, weighting, weights):
    task = task_of(tmp_path, weighting)
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(1, 3, 2, 2, generator=generator)
    labels = torch.tensor([[[0, 1], [1, -1]]])
    losses = task.losses(Batch(["x"], logits, labels))
    weight = np.array(weights)[[0, 1, 1]]
    for name, values, factor in (("cross_entropy", logits, 1), ("auxiliary", logits.flip(1), 0.5)):
        scores = values[0].flatten(1).T[:3].double().numpy()
        entropy = np.log(np.exp(scores).sum(axis=1)) - scores[range(3), [0, 1, 1]]
        assert losses[name].item() == pytest.approx(factor * (weight * entropy).sum() / weight.sum(), rel=1e-5)


def test_weights_that_do_not_fit(tmp_path):
    with pytest.raises(UserError, match=r"class_weighting has 2 weights; expected 3, in the order of .* a, b, c"):
        task_of(tmp_path, (1.0, 2.0))
    for wrong in (1.5, (1.0, 0.0, 2.0), (1.0, float("nan"), 1.0)):
        with pytest.raises(UserError, match="class_weighting: expected a power from 0 to 1, or a list with a weight"):
            DataConfig(class_weighting=wrong)


@pytest.mark.parametrize("recipe", ["camvid_small", "cityscapes_fcn_r50_d8"])
def test_recipes_are_understood(recipe):
    config = parse_config(SegmentationConfig, load_recipe(recipe))
    assert config.model.blocks


def test_the_camvid_network_has_its_block_and_classes():
    config = parse_config(SegmentationConfig, load_recipe("camvid_small"))
    model = build_segmenter(config.model, num_classes=11, auxiliary=False).eval()
    with torch.no_grad():
        assert model(torch.zeros(1, 3, 48, 64))["out"].shape == (1, 11, 48, 64)
    assert "backbone.network.layer3.latentgnn.gamma" in dict(model.named_parameters())


def test_the_cityscapes_network_is_the_one_of_mmsegmentation_but_for_what_the_page_says():
    config = parse_config(SegmentationConfig, load_recipe("cityscapes_fcn_r50_d8"))
    plain = build_segmenter(replace(config.model, blocks={}), num_classes=19, auxiliary=True, download=False)
    # Its `fcn_r50-d8`: dilations of 1, 1, 2 and 4, where a stage begins with that of the one before.
    body = plain.backbone
    dilations = [[unit.conv2.dilation[0] for unit in body[f"layer{stage}"]] for stage in (1, 2, 3, 4)]
    assert dilations == [[1] * 3, [1] * 4, [1] + [2] * 5, [2, 4, 4]]
    assert [body[f"layer{stage}"][0].conv2.stride[0] for stage in (1, 2, 3, 4)] == [1, 2, 1, 1]
    assert (plain.classifier[0].out_channels, plain.aux_classifier[0].out_channels) == (512, 256)
    assert plain.classifier[3].p == plain.aux_classifier[3].p == 0.1
    # Its 49.5 million parameters are those of ResNetV1c and of two heads. What we have not are three convolutions of
    # 3 x 3 instead of one of 7 x 7, the second convolution of the head, and the one over the head and its input.
    stem = (3 * 32 + 32 * 32 + 32 * 64) * 9 + 2 * (32 + 32 + 64) - (3 * 64 * 49 + 2 * 64)
    second, joined = (512 * 512 * 9 + 2 * 512, (2048 + 512) * 512 * 9 + 2 * 512)
    theirs = sum(parameter.numel() for parameter in plain.parameters()) + stem + second + joined
    assert theirs == 49_497_734
    model = build_segmenter(config.model, num_classes=19, auxiliary=config.loss.auxiliary > 0, download=False)
    sizes = []
    for name in ("backbone.layer3", "backbone.layer4", "backbone.layer4.latentgnn"):
        model.get_submodule(name).register_forward_hook(lambda module, taken, given: sizes.append(tuple(given.shape)))
    outputs = model(torch.rand(2, 3, 64, 96))
    assert sizes == [(2, 1024, 8, 12), (2, 2048, 8, 12), (2, 2048, 8, 12)]
    assert outputs["out"].shape == outputs["aux"].shape == (2, 19, 64, 96)
    (outputs["out"].mean() + outputs["aux"].mean()).backward()
    assert all(parameter.grad is not None for name, parameter in model.named_parameters() if name.endswith("gamma"))
