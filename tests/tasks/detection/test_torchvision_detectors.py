"""Torchvision's trained detectors: with their weights, and no blocks or fresh ones, the same results as torchvision's.

The weights are random ones, saved as torchvision saves its own and laid where it keeps what it has downloaded: both
sides then read them under the name of the published ones.
"""

import dataclasses
from pathlib import Path
from urllib.parse import urlsplit

import pytest
import torch
from torch import Tensor, nn
from torchvision.models import get_model, get_model_weights

from latentgnn.layer import LatentGNN
from latentgnn.tasks.detection.config import ModelConfig
from latentgnn.tasks.detection.model import build_detector
from latentgnn.tasks.detection.weights.published import published_detector
from latentgnn.tasks.detection.weights.start import start_from

DETECTORS = (
    "maskrcnn_resnet50_fpn",
    "maskrcnn_resnet50_fpn_v2",
    "fasterrcnn_resnet50_fpn",
    "fasterrcnn_resnet50_fpn_v2",
    "fasterrcnn_mobilenet_v3_large_fpn",
    "fasterrcnn_mobilenet_v3_large_320_fpn",
    "retinanet_resnet50_fpn",
    "retinanet_resnet50_fpn_v2",
)
NAMES = get_model_weights(DETECTORS[0])["COCO_V1"].meta["categories"]
IDS = [(index, name) for index, name in enumerate(NAMES)][1:]
"""All 90 ids, those without a category too, so that no row of the last layers is left out."""
COCO = [(index, name) for index, name in IDS if name != "N/A"]
# Smaller images than torchvision's and fewer proposals, for time; on both sides.
SMALL = {"min_size": (96,), "max_size": 160}
FEW = {"rpn_post_nms": (40, 40)}


def randomised(network: nn.Module) -> dict[str, Tensor]:
    """Weights with which a detector finds something, and statistics that no freshly made network has."""
    generator = torch.Generator().manual_seed(7)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            for value, low, high in (
                (module.running_mean, -0.1, 0.1),
                (module.running_var, 0.5, 1.5),
                (module.weight.data, 0.5, 1.0),
                (module.bias.data, -0.1, 0.1),
            ):
                value.copy_(torch.rand(value.shape, generator=generator) * (high - low) + low)
    state = network.state_dict()
    for name, value in state.items():
        # Scores far apart, not all alike as those of a fresh network.
        if name.endswith(("cls_score.weight", "bbox_pred.weight", "cls_logits.weight", "bbox_reg.weight")):
            spread = 2.0 if "cls_score" in name else 0.05
            value.copy_(torch.randn(value.shape, generator=generator) * spread)
        if name == "head.classification_head.cls_logits.bias":
            value.fill_(-3.0)
    return state


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Torchvision's cache with random weights under the names of the published files."""
    home = tmp_path_factory.mktemp("torch_home")
    folder = home / "hub" / "checkpoints"
    folder.mkdir(parents=True)
    for name in DETECTORS:
        torch.manual_seed(len(name))
        network = get_model(name, weights=None, weights_backbone=None)
        url = get_model_weights(name)["COCO_V1"].url
        torch.save(randomised(network), folder / Path(urlsplit(url).path).name)
    return home


@pytest.fixture(autouse=True)
def cache(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_HOME", str(home))


def ours(name: str, categories=IDS, **changes) -> nn.Module:
    detector = published_detector(name)
    assert detector is not None
    config = dataclasses.replace(detector.config, weights=str(detector.weights), **SMALL, **FEW, **changes)
    model = build_detector(config, len(categories))
    start_from(model, config, categories)
    return model.eval()


def theirs(name: str) -> nn.Module:
    few = {} if name.startswith("retina") else {"rpn_post_nms_top_n_test": 40}
    return get_model(name, weights="COCO_V1", min_size=96, max_size=160, **few).eval()


def images() -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.rand(3, *size, generator=generator) for size in ((120, 170), (200, 150))]


