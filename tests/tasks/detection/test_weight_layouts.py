"""Other libraries' names, orders and images, against forward passes written out from those libraries' sources."""

import dataclasses
import re
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.models import get_model

from latentgnn.tasks.detection.config import ModelConfig
from latentgnn.tasks.detection.model import build_detector
from latentgnn.tasks.detection.weights.layouts import recognised
from latentgnn.tasks.detection.weights.start import start_from

State = dict[str, Tensor]
CONFIG = ModelConfig(fpn_channels=16, box_head_channels=8, mask_head_layers=2, mask_head_channels=8, stride_in_1x1=True)
CATEGORIES = [(1, "a"), (2, "b")]
BENCHMARK_MEAN = (102.9801, 115.9465, 122.7717)  # BGR, as its images
DETECTRON2_MEAN = (103.53, 116.28, 123.675)


def trained_detector() -> State:
    """A detector's weights, under our names, with norms that are no identity."""
    torch.manual_seed(0)
    state = build_detector(CONFIG, len(CATEGORIES)).state_dict()
    for name, value in state.items():
        if name.endswith("running_var"):
            value.uniform_(0.5, 1.5)
        elif ".bn" in name or ".downsample.1." in name:
            value.normal_(std=0.1) if name.endswith(("bias", "running_mean")) else value.uniform_(0.4, 0.8)
    return state


def benchmark(state: State) -> State:
    """Under maskrcnn-benchmark's names, which are listed in its modules."""
    names = {
        r"^backbone\.body\.(conv1|bn1)\.": r"backbone.body.stem.\1.",
        r"^backbone\.fpn\.inner_blocks\.0\.0": "backbone.fpn.fpn_inner1",
        r"^backbone\.fpn\.inner_blocks\.1\.0": "backbone.fpn.fpn_inner2",
        r"^backbone\.fpn\.inner_blocks\.2\.0": "backbone.fpn.fpn_inner3",
        r"^backbone\.fpn\.inner_blocks\.3\.0": "backbone.fpn.fpn_inner4",
        r"^backbone\.fpn\.layer_blocks\.0\.0": "backbone.fpn.fpn_layer1",
        r"^backbone\.fpn\.layer_blocks\.1\.0": "backbone.fpn.fpn_layer2",
        r"^backbone\.fpn\.layer_blocks\.2\.0": "backbone.fpn.fpn_layer3",
        r"^backbone\.fpn\.layer_blocks\.3\.0": "backbone.fpn.fpn_layer4",
        r"^rpn\.head\.conv\.0\.0": "rpn.head.conv",
        r"^roi_heads\.box_head": "roi_heads.box.feature_extractor",
        r"^roi_heads\.box_predictor": "roi_heads.box.predictor",
        r"^roi_heads\.mask_head\.0\.0": "roi_heads.mask.feature_extractor.mask_fcn1",
        r"^roi_heads\.mask_head\.1\.0": "roi_heads.mask.feature_extractor.mask_fcn2",
        r"^roi_heads\.mask_predictor": "roi_heads.mask.predictor",
    }
    return renamed(state, names) | {"rpn.anchor_generator.cell_anchors.0": torch.zeros(3, 4)}


def detectron2(state: State) -> State:
    """Under detectron2's names; the background last, and none for boxes and masks."""
    names = {
        r"^backbone\.body\.bn1\.": "backbone.bottom_up.stem.conv1.norm.",
        r"^backbone\.body\.conv1": "backbone.bottom_up.stem.conv1",
        r"^backbone\.body\.layer1": "backbone.bottom_up.res2",
        r"^backbone\.body\.layer2": "backbone.bottom_up.res3",
        r"^backbone\.body\.layer3": "backbone.bottom_up.res4",
        r"^backbone\.body\.layer4": "backbone.bottom_up.res5",
        r"\.bn(\d)\.": r".conv\1.norm.",
        r"\.downsample\.0\.": ".shortcut.",
        r"\.downsample\.1\.": ".shortcut.norm.",
        r"^backbone\.fpn\.inner_blocks\.0\.0": "backbone.fpn_lateral2",
        r"^backbone\.fpn\.inner_blocks\.1\.0": "backbone.fpn_lateral3",
        r"^backbone\.fpn\.inner_blocks\.2\.0": "backbone.fpn_lateral4",
        r"^backbone\.fpn\.inner_blocks\.3\.0": "backbone.fpn_lateral5",
        r"^backbone\.fpn\.layer_blocks\.0\.0": "backbone.fpn_output2",
        r"^backbone\.fpn\.layer_blocks\.1\.0": "backbone.fpn_output3",
        r"^backbone\.fpn\.layer_blocks\.2\.0": "backbone.fpn_output4",
        r"^backbone\.fpn\.layer_blocks\.3\.0": "backbone.fpn_output5",
        r"^rpn\.head\.conv\.0\.0": "proposal_generator.rpn_head.conv",
        r"^rpn\.head\.cls_logits": "proposal_generator.rpn_head.objectness_logits",
        r"^rpn\.head\.bbox_pred": "proposal_generator.rpn_head.anchor_deltas",
        r"^roi_heads\.box_head\.fc6": "roi_heads.box_head.fc1",
        r"^roi_heads\.box_head\.fc7": "roi_heads.box_head.fc2",
        r"^roi_heads\.mask_head\.0\.0": "roi_heads.mask_head.mask_fcn1",
        r"^roi_heads\.mask_head\.1\.0": "roi_heads.mask_head.mask_fcn2",
        r"^roi_heads\.mask_predictor\.conv5_mask": "roi_heads.mask_head.deconv",
        r"^roi_heads\.mask_predictor\.mask_fcn_logits": "roi_heads.mask_head.predictor",
    }
    new = renamed(state, names)
    for part in ("weight", "bias"):
        score = new[f"roi_heads.box_predictor.cls_score.{part}"]
        new[f"roi_heads.box_predictor.cls_score.{part}"] = torch.cat((score[1:], score[:1]))
        new[f"roi_heads.box_predictor.bbox_pred.{part}"] = new[f"roi_heads.box_predictor.bbox_pred.{part}"][4:]
        new[f"roi_heads.mask_head.predictor.{part}"] = new[f"roi_heads.mask_head.predictor.{part}"][1:]
    return new


