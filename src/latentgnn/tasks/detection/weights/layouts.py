"""Converts state dicts of whole detectors to torchvision's current names and row order.

Supported are torchvision's earlier names, and the Mask R-CNN and Faster R-CNN with ResNet and feature pyramid of
maskrcnn-benchmark, of its fork that was published with LatentGNN, and of detectron2. The last three take images as BGR
in 0..255; their first convolution is converted to take RGB, normalised as here.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torchvision.models.detection import MaskRCNN_ResNet50_FPN_Weights

_CLASS, _BOX = "roi_heads.box_predictor.cls_score", "roi_heads.box_predictor.bbox_pred"
_MASK = "roi_heads.mask_predictor.mask_fcn_logits"
_BLOCK = re.compile(r"backbone\.body\.featureaug(\d)\.(.+)")
_SINCE_PADDING_OF_NAMES = [
    (r"^(backbone\.fpn\.(?:inner|layer)_blocks\.\d+)\.(weight|bias)$", r"\1.0.\2"),
    (r"^rpn\.head\.conv\.(weight|bias)$", r"rpn.head.conv.0.0.\1"),
]


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Weights of a whole detector in the current layout.

    Args:
        name: name of the original layout.
        state: the state dict.
        renamed: number of tensors that had other names.
        blocks: published LatentGNN blocks by stage, ``C3`` to ``C5``, each with the published names.
        categories: names of the rows of the last layers, background first, guessed from their number; ``None`` if
            unknown.
        settings: fields of `ModelConfig` that the weights were trained with, as far as the layout implies them.
    """

    name: str
    state: dict[str, Tensor]
    renamed: int = 0
    blocks: Mapping[str, dict[str, Tensor]] = field(default_factory=dict)
    categories: list[str] | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)


def recognised(state: Mapping[str, Tensor], *, image_std: Sequence[float]) -> Layout | None:
    """Convert a state dict to the current layout; return ``None`` if it is not a detector's.

    Args:
        state: state dict with the names of torchvision, maskrcnn-benchmark or detectron2.
        image_std: standard deviations, in RGB, by which the detector will divide its images.
    """
    if any(name.startswith("backbone.bottom_up.") for name in state):
        return _detectron2(state, image_std)
    if any(name.startswith("backbone.body.stem.") for name in state):
        return _benchmark(state, image_std)
    if any(name.startswith("backbone.body.") for name in state):
        return _torchvision(state)
    return None


def _torchvision(state: Mapping[str, Tensor]) -> Layout:
    renames = [
        *_SINCE_PADDING_OF_NAMES,
        (r"^roi_heads\.mask_head\.mask_fcn(\d+)\.", lambda match: f"roi_heads.mask_head.{int(match[1]) - 1}.0."),
        (
            r"^(head\.\w+_head\.conv)\.(\d+)\.(weight|bias)$",
            # A convolution and its ReLU were two consecutive modules, and are now one.
            lambda match: f"{match[1]}.{int(match[2]) // 2}.0.{match[3]}",
        ),
    ]
    new = _renamed(state, renames)
    return Layout(name="torchvision", state=new, renamed=len(new.keys() - state.keys()), categories=_coco(new))


def _benchmark(state: Mapping[str, Tensor], image_std: Sequence[float]) -> Layout:
    blocks: dict[str, dict[str, Tensor]] = {}
    rest: dict[str, Tensor] = {}
    for name, value in state.items():
        if match := _BLOCK.fullmatch(name):
            # The fork numbers stages like ResNet's layers, of which the first is C2.
            blocks.setdefault(f"C{int(match[1]) + 1}", {})[match[2]] = value
        elif ".anchor_generator." not in name:
            rest[name] = value
    renames = [
        (r"^backbone\.body\.stem\.", "backbone.body."),
        (r"^backbone\.fpn\.fpn_inner(\d)\.", lambda match: f"backbone.fpn.inner_blocks.{int(match[1]) - 1}.0."),
        (r"^backbone\.fpn\.fpn_layer(\d)\.", lambda match: f"backbone.fpn.layer_blocks.{int(match[1]) - 1}.0."),
        *_SINCE_PADDING_OF_NAMES,
        (r"^roi_heads\.box\.feature_extractor\.", "roi_heads.box_head."),
        (r"^roi_heads\.box\.predictor\.", "roi_heads.box_predictor."),
        (r"^roi_heads\.mask\.feature_extractor\.mask_fcn(\d)\.", _mask_layer),
        (r"^roi_heads\.mask\.predictor\.", "roi_heads.mask_predictor."),
    ]
    new = _renamed(rest, renames)
    _take_rgb(new, image_std)
    return Layout(
        name="maskrcnn-benchmark",
        state=new,
        renamed=len(new.keys() - state.keys()),
        blocks=blocks,
        categories=_coco(new),
        # Its frozen norms add no epsilon to the variance, and its ResNets are Caffe's.
        settings={"norm_eps": 0.0, "stride_in_1x1": True, "image_mean": _rgb((102.9801, 115.9465, 122.7717))},
    )


