"""What a detector takes over from trained weights: its own and others', whole, in rows, or not at all."""

import dataclasses
from pathlib import Path

import pytest
import safetensors.torch
import torch
import torchvision
from torch import Tensor, nn

from latentgnn.blocks import blocks_of
from latentgnn.checkpoints import published_state_dict
from latentgnn.errors import UserError
from latentgnn.tasks.detection.config import BlockConfig, ModelConfig
from latentgnn.tasks.detection.model import build_detector
from latentgnn.tasks.detection.weights.start import body_parameters, start_from
from latentgnn.tasks.starting import Start
from latentgnn.training.checkpoints import write_checkpoint

SMALL = ModelConfig(
    backbone="resnet18",
    norm="batch_norm",
    fpn_channels=32,
    min_size=(64,),
    max_size=128,
    anchor_sizes=(8, 16, 32, 64, 128),
    box_head_channels=24,
    mask_head_layers=2,
    mask_head_channels=12,
)
CELLS = [(1, "red cell"), (2, "white cell"), (3, "platelet")]
PREDICTORS = {
    "roi_heads.box_predictor.cls_score.weight": 1,
    "roi_heads.box_predictor.bbox_pred.weight": 4,
    "roi_heads.mask_predictor.mask_fcn_logits.weight": 1,
}


def build(seed: int = 0, categories=CELLS, **changes) -> tuple[nn.Module, ModelConfig]:
    torch.manual_seed(seed)
    config = dataclasses.replace(SMALL, **changes)
    return build_detector(config, len(categories)), config


