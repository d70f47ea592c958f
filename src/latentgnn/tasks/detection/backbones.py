"""Backbones of detectors: a torchvision or timm network with a feature pyramid on top."""

import difflib
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import timm
import torch
from timm.layers.norm_act import BatchNormAct2d, GroupNormAct, freeze_batch_norm_2d
from torch import Tensor, nn
from torchvision.models import get_model, get_model_weights, resnet
from torchvision.models._utils import IntermediateLayerGetter
from torchvision.ops import FeaturePyramidNetwork, FrozenBatchNorm2d
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool, LastLevelP6P7

from latentgnn.errors import UserError
from latentgnn.masks import node_mask
from latentgnn.norms import group_norm
from latentgnn.tasks.detection.config import ModelConfig
from latentgnn.tasks.detection.weights.body import OTHERWISE, SETTING, load_body, read_classifier
from latentgnn.tasks.detection.weights.fetching import timm_weights, torchvision_state

_STRIDES = {"C2": 4, "C3": 8, "C4": 16, "C5": 32}
_MOBILENET = "mobilenet_v3_large"
# The last layer of each stage of torchvision's MobileNetV3-Large, and the two layers that its detectors' pyramid uses.
_MOBILENET_STAGES = {"C2": "3", "C3": "6", "C4": "12", "C5": "15"}
_MOBILENET_MAPS = {"13": 160, "16": 960}


def norm_of(config: ModelConfig) -> Callable[[int], nn.Module]:
    """Return a function that makes a norm for a number of channels."""
    if config.norm == "group_norm":
        return group_norm
    return partial(nn.BatchNorm2d if config.norm == "batch_norm" else FrozenBatchNorm2d, eps=config.norm_eps)


class PyramidBackbone(nn.Module):
    """A network with a feature pyramid on some of its feature maps; the network's blocks do not see the padding.

    Args:
        body: returns its feature maps as a list, or as a dict in the same order.
        fpn: the pyramid.
        positions: indices of the feature maps that the pyramid uses.
        out_channels: number of channels of the pyramid.
    """

    def __init__(self, body: nn.Module, fpn: nn.Module, positions: tuple[int, ...], out_channels: int) -> None:
        super().__init__()
        self.body = body
        self.fpn = fpn
        self.positions = positions
        self.out_channels = out_channels

    # The mask reaches the blocks by hooks, which compiled code does not notice.
    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """Map (B, 4, H, W), whose fourth channel is a mask of the images' own pixels, to the levels of the pyramid."""
        weight = next(parameter for parameter in self.body.parameters() if parameter.ndim == 4)
        channels_last = weight.is_contiguous(memory_format=torch.channels_last) and not weight.is_contiguous()
        images = x[:, :3].contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)
        with node_mask(self.body, x[:, 3] > 0.5):
            features = self.body(images)
        if isinstance(features, dict):
            features = list(features.values())
        levels = OrderedDict((str(level), features[position]) for level, position in enumerate(self.positions))
        pyramid: dict[str, Tensor] = self.fpn(levels)
        return pyramid


@dataclass(frozen=True)
class _Body:
    """A network that returns feature maps.

    Args:
        network: returns them as a list or a dict.
        stages: for each stage, the module that a block may follow.
        maps: index and channels of the feature maps that a pyramid uses, in order; these are the maps of all stages,
            except for a network with its own choice of maps.
    """

    network: nn.Module
    stages: dict[str, str]
    maps: list[tuple[int, int]]


def build_backbone(config: ModelConfig) -> tuple[PyramidBackbone, dict[str, str]]:
    """Build the backbone with its weights, frozen as configured; also return the name of each stage in its body.

    Raises:
        UserError: if there is no such network, it does not fit, or its weights cannot be loaded.
    """
    body = _build_body(config)
    _freeze(body.network, list(body.stages.values()), config.trainable_stages)
    retina, width = config.detector == "retinanet", config.fpn_channels
    maps = body.maps[1:] if retina else body.maps
    channels = [number for _, number in maps]
    if retina:
        extra: nn.Module = LastLevelP6P7(channels[-1] if config.heads == "v2" else width, width)
    else:
        extra = LastLevelMaxPool()
    norm = norm_of(config) if config.heads == "v2" and not retina else None
    fpn = FeaturePyramidNetwork(channels, width, extra, norm_layer=norm)
    return PyramidBackbone(body.network, fpn, tuple(position for position, _ in maps), width), body.stages


def _build_body(config: ModelConfig) -> _Body:
    if config.stride_in_1x1 and (config.backbone.startswith("timm/") or config.backbone == _MOBILENET):
        raise UserError(f"model.stride_in_1x1 is for torchvision's ResNets; leave it out with {config.backbone!r}")
    if config.backbone.startswith("timm/"):
        return _timm_body(config)
    return _mobilenet_body(config) if config.backbone == _MOBILENET else _resnet_body(config)