def assert_same(got: list[dict[str, Tensor]], expected: list[dict[str, Tensor]]) -> None:
    for mine, reference in zip(got, expected, strict=True):
        assert len(reference["scores"]) >= 5
        assert mine.keys() == reference.keys()
        assert torch.equal(mine["labels"], reference["labels"])
        for name in reference:
            torch.testing.assert_close(mine[name], reference[name], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", DETECTORS)
def test_results_are_torchvisions(name):
    reference = theirs(name)
    with torch.no_grad():
        expected = [reference([image])[0] for image in images()]
        # MobileNet's stages are counted otherwise there: from the stem in six, here the stem and four.
        bare = ours(name, trainable_stages=2 if "mobilenet" in name else 3)
        plain = bare(images())
        model = ours(name, blocks={"C3": 8, "C4": 8, "C5": 4})
        with_blocks = model(images())
    assert ("masks" in expected[0]) == name.startswith("mask")
    assert sum(isinstance(module, LatentGNN) for module in model.modules()) == 3
    assert_same(plain, expected)
    assert_same(with_blocks, expected)
    learning = [{key for key, value in one.named_parameters() if value.requires_grad} for one in (bare, reference)]
    assert learning[0] == learning[1]


@pytest.mark.parametrize("name", ["maskrcnn_resnet50_fpn", "retinanet_resnet50_fpn"])
def test_the_eighty_categories_have_cocos_ids(name, home):
    """Rows of ids that COCO does not use are left out.

    Here they are as good as never found: R-CNN's scores would else differ by their probability, see the next test.
    """
    url = get_model_weights(name)["COCO_V1"].url
    file = home / "hub" / "checkpoints" / Path(urlsplit(url).path).name
    whole = torch.load(file, weights_only=True)
    unused = [row for row, category in enumerate(NAMES) if category in ("N/A", "__background__")]
    state = dict(whole)
    if name.startswith("mask"):
        bias = state["roi_heads.box_predictor.cls_score.bias"] = state["roi_heads.box_predictor.cls_score.bias"].clone()
        bias[unused[1:]] = -100.0
    else:
        bias = state["head.classification_head.cls_logits.bias"].clone()
        bias.view(-1, len(NAMES))[:, unused] = -100.0
        state["head.classification_head.cls_logits.bias"] = bias
    torch.save(state, file)
    try:
        reference, model = theirs(name), ours(name, COCO)
    finally:
        torch.save(whole, file)
    with torch.no_grad():
        expected, got = [reference([image])[0] for image in images()], model(images())
    ids = torch.tensor([0, *(index for index, _ in COCO)])
    for result in got:
        result["labels"] = ids[result["labels"]]
    assert_same(got, expected)


def test_without_the_unused_rows_rcnn_divides_their_probability_among_the_others():
    name = "fasterrcnn_mobilenet_v3_large_320_fpn"
    reference, model = theirs(name).roi_heads.box_predictor, ours(name, COCO).roi_heads.box_predictor
    features = torch.randn(6, 1024, generator=torch.Generator().manual_seed(4)) / 8
    used = [0, *(index for index, _ in COCO)]
    with torch.no_grad():
        expected, got = (predictor(features)[0].softmax(1) for predictor in (reference, model))
    assert (expected.shape[1] - len(used), got.shape[1]) == (10, len(used))
    unused = 1 - expected[:, used].sum(1, keepdim=True)
    assert unused.max() > 0.01
    torch.testing.assert_close(got, expected[:, used] / (1 - unused), rtol=1e-4, atol=1e-6)


def test_in_training_the_losses_are_torchvisions():
    """The second generation: another loss for RetinaNet's boxes, and norms that take the batch's statistics."""
    batch = images()
    targets = [{"boxes": torch.tensor([[20.0, 30.0, 90.0, 100.0]]), "labels": torch.tensor([5])} for _ in batch]
    losses = []
    for model in (ours("retinanet_resnet50_fpn_v2"), theirs("retinanet_resnet50_fpn_v2")):
        torch.manual_seed(3)
        losses.append(model.train()(batch, targets))
    assert losses[0].keys() == losses[1].keys()
    for key, value in losses[1].items():
        torch.testing.assert_close(losses[0][key], value)


def test_settings_other_than_those_of_the_weights_are_told():
    """All of them: with equal shapes, nothing else shows that a detector of 320 pixels is built as one of 800."""
    config = ModelConfig(
        detector="faster_rcnn",
        backbone="mobilenet_v3_large",
        weights="fasterrcnn_mobilenet_v3_large_320_fpn",
        score_threshold=0.3,
        nms_threshold=0.6,
        detections_per_image=50,
    )
    note = start_from(build_detector(config, len(IDS)), config, IDS).lines[-1]
    assert note == (
        "  note: trained with model.min_size [320] (here [800]), model.max_size 640 (here 1333), "
        "model.rpn_pre_nms [2000, 150] (here [2000, 1000]), model.rpn_post_nms [2000, 150] (here [2000, 1000]), "
        "model.rpn_score_threshold 0.05 (here 0.0), model.score_threshold 0.05 (here 0.3), "
        "model.nms_threshold 0.5 (here 0.6), model.detections_per_image 100 (here 50)"
    )
    config = dataclasses.replace(
        config, detector="retinanet", backbone="resnet50", weights="retinanet_resnet50_fpn_v2", norm="batch_norm"
    )
    config = dataclasses.replace(config, heads="v2", rpn_score_threshold=0.2, detections_per_image=300)
    note = start_from(build_detector(config, len(IDS)), config, IDS).lines[-1]
    assert note == "  note: trained with model.score_threshold 0.05 (here 0.3), model.nms_threshold 0.5 (here 0.6)"


@pytest.mark.parametrize("name", DETECTORS)
def test_all_names_of_a_detector(name):
    enumeration = get_model_weights(name)
    for written in (name, f"{enumeration.__name__}.COCO_V1", f"{enumeration.__name__}.DEFAULT"):
        found = published_detector(written)
        assert found is not None
        assert (found.builder, found.weights) == (name, enumeration["COCO_V1"])


@pytest.mark.parametrize("name", DETECTORS)
def test_sizes_anchors_and_thresholds_are_torchvisions(name):
    detector = published_detector(name)
    assert detector is not None
    with torch.device("meta"):
        mine = build_detector(detector.config, len(IDS))
        reference = get_model(name, weights=None, weights_backbone=None)
    for part in ("min_size", "max_size", "image_mean", "image_std", "size_divisible"):
        assert getattr(mine.transform, part) == getattr(reference.transform, part), part
    if name.startswith("retina"):
        owners = [(mine, reference)]
        parts: tuple[str, ...] = ("score_thresh", "nms_thresh", "detections_per_img", "topk_candidates")
        anchors = [model.anchor_generator for model in (mine, reference)]
        assert mine.head.regression_head._loss_type == reference.head.regression_head._loss_type
    else:
        owners = [(mine.rpn, reference.rpn), (mine.roi_heads, reference.roi_heads)]
        parts = ("_pre_nms_top_n", "_post_nms_top_n", "nms_thresh", "score_thresh", "detections_per_img")
        anchors = [model.rpn.anchor_generator for model in (mine, reference)]
        assert mine.roi_heads.box_coder.weights == reference.roi_heads.box_coder.weights
    for own, other in owners:
        for part in parts:
            assert getattr(own, part, None) == getattr(other, part, None), part
    assert (anchors[0].sizes, anchors[0].aspect_ratios) == (anchors[1].sizes, anchors[1].aspect_ratios)