def write_run(path: Path, model: nn.Module, config: ModelConfig, categories=CELLS) -> Path:
    """A checkpoint as training writes it."""
    settings = {
        "task": "detection",
        "model": dataclasses.asdict(config),
        "data": {"categories": [list(c) for c in categories]},
    }
    settings = torch.utils._pytree.tree_map(lambda value: list(value) if isinstance(value, tuple) else value, settings)
    content = {
        "latentgnn": {"step": 3, "config": settings, "course": {}, "data": {}},
        "state_dict": model.state_dict(),
        "optimizer": {},
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    write_checkpoint(path, content)
    return path


def begin(weights: Path | str, categories=CELLS, **changes) -> tuple[nn.Module, dict[str, Tensor], Start]:
    """A detector of another seed that starts from weights, its own state before, and what was told."""
    model, config = build(1, categories, weights=str(weights), **changes)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    return model, before, start_from(model, config, categories)


def same(first: dict[str, Tensor], second: dict[str, Tensor], prefix: str) -> bool:
    names = [name for name in first if name.startswith(prefix)]
    assert names, prefix
    return all(name in second and torch.equal(first[name], second[name]) for name in names)


@pytest.mark.parametrize("detector", ["mask_rcnn", "faster_rcnn", "retinanet"])
@pytest.mark.parametrize("kind", ["run", "checkpoint", "torch", "safetensors"])
def test_the_same_detector_is_taken_over_whole(tmp_path, detector, kind):
    there, config = build(detector=detector, blocks={"C4": 4})
    state = there.state_dict()
    if kind in ("run", "checkpoint"):
        weights = write_run(tmp_path / "run" / "checkpoints" / "best.ckpt", there, config)
        if kind == "run":
            weights = tmp_path / "run"
            (weights / "config.yaml").write_text("task: detection\n")
    elif kind == "torch":
        weights = tmp_path / "model.pth"
        torch.save({"model": {f"module.{name}": value for name, value in state.items()}, "epoch": 3}, weights)
    else:
        weights = tmp_path / "model.safetensors"
        safetensors.torch.save_file(state, weights)
    model, _, start = begin(weights, detector=detector, blocks={"C4": 4})
    assert same(model.state_dict(), state, "")
    parameters = {name for name, _ in model.named_parameters() if ".latentgnn." not in name}
    assert start.trained == parameters
    assert start.lines[0].startswith(f"weights: {len(state)} of the model's {len(state)} tensors")


def test_rows_of_categories_of_the_same_name_are_taken_over(tmp_path):
    there, config = build()
    weights = write_run(tmp_path / "best.ckpt", there, config)
    categories = [(4, "Platelet"), (7, "parasite"), (9, "red_cell")]
    model, before, start = begin(weights, categories)
    state, trained = model.state_dict(), there.state_dict()
    for name, each in PREDICTORS.items():
        got, old, fresh = (s[name].unflatten(0, (-1, each)) for s in (state, trained, before))
        for row, source in ((0, 0), (1, 3), (3, 1)):
            assert torch.equal(got[row], old[source]), name
        assert torch.equal(got[2], fresh[2]), name
    assert same(state, trained, "roi_heads.mask_head")
    assert "  categories: 2 of 3 taken over by their names: Platelet, red_cell" in start.lines
    assert not any(name.startswith("roi_heads.box_predictor") for name in start.trained)
    assert any(name.startswith("roi_heads.box_head") for name in start.trained)


def test_rows_of_retinanets_categories(tmp_path):
    there, config = build(detector="retinanet")
    weights = write_run(tmp_path / "best.ckpt", there, config)
    model, before, _ = begin(weights, [(1, "parasite"), (2, "platelet")], detector="retinanet")
    name = "head.classification_head.cls_logits.weight"
    got, old, fresh = (
        states[name].unflatten(0, (9, -1)) for states in (model.state_dict(), there.state_dict(), before)
    )
    assert (got.shape[1], old.shape[1]) == (3, 4)
    assert torch.equal(got[:, 2], old[:, 3])
    assert torch.equal(got[:, 1], fresh[:, 1])
    assert same(model.state_dict(), there.state_dict(), "head.regression_head")


def test_last_layers_for_other_categories_start_anew(tmp_path):
    there, config = build()
    weights = write_run(tmp_path / "best.ckpt", there, config)
    model, before, start = begin(weights, [(1, "nucleus")])
    assert same(model.state_dict(), before, "roi_heads.box_predictor")
    assert same(model.state_dict(), before, "roi_heads.mask_predictor")
    assert same(model.state_dict(), there.state_dict(), "roi_heads.box_head")
    told = "\n".join(start.lines)
    assert "none of nucleus is among those of the weights" in told
    assert "started anew: roi_heads.box_predictor (4 tensors), roi_heads.mask_predictor (4 tensors)" in told


def test_a_file_that_names_no_categories(tmp_path):
    there, _ = build()
    torch.save(there.state_dict(), tmp_path / "model.pth")
    other = [(1, "a"), (2, "b"), (3, "c")]
    model, _, start = begin(tmp_path / "model.pth", other)
    assert same(model.state_dict(), there.state_dict(), "")
    assert "  categories: the weights do not name them; their 3 are used in order" in start.lines
    model, before, _ = begin(tmp_path / "model.pth", other[:2])
    assert same(model.state_dict(), before, "roi_heads.box_predictor")


def test_a_file_with_as_many_rows_as_cocos_is_taken_for_one_of_cocos_and_that_is_told(tmp_path):
    eighty = [(index, f"cell {index}") for index in range(1, 81)]
    torch.save(build(categories=eighty)[0].state_dict(), tmp_path / "model.pth")
    guess = "  guessed: the weights name no categories; by their number, 81 rows, they are taken for COCO's"
    for categories, found in ((eighty, "none of cell 1"), ([(1, "dog"), (2, "gnu")], "1 of 2 taken over by")):
        lines = begin(tmp_path / "model.pth", categories)[2].lines
        assert guess in lines
        assert any(line.startswith(f"  categories: {found}") for line in lines)
    torch.save(build()[0].state_dict(), tmp_path / "model.pth")
    assert "guessed" not in "\n".join(begin(tmp_path / "model.pth")[2].lines)


def test_other_blocks(tmp_path):
    """Blocks that are the same are taken over; others start as an identity, and those without a place are left out."""
    there, config = build(blocks={"C3": 4, "C4": 4}, block=BlockConfig(gamma_init=0.5))
    weights = write_run(tmp_path / "best.ckpt", there, config)
    model, before, start = begin(weights, blocks={"C4": 4, "C5": 6})
    state = model.state_dict()
    assert same(state, there.state_dict(), "backbone.body.layer3.latentgnn")
    assert same(state, before, "backbone.body.layer4.latentgnn")
    assert state["backbone.body.layer4.latentgnn.gamma"].item() == 0
    told = "\n".join(start.lines)
    assert "started anew: backbone.body.layer4.latentgnn" in told
    assert "left out: backbone.body.layer2.latentgnn" in told
    assert "left out: backbone.body.layer4" not in told
    model, before, start = begin(weights, blocks={"C4": 5})
    assert same(model.state_dict(), before, "backbone.body.layer3.latentgnn")
    assert "only a part of backbone.body.layer3.latentgnn fits" in "\n".join(start.lines)


def test_another_head(tmp_path):
    there, config = build()
    weights = write_run(tmp_path / "best.ckpt", there, config)
    model, _, start = begin(weights, detector="faster_rcnn")
    assert same(model.state_dict(), there.state_dict(), "")
    told = "\n".join(start.lines)
    assert (
        "left out: roi_heads.mask_predictor (4 tensors; the model has none of this name), roi_heads.mask_head" in told
    )
    model, before, start = begin(weights, detector="retinanet")
    assert same(model.state_dict(), there.state_dict(), "backbone.body")
    assert same(model.state_dict(), before, "backbone.fpn")
    assert start.trained == body_parameters(model)


def test_norms_may_change_their_kind(tmp_path):
    there, config = build()
    weights = write_run(tmp_path / "best.ckpt", there, config)
    model, _, _ = begin(weights, norm="frozen_batch_norm")
    frozen = model.state_dict()
    assert all(torch.equal(frozen[name], there.state_dict()[name]) for name in frozen)
    weights = write_run(tmp_path / "frozen.ckpt", model, config)
    model, _, start = begin(weights)
    assert all(torch.equal(model.state_dict()[name], frozen[name]) for name in frozen)
    assert "started anew" not in "\n".join(start.lines)


@pytest.mark.parametrize(
    ("trained", "here", "fault", "fitting"),
    [
        ("batch_norm", "group_norm", "has batch norm in its backbone", "batch_norm, or frozen_batch_norm"),
        ("frozen_batch_norm", "group_norm", "has batch norm in its backbone", "batch_norm, or frozen_batch_norm"),
        ("group_norm", "batch_norm", "has no batch norm in its backbone", "group_norm"),
        ("group_norm", "frozen_batch_norm", "has no batch norm in its backbone", "group_norm"),
    ],
)
def test_another_kind_of_norm_in_the_backbone_is_refused(tmp_path, trained, here, fault, fitting):
    """Its scales and shifts have the same names and shapes, and without the statistics mean something else."""
    there, config = build(norm=trained, blocks={"C4": 4})
    weights = write_run(tmp_path / "best.ckpt", there, config)
    with pytest.raises(UserError) as caught:
        begin(weights, norm=here)
    assert f"{weights} {fault} and does not fit norm {here!r} (40 statistics such as " in str(caught.value)
    assert str(caught.value).endswith(f"; set --model.norm {fitting}")


def test_a_deeper_backbone_of_the_same_shapes_is_refused(tmp_path):
    there, config = build(backbone="resnet34")
    weights = write_run(tmp_path / "best.ckpt", there, config)
    with pytest.raises(UserError, match=r"another backbone than 'resnet18'.*layer1\.2\.conv1\.weight is too many"):
        begin(weights)


def test_settings_that_weights_do_not_show_are_told(tmp_path):
    there, config = build()
    weights = write_run(tmp_path / "best.ckpt", there, config)
    _, _, start = begin(weights, anchor_sizes=(16, 32, 64, 128, 256), norm_eps=0.0)
    assert start.lines[-1] == (
        "  note: trained with model.norm_eps 1e-05 (here 0.0), "
        "model.anchor_sizes [8, 16, 32, 64, 128] (here [16, 32, 64, 128, 256])"
    )


def test_refuses_what_is_no_detector_or_another(tmp_path):
    def refusal(weights: Path | str, **changes) -> str:
        with pytest.raises(UserError) as caught:
            begin(weights, **changes)
        assert "\n" not in str(caught.value)
        return str(caught.value)

    there, config = build()
    weights = write_run(tmp_path / "best.ckpt", there, config)
    assert "has another backbone than 'resnet34'" in refusal(weights, backbone="resnet34")
    assert "set --model.backbone" in refusal(weights, backbone="timm/resnet10t")
    classifier = tmp_path / "resnet18.pth"
    torch.save(torchvision.models.resnet18(weights=None).state_dict(), classifier)
    assert f"--model.weights_backbone {classifier}" in refusal(classifier)
    (tmp_path / "broken.pth").write_bytes(b"nothing")
    assert "cannot read" in refusal(tmp_path / "broken.pth")
    torch.save({"a": torch.zeros(2)}, tmp_path / "other.pth")
    assert "holds no detector" in refusal(tmp_path / "other.pth")
    for content, told in (
        (
            {"epoch": 3, "model_state_dict": there.state_dict()},
            "its keys are 'epoch', 'model_state_dict'; save what is under 'model_state_dict' to a file of its own",
        ),
        (
            {"a": torch.zeros(2), "step": 3},
            "its keys are 'a', 'step', and 'step' is no tensor (int); save the",
        ),
        ([torch.zeros(2)], "it holds a list; save the network's state_dict()"),
        ({}, "it is empty; save"),
    ):
        torch.save(content, tmp_path / "other.pth")
        assert f"other.pth holds no state dict, a mapping from names to tensors: {told}" in refusal(
            tmp_path / "other.pth"
        )
    name = "backbone.body.conv1.weight"
    torch.save({**there.state_dict(), name: torch.zeros(64, 3, 7, 7, dtype=torch.int8)}, tmp_path / "other.pth")
    assert (
        f"(1 tensors do not fit: {name} is torch.int8 instead of torch.float32); save them as floating point numbers"
    ) in refusal(tmp_path / "other.pth")
    assert "no file or folder 'MaskRCNN_ResNet50_Weights'; nearest: MaskRCNN_ResNet50_FPN" in refusal(
        "MaskRCNN_ResNet50_Weights"
    ).replace(", and none of torchvision's trained detectors has this name", "")
    (tmp_path / "run").mkdir()
    assert refusal(tmp_path / "run").startswith(f"model.weights: {tmp_path / 'run'} is not a run's folder")
    points = tmp_path / "points.ckpt"
    content = {
        "latentgnn": {"step": 3, "config": {"task": "pointcloud"}, "course": {}, "data": {}},
        "state_dict": {"a": torch.zeros(2)},
        "optimizer": {},
    }
    write_checkpoint(points, content)
    assert refusal(points).startswith(f"model.weights: {points} is of task 'pointcloud'")


def test_weights_in_half_precision_counters_too(tmp_path):
    there, _ = build()
    state = {name: value.half() for name, value in there.state_dict().items()}
    torch.save(state, tmp_path / "half.pth")
    model, _, start = begin(tmp_path / "half.pth")
    assert all(torch.equal(value, state[name].to(value)) for name, value in model.state_dict().items())
    assert "started anew" not in "\n".join(start.lines)


def test_files_with_tensors_of_strange_shapes_are_no_fault_of_ours(tmp_path):
    """What is not as it should be starts anew, or is refused in one line."""
    path = tmp_path / "model.pth"
    state = build()[0].state_dict()
    for name, value in {
        "roi_heads.box_predictor.cls_score.bias": torch.zeros(()),
        "roi_heads.box_predictor.cls_score.weight": torch.zeros(2, 24),
        "roi_heads.box_predictor.bbox_pred.weight": torch.zeros(3),
        "roi_heads.mask_predictor.mask_fcn_logits.weight": torch.zeros(0, 12, 1, 1),
        "rpn.head.cls_logits.weight": torch.zeros(15, 32, 1, 1, dtype=torch.int64),
    }.items():
        torch.save({**state, name: value}, path)
        model, before, _ = begin(path)
        assert torch.equal(model.state_dict()[name], before[name])
    torch.save({**state, "rpn.head.cls_logits.bias": torch.zeros(3).to_sparse()}, path)
    with pytest.raises(UserError, match=r"holds sparse or quantized tensors, such as rpn\.head\.cls_logits\.bias"):
        begin(path)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("MaskRCNN_ResNet50_FPN_V2_Weights.COCO_V1", "--model.backbone resnet50 --model.heads v2"),
        ("maskrcnn_resnet50_fpn", "--model.backbone resnet50 --model.norm_eps 0.0"),
        ("RetinaNet_ResNet50_FPN_Weights.COCO_V1", "--model.detector retinanet --model.backbone resnet50"),
    ],
)
def test_torchvisions_weights_of_another_detector_are_refused_before_they_are_fetched(name, options):
    with pytest.raises(UserError, match=f"is of another detector; with it, take {options}"):
        begin(name)