def _resnet_body(config: ModelConfig) -> _Body:
    known = [name for name in resnet.__all__ if name.islower()]
    if config.backbone not in known:
        near = difflib.get_close_matches(config.backbone, [*known, _MOBILENET], n=3) or known
        raise UserError(
            f"model.backbone: no torchvision ResNet {config.backbone!r}; nearest: {', '.join(near)} (for one of timm's "
            "networks: timm/<name>)"
        )
    network = get_model(config.backbone, weights=None, norm_layer=norm_of(config))
    if config.stride_in_1x1:
        _stride_in_first(network, config.backbone)
    stages = {stage: f"layer{index}" for index, stage in enumerate(_STRIDES, 1)}
    body = IntermediateLayerGetter(network, {name: stage for stage, name in stages.items()})
    _load_published(body, config)
    return _Body(body, stages, [(index, network.inplanes // 8 * 2**index) for index in range(len(_STRIDES))])


def _stride_in_first(network: nn.Module, name: str) -> None:
    for stage in ("layer2", "layer3", "layer4"):
        block = getattr(network, stage)[0]
        if not isinstance(block, resnet.Bottleneck):
            raise UserError(f"model.stride_in_1x1: {name!r} has no 1x1 convolution at the start of its stages")
        block.conv1.stride, block.conv2.stride = block.conv2.stride, block.conv1.stride


def _mobilenet_body(config: ModelConfig) -> _Body:
    """The network of torchvision's MobileNet detectors, with two maps, both of stride 32."""
    if config.detector == "retinanet":
        raise UserError(
            f"model.backbone: {_MOBILENET} has two feature maps for a pyramid, as torchvision's Faster R-CNN takes "
            "them, and a RetinaNet needs three; take timm/mobilenetv3_large_100"
        )
    network = get_model(_MOBILENET, weights=None, norm_layer=norm_of(config))
    body = IntermediateLayerGetter(network.features, {name: name for name in _MOBILENET_MAPS})
    _load_published(body, config)
    return _Body(body, _MOBILENET_STAGES, list(enumerate(_MOBILENET_MAPS.values())))


def _load_published(body: nn.Module, config: ModelConfig) -> None:
    """Load the weights that ``model.weights_backbone`` names into a torchvision network."""
    if config.weights_backbone is None:
        return
    published = get_model_weights(config.backbone)
    name = config.weights_backbone.rpartition("_Weights.")[2]
    if name in published.__members__:
        what = f"{published[name]} of {config.backbone}"
        weights = torchvision_state(published[name], what, setting=SETTING, otherwise=OTHERWISE)
    else:
        weights = read_classifier(config.weights_backbone, config.backbone, ", ".join(published.__members__))
    load_body(body, weights, name=config.weights_backbone, backbone=config.backbone, norm=config.norm)


def _timm_body(config: ModelConfig) -> _Body:
    name = config.backbone.removeprefix("timm/")
    if not timm.is_model(name):
        near = difflib.get_close_matches(name, timm.list_models(), n=5) or ["resnet50", "convnext_tiny"]
        raise UserError(
            f"model.backbone: timm has no network {name!r}; nearest: {', '.join(f'timm/{other}' for other in near)}"
        )
    published = config.weights_backbone == "pretrained"
    fetching = timm_weights(f"the pretrained {config.backbone}", setting=SETTING, otherwise=OTHERWISE)
    with fetching if published else _refusing(name):
        network = timm.create_model(name, pretrained=published, features_only=True)
    info: Any = network.feature_info
    reductions, modules, widths = info.reduction(), info.module_name(), info.channels()
    missing = [stage for stage, stride in _STRIDES.items() if stride not in reductions]
    if missing or getattr(network, "output_fmt", "NCHW") != "NCHW":
        raise UserError(
            f"model.backbone: {config.backbone!r} gives no feature maps (B, C, H, W) at the strides 4, 8, 16 and 32 "
            f"(its strides: {reductions}); take a convolutional network such as timm/resnet50 or timm/convnext_tiny"
        )
    # The last map of each stride is the output of a stage; earlier ones come from inside it.
    positions = {stage: len(reductions) - 1 - reductions[::-1].index(stride) for stage, stride in _STRIDES.items()}
    inside = dict(network.named_modules())
    stages = {}
    for stage, position in positions.items():
        module = modules[position]
        # timm renames a.b to a_b when it splits a network.
        stages[stage] = module if module in inside else module.replace(".", "_")
    if config.norm == "frozen_batch_norm":
        network = freeze_batch_norm_2d(network)  # type: ignore[no-untyped-call]
    elif config.norm == "group_norm":
        _batch_to_group_norm(network)
    if config.weights_backbone is not None and not published:
        weights = read_classifier(config.weights_backbone, config.backbone, "'pretrained'")
        load_body(network, weights, name=config.weights_backbone, backbone=config.backbone, norm=config.norm)
    return _Body(network, stages, [(position, widths[position]) for position in positions.values()])


def _batch_to_group_norm(module: nn.Module) -> None:
    for name, child in module.named_children():
        if isinstance(child, BatchNormAct2d):
            norm = GroupNormAct(child.num_features, num_groups=group_norm(child.num_features).num_groups)
            norm.drop, norm.act = child.drop, child.act
            setattr(module, name, norm)
        elif isinstance(child, nn.BatchNorm2d):
            setattr(module, name, group_norm(child.num_features))
        else:
            _batch_to_group_norm(child)


@contextmanager
def _refusing(name: str) -> Iterator[None]:
    """Turn the various errors that timm raises for networks that it cannot split into `UserError`."""
    try:
        yield
    except (AssertionError, AttributeError, IndexError, RuntimeError, TypeError, ValueError) as error:
        raise UserError(f"model.backbone: timm/{name} gives no feature maps for a detector: {error}") from error


def _freeze(body: nn.Module, stages: list[str], trainable: int) -> None:
    """Freeze all but the last stages; 5 freezes nothing, not even the stem."""
    level = 0  # level of the stem; modules between two stages belong to the later one
    for name, parameter in body.named_parameters():
        inside = next((k for k, stage in enumerate(stages, 1) if name.startswith(f"{stage}.")), None)
        level = max(level, inside or 0)
        own = inside or (min(level + 1, 4) if level else 0)
        parameter.requires_grad_(own > 4 - trainable)