def renamed(state: State, names: dict[str, str]) -> State:
    new = {}
    for name, value in state.items():
        for pattern, replacement in names.items():
            name = re.sub(pattern, replacement, name)
        new[name] = value.clone()
    return new


def last_map(
    state: State, image: Tensor, stem: str, stages: list[str], norms: Callable[[str], str], eps: float
) -> Tensor:
    """C5 of a ResNet-50 that strides in its 1x1 convolutions."""

    def norm(x: Tensor, place: str) -> Tensor:
        values = [state[f"{place}.{name}"] for name in ("running_mean", "running_var", "weight", "bias")]
        return F.batch_norm(x, *values, training=False, eps=eps)

    def conv(x: Tensor, place: str, **options) -> Tensor:
        return norm(F.conv2d(x, state[f"{place}.weight"], **options), norms(place))

    x = F.relu(conv(image, f"{stem}.conv1", stride=2, padding=3))
    x = F.max_pool2d(x, 3, 2, 1)
    maps = []
    for index, (stage, blocks) in enumerate(zip(stages, (3, 4, 6, 3), strict=True)):
        for block in range(blocks):
            place, stride = f"{stage}.{block}", 2 if index and not block else 1
            y = F.relu(conv(x, f"{place}.conv1", stride=stride))
            y = F.relu(conv(y, f"{place}.conv2", padding=1))
            y = conv(y, f"{place}.conv3")
            shortcut = next(
                (f"{place}.{n}" for n in ("downsample.0", "shortcut") if f"{place}.{n}.weight" in state), None
            )
            x = F.relu(y + (x if shortcut is None else conv(x, shortcut, stride=stride)))
        maps.append(x)
    return maps[-1]


def theirs(library: str, state: State, image: Tensor) -> Tensor:
    """The last map of the backbone for a BGR image of 0..255, from the library's own names."""
    if library == "benchmark":
        x = image - torch.tensor(BENCHMARK_MEAN)[:, None, None]
        stages = [f"backbone.body.layer{index}" for index in range(1, 5)]

        def norms(place: str) -> str:
            return place.replace(".downsample.0", ".downsample.1").replace(".conv", ".bn")

        return last_map(state, x[None], "backbone.body.stem", stages, norms, 0.0)
    x = image - torch.tensor(DETECTRON2_MEAN)[:, None, None]
    stages = [f"backbone.bottom_up.res{index}" for index in range(2, 6)]
    return last_map(state, x[None], "backbone.bottom_up.stem", stages, lambda place: f"{place}.norm", 1e-5)