def test_a_whole_detector_as_weights_of_the_backbone_is_recognised(tmp_path):
    path = tmp_path / "detector.pth"
    torch.save(build()[0].state_dict(), path)
    with pytest.raises(UserError, match=f"a whole detector and not a classifier; give it as --model.weights {path}"):
        build(weights_backbone=str(path))


def test_trained_weights_that_are_neither_there_nor_to_be_had(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    r50 = {"backbone": "resnet50", "norm": "frozen_batch_norm", "norm_eps": 0.0}
    with pytest.raises(UserError, match=r"bf2d0c1e.pth is not there, and HF_HUB_OFFLINE.*--model.weights PATH"):
        begin("MaskRCNN_ResNet50_FPN_Weights.COCO_V1", **r50)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")  # nothing listens on the discard port
    with pytest.raises(UserError, match=r"download.pytorch.org does not answer\). Without a network"):
        begin("MaskRCNN_ResNet50_FPN_Weights.COCO_V1", **r50)
    assert not list(tmp_path.rglob("*.pth"))


def test_blocks_of_the_published_fork(tmp_path):
    """``featureaug3`` stands after the third layer, C4, in the fork of maskrcnn-benchmark."""
    there, _ = build(blocks={"C4": 4, "C5": 3}, block=BlockConfig(gamma_init=0.7))
    state = {}
    for name, value in there.state_dict().items():
        if ".latentgnn." not in name:
            state[
                name.replace("backbone.body.conv1", "backbone.body.stem.conv1").replace("body.bn1", "body.stem.bn1")
            ] = value
    for name, block in blocks_of(there).items():
        layer = {"layer3": 3, "layer4": 4}[name.split(".")[2]]
        state |= {f"backbone.body.featureaug{layer}.{key}": v for key, v in published_state_dict(block).items()}
    torch.save({"model": state}, tmp_path / "fork.pth")
    model, _, start = begin(tmp_path / "fork.pth", blocks={"C4": 4})
    assert same({n: v for n, v in model.state_dict().items() if "layer3.latentgnn" in n}, there.state_dict(), "")
    assert model.state_dict()["backbone.body.layer3.latentgnn.gamma"].item() == pytest.approx(0.7)
    assert "  left out: the block at C5, where this model has none (--model.blocks)" in start.lines
    _, _, start = begin(tmp_path / "fork.pth", blocks={"C4": 6})
    assert any(
        line.startswith("  started anew: the block at C4 (the published weights do not fit") for line in start.lines
    )