def _detectron2(state: Mapping[str, Tensor], image_std: Sequence[float]) -> Layout:
    renames = [
        (r"^backbone\.bottom_up\.stem\.conv1\.norm\.", "backbone.body.bn1."),
        (r"^backbone\.bottom_up\.stem\.", "backbone.body."),
        (r"^backbone\.bottom_up\.res(\d)\.", lambda match: f"backbone.body.layer{int(match[1]) - 1}."),
        (r"\.shortcut\.norm\.", ".downsample.1."),
        (r"\.shortcut\.", ".downsample.0."),
        (r"^(backbone\.body\..+)\.conv(\d)\.norm\.", r"\1.bn\2."),
        (r"^backbone\.fpn_lateral(\d)\.", lambda match: f"backbone.fpn.inner_blocks.{int(match[1]) - 2}.0."),
        (r"^backbone\.fpn_output(\d)\.", lambda match: f"backbone.fpn.layer_blocks.{int(match[1]) - 2}.0."),
        (r"^proposal_generator\.rpn_head\.conv\.", "rpn.head.conv.0.0."),
        (r"^proposal_generator\.rpn_head\.objectness_logits\.", "rpn.head.cls_logits."),
        (r"^proposal_generator\.rpn_head\.anchor_deltas\.", "rpn.head.bbox_pred."),
        (r"^roi_heads\.box_head\.fc1\.", "roi_heads.box_head.fc6."),
        (r"^roi_heads\.box_head\.fc2\.", "roi_heads.box_head.fc7."),
        (r"^roi_heads\.mask_head\.mask_fcn(\d)\.", _mask_layer),
        (r"^roi_heads\.mask_head\.deconv\.", "roi_heads.mask_predictor.conv5_mask."),
        (r"^roi_heads\.mask_head\.predictor\.", "roi_heads.mask_predictor.mask_fcn_logits."),
    ]
    mean, std = state.get("pixel_mean"), state.get("pixel_std")
    extra = ("pixel_mean", "pixel_std")
    rest = {name: value for name, value in state.items() if name not in extra and ".anchor_generator." not in name}
    new = _renamed(rest, renames)
    for name, value in new.items():
        if not value.ndim:
            continue
        # There, the background is the last row, and box and mask layers have no row for it.
        layer = name.rpartition(".")[0]
        if layer == _CLASS:
            new[name] = value.roll(1, 0)
        elif layer in (_BOX, _MASK):
            rows = 4 if layer == _BOX else 1
            new[name] = torch.cat((value.new_zeros(rows, *value.shape[1:]), value))
    _take_rgb(new, image_std, std=None if std is None else std.flatten().tolist())
    return Layout(
        name="detectron2",
        state=new,
        renamed=len(new.keys() - state.keys()),
        categories=_coco(new),
        # For its ResNet-50 and -101, which are Caffe's. Its ResNeXt has the stride in the second convolution.
        settings={
            "stride_in_1x1": True,
            "image_mean": _rgb((103.53, 116.28, 123.675) if mean is None else mean.flatten().tolist()),
        },
    )


def _mask_layer(match: re.Match[str]) -> str:
    return f"roi_heads.mask_head.{int(match[1]) - 1}.0."


def _renamed(state: Mapping[str, Tensor], renames: Sequence[tuple[str, Any]]) -> dict[str, Tensor]:
    """Apply each pattern and its replacement in turn to all names."""
    new = {}
    for name, value in state.items():
        for pattern, replacement in renames:
            name = re.sub(pattern, replacement, name)
        new[name] = value
    return new


def _rgb(bgr: Sequence[float]) -> tuple[float, ...]:
    return tuple(round(value / 255, 4) for value in reversed(bgr))


def _take_rgb(state: dict[str, Tensor], image_std: Sequence[float], std: Sequence[float] | None = None) -> None:
    """Convert the first convolution from BGR in 0..255, divided by std, to RGB in 0..1, divided by ``image_std``."""
    name = "backbone.body.conv1.weight"
    if name in state and state[name].ndim == 4 and state[name].shape[1] == 3:
        there = torch.tensor(std if std is not None and len(std) == 3 else (1.0, 1.0, 1.0)).flip(0)
        factor = 255 * torch.tensor(image_std) / there
        state[name] = state[name].flip(1) * factor[:, None, None]


def _coco(state: Mapping[str, Tensor]) -> list[str] | None:
    """COCO's names for the numbers of rows of detectors trained on COCO: 91 ids, or 81 for its 80 categories."""
    names = list(MaskRCNN_ResNet50_FPN_Weights.COCO_V1.meta["categories"])
    used = [name for name in names if name != "N/A"]
    rows = number_of_rows(state)
    return next((known for known in (names, used) if len(known) == rows), None)


def number_of_rows(state: Mapping[str, Tensor]) -> int | None:
    """Return the number of rows of a detector's last layers, including the background; ``None`` if it has none."""
    names = (f"{_CLASS}.bias", "head.classification_head.cls_logits.bias", "head.regression_head.bbox_reg.bias")
    classes, logits, boxes = (
        value.shape[0] if (value := state.get(name)) is not None and value.ndim == 1 else 0 for name in names
    )
    anchors = boxes // 4
    return classes or (logits // anchors if anchors else 0) or None