@pytest.mark.parametrize("std", [1.0, 57.0])
@pytest.mark.parametrize(
    ("library", "write", "mean", "eps"),
    [("benchmark", benchmark, BENCHMARK_MEAN, 0.0), ("detectron2", detectron2, DETECTRON2_MEAN, 1e-5)],
)
def test_weights_of_other_libraries(tmp_path, library, write, mean, eps, std):
    there = write(trained_detector())
    torch.save({"model": {f"module.{name}": value for name, value in there.items()}}, tmp_path / "model.pth")
    config = dataclasses.replace(
        CONFIG,
        weights=str(tmp_path / "model.pth"),
        norm_eps=eps,
        image_mean=tuple(value / 255 for value in reversed(mean)),
        # Whatever images are divided by here, the first convolution is turned to it.
        image_std=(std / 255,) * 3,
    )
    model = build_detector(config, len(CATEGORIES)).eval()
    start = start_from(model, config, CATEGORIES)
    assert "started anew" not in "\n".join(start.lines)
    assert "left out" not in "\n".join(start.lines)
    image = torch.rand(3, 96, 128, generator=torch.Generator().manual_seed(2))
    normalised = (image - torch.tensor(config.image_mean)[:, None, None]) / torch.tensor(config.image_std)[
        :, None, None
    ]
    with torch.no_grad():
        got = list(model.backbone.body(normalised[None]).values())[-1]
        expected = theirs(library, there, image.flip(0) * 255)
    torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-3 * float(expected.abs().max()))
    ours = trained_detector()
    state = model.state_dict()
    for name, value in ours.items():
        # But for rows of the background that detectron2 does not have, all else is as it was, row for row.
        if name.startswith("backbone.body.conv1") or (library == "detectron2" and "predictor" in name):
            continue
        assert torch.equal(state[name], value), name
    for name, each in (("cls_score", 1), ("bbox_pred", 4)):
        full = f"roi_heads.box_predictor.{name}.weight"
        first = 0 if name == "cls_score" else each
        assert torch.equal(state[full][first:], ours[full][first:])
    masks = "roi_heads.mask_predictor.mask_fcn_logits.weight"
    assert torch.equal(state[masks][1:], ours[masks][1:])


def test_settings_of_other_libraries_are_told(tmp_path):
    torch.save(benchmark(trained_detector()), tmp_path / "model.pth")
    config = dataclasses.replace(CONFIG, weights=str(tmp_path / "model.pth"), stride_in_1x1=False)
    start = start_from(build_detector(config, len(CATEGORIES)), config, CATEGORIES)
    assert start.lines[-1] == (
        "  note: maskrcnn-benchmark's ResNets trained with model.norm_eps 0.0 (here 1e-05), "
        "model.stride_in_1x1 True (here False), "
        "model.image_mean [0.4815, 0.4547, 0.4038] (here [0.485, 0.456, 0.406])"
    )
    assert any(line.startswith("  renamed: ") and "maskrcnn-benchmark" in line for line in start.lines)


def test_cocos_categories_by_the_number_of_rows():
    def categories(rows: int) -> list[str] | None:
        state = {"backbone.body.conv1.weight": torch.zeros(4, 3, 7, 7)}
        state["roi_heads.box_predictor.cls_score.bias"] = torch.zeros(rows)
        layout = recognised(state, image_std=(1.0, 1.0, 1.0))
        assert layout is not None
        return layout.categories

    all_ids, used = categories(91), categories(81)
    assert all_ids is not None
    assert used is not None
    assert (all_ids[1], all_ids[12], all_ids[90]) == ("person", "N/A", "toothbrush")
    assert (used[1], used[12], used[80]) == ("person", "stop sign", "toothbrush")
    assert categories(3) is None


@pytest.mark.parametrize("name", ["maskrcnn_resnet50_fpn", "retinanet_resnet50_fpn"])
def test_torchvisions_earlier_names(name):
    """The names of its published files: torchvision itself reads them as what is recognised here."""
    with torch.device("meta"):
        network = get_model(name, weights=None, weights_backbone=None)
    new = {key: torch.zeros(()) for key in network.state_dict()}
    earlier = {
        r"((?:inner|layer)_blocks\.\d)\.0\.": r"\1.",
        r"^rpn\.head\.conv\.0\.0\.": "rpn.head.conv.",
        r"^roi_heads\.mask_head\.0\.0\.": "roi_heads.mask_head.mask_fcn1.",
        r"^roi_heads\.mask_head\.1\.0\.": "roi_heads.mask_head.mask_fcn2.",
        r"^roi_heads\.mask_head\.2\.0\.": "roi_heads.mask_head.mask_fcn3.",
        r"^roi_heads\.mask_head\.3\.0\.": "roi_heads.mask_head.mask_fcn4.",
        r"(_head\.conv)\.1\.0\.": r"\1.2.",
        r"(_head\.conv)\.2\.0\.": r"\1.4.",
        r"(_head\.conv)\.3\.0\.": r"\1.6.",
        r"(_head\.conv)\.0\.0\.": r"\1.0.",
    }
    old = {}
    for key in new:
        was = key
        for pattern, replacement in earlier.items():
            changed = re.sub(pattern, replacement, was)
            if changed != was:
                was = changed
                break
        old[was] = network.state_dict()[key]
    assert len(old) == len(new)
    assert old.keys() != new.keys()
    network.load_state_dict(
        old, assign=True
    )  # torchvision's own conversion; it raises an error where a name is strange
    layout = recognised(old, image_std=(1.0, 1.0, 1.0))
    assert layout is not None
    assert layout.state.keys() == new.keys()
    assert all(layout.state[key].shape == value.shape for key, value in network.state_dict().items())
    assert layout.renamed == len(new.keys() - old.keys())
