"""Detectors: torchvision's heads on a feature pyramid, with LatentGNN blocks in the backbone."""

import difflib
import socket
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from http.client import HTTPException
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import huggingface_hub.constants
import safetensors.torch
import timm
import torch
from timm.layers.norm_act import BatchNormAct2d, GroupNormAct, freeze_batch_norm_2d
from torch import Tensor, nn
from torchvision.models import get_model, get_model_weights, resnet
from torchvision.models._utils import IntermediateLayerGetter
from torchvision.models.detection import FasterRCNN, MaskRCNN, RetinaNet
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.models.detection.transform import GeneralizedRCNNTransform
from torchvision.ops import FeaturePyramidNetwork, FrozenBatchNorm2d
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool, LastLevelP6P7

from latentgnn.errors import UserError
from latentgnn.masks import node_mask
from latentgnn.norms import group_norm
from latentgnn.tasks.blocks import insert_blocks
from latentgnn.tasks.detection.config import ModelConfig

_STRIDES = {"C2": 4, "C3": 8, "C4": 16, "C5": 32}
_NORMS: dict[str, Callable[[int], nn.Module]] = {
    "batch_norm": nn.BatchNorm2d,
    "frozen_batch_norm": FrozenBatchNorm2d,
    "group_norm": group_norm,
}
_CONNECT_SECONDS = 5.0


def build_detector(config: ModelConfig, num_classes: int) -> nn.Module:
    """Build a Mask R-CNN, Faster R-CNN or RetinaNet with LatentGNN blocks in its backbone.

    The model is called as torchvision's: ``model(images, targets)`` gives a dict of losses in training mode, and
    ``model(images)`` a list of dicts with ``boxes``, ``labels``, ``scores`` (and ``masks``) in evaluation mode. Images
    are (3, H, W) in 0..1, of any sizes. Blocks are made last: with the same seed, everything else starts the same with
    and without them.

    A timm network without batch norm, such as a ConvNeXt, keeps its own norms whatever ``norm`` says.

    RetinaNet uses the pyramid levels P3 to P7, three octave scales for each of ``anchor_sizes``, and
    ``rpn_pre_nms[1]`` candidates a level before non-maximum suppression.

    Args:
        config: see `ModelConfig`.
        num_classes: number of categories, without the background.

    Raises:
        UserError: a setting is out of range or does not fit the others, or the backbone's weights cannot be loaded.
    """
    _check(config, num_classes)
    backbone, stages = _build_backbone(config)
    model = _HEADS[config.detector](config, backbone, num_classes)
    model.transform = PaddingAwareTransform(
        config.min_size, config.max_size, list(config.image_mean), list(config.image_std)
    )
    try:
        insert_blocks(backbone.body, {stages[stage]: number for stage, number in config.blocks.items()}, config.block)
    except (TypeError, ValueError) as error:
        raise UserError(f"model.blocks {dict(config.blocks)} on {config.backbone!r}: {error}") from error
    return model


class PaddingAwareTransform(GeneralizedRCNNTransform):  # type: ignore[misc]
    """Torchvision's transform, with a fourth channel: 1 on an image's own pixels and 0 on what the batch adds."""

    def batch_images(self, images: list[Tensor], size_divisible: int = 32) -> Tensor:
        """Images (3, H, W) of several sizes as one tensor (B, 4, H, W)."""
        marked = [torch.cat((image, image.new_ones(1, *image.shape[1:]))) for image in images]
        batch: Tensor = super().batch_images(marked, size_divisible)
        return batch


class PyramidBackbone(nn.Module):
    """A network and a feature pyramid on some of its feature maps; the network's blocks do not see the padding.

    Args:
        body: gives its feature maps as a list, or as a dict in the same order.
        fpn: the pyramid.
        positions: which of the feature maps the pyramid takes.
        out_channels: width of the pyramid.
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
        """(B, 4, H, W), the fourth channel of `PaddingAwareTransform`, to the levels of the pyramid."""
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


class _EqualSizes(nn.Module):
    """Evaluation of images of one size at a time.

    The blocks do not see the padding, but convolutions do: beyond an image's edge they find zeros where there is no
    padding, and what earlier layers made of the padding where there is some. An image's result is independent of its
    neighbours only if all have the same padding.
    """

    def forward(self, images: list[Tensor], targets: list[dict[str, Tensor]] | None = None) -> Any:
        if self.training:
            return super().forward(images, targets)
        groups: dict[tuple[int, ...], list[int]] = {}
        for index, image in enumerate(images):
            groups.setdefault(tuple(image.shape), []).append(index)
        results: dict[int, dict[str, Tensor]] = {}
        for indices in groups.values():
            results.update(zip(indices, super().forward([images[index] for index in indices]), strict=True))
        return [results[index] for index in range(len(images))]


class _FasterRCNN(_EqualSizes, FasterRCNN):  # type: ignore[misc]
    pass


class _MaskRCNN(_EqualSizes, MaskRCNN):  # type: ignore[misc]
    pass


class _RetinaNet(_EqualSizes, RetinaNet):  # type: ignore[misc]
    pass


def _rcnn_options(config: ModelConfig, num_classes: int) -> dict[str, Any]:
    sizes = tuple((size,) for size in config.anchor_sizes)
    return {
        "rpn_anchor_generator": AnchorGenerator(sizes, (tuple(config.anchor_ratios),) * len(sizes)),
        "rpn_pre_nms_top_n_train": config.rpn_pre_nms[0],
        "rpn_pre_nms_top_n_test": config.rpn_pre_nms[1],
        "rpn_post_nms_top_n_train": config.rpn_post_nms[0],
        "rpn_post_nms_top_n_test": config.rpn_post_nms[1],
        "rpn_batch_size_per_image": config.rpn_batch_size,
        "box_head": TwoMLPHead(config.fpn_channels * 7 * 7, config.box_head_channels),
        "box_predictor": FastRCNNPredictor(config.box_head_channels, num_classes + 1),
        "box_score_thresh": config.score_threshold,
        "box_nms_thresh": config.nms_threshold,
        "box_detections_per_img": config.detections_per_image,
        "box_batch_size_per_image": config.box_batch_size,
    }


def _faster_rcnn(config: ModelConfig, backbone: PyramidBackbone, num_classes: int) -> nn.Module:
    return _FasterRCNN(backbone, **_rcnn_options(config, num_classes))


def _mask_rcnn(config: ModelConfig, backbone: PyramidBackbone, num_classes: int) -> nn.Module:
    width = config.mask_head_channels
    return _MaskRCNN(
        backbone,
        mask_head=MaskRCNNHeads(config.fpn_channels, (width,) * config.mask_head_layers, 1),
        mask_predictor=MaskRCNNPredictor(width, width, num_classes + 1),
        **_rcnn_options(config, num_classes),
    )


def _retinanet(config: ModelConfig, backbone: PyramidBackbone, num_classes: int) -> nn.Module:
    sizes = tuple(tuple(int(size * 2 ** (octave / 3)) for octave in range(3)) for size in config.anchor_sizes)
    return _RetinaNet(
        backbone,
        # Torchvision counts the background here, for labels start at 1.
        num_classes + 1,
        anchor_generator=AnchorGenerator(sizes, (tuple(config.anchor_ratios),) * len(sizes)),
        score_thresh=config.score_threshold,
        nms_thresh=config.nms_threshold,
        detections_per_img=config.detections_per_image,
        topk_candidates=config.rpn_pre_nms[1],
    )


_HEADS = {"faster_rcnn": _faster_rcnn, "mask_rcnn": _mask_rcnn, "retinanet": _retinanet}


def _build_backbone(config: ModelConfig) -> tuple[PyramidBackbone, dict[str, str]]:
    """The backbone with its weights, frozen as asked, and the name of each stage in its body."""
    build = _timm_body if config.backbone.startswith("timm/") else _torchvision_body
    body, stages, positions, channels = build(config)
    _freeze(body, list(stages.values()), config.trainable_stages)
    used = ["C3", "C4", "C5"] if config.detector == "retinanet" else list(_STRIDES)
    width = config.fpn_channels
    extra = LastLevelP6P7(width, width) if config.detector == "retinanet" else LastLevelMaxPool()
    fpn = FeaturePyramidNetwork([channels[stage] for stage in used], width, extra)
    return PyramidBackbone(body, fpn, tuple(positions[stage] for stage in used), width), stages


_Body = tuple[nn.Module, dict[str, str], dict[str, int], dict[str, int]]


def _torchvision_body(config: ModelConfig) -> _Body:
    """A network that gives the feature maps C2 to C5; of each stage its name, position and channels."""
    known = [name for name in resnet.__all__ if name.islower()]
    if config.backbone not in known:
        near = difflib.get_close_matches(config.backbone, known, n=3) or known
        raise UserError(
            f"model.backbone: no torchvision ResNet {config.backbone!r}; nearest: {', '.join(near)} (for one of timm's "
            "networks: timm/<name>)"
        )
    network = get_model(config.backbone, weights=None, norm_layer=_NORMS[config.norm])
    stages = {stage: f"layer{index}" for index, stage in enumerate(_STRIDES, 1)}
    body = IntermediateLayerGetter(network, {name: stage for stage, name in stages.items()})
    if config.weights_backbone is not None:
        _load(body, _torchvision_weights(config), config)
    channels = {stage: network.inplanes // 8 * 2**index for index, stage in enumerate(_STRIDES)}
    return body, stages, {stage: index for index, stage in enumerate(_STRIDES)}, channels


def _timm_body(config: ModelConfig) -> _Body:
    name = config.backbone.removeprefix("timm/")
    if not timm.is_model(name):
        near = difflib.get_close_matches(name, timm.list_models(), n=5) or ["resnet50", "convnext_tiny"]
        raise UserError(
            f"model.backbone: timm has no network {name!r}; nearest: {', '.join(f'timm/{other}' for other in near)}"
        )
    published = config.weights_backbone == "pretrained"
    with _fetching(config) if published else _refusing(name):
        body = timm.create_model(name, pretrained=published, features_only=True)
    info: Any = body.feature_info
    reductions, modules, widths = info.reduction(), info.module_name(), info.channels()
    missing = [stage for stage, stride in _STRIDES.items() if stride not in reductions]
    if missing or getattr(body, "output_fmt", "NCHW") != "NCHW":
        raise UserError(
            f"model.backbone: {config.backbone!r} gives no feature maps (B, C, H, W) at the strides 4, 8, 16 and 32 "
            f"(its strides: {reductions}); take a convolutional network such as timm/resnet50 or timm/convnext_tiny"
        )
    # The last map of a stride is a stage's output; earlier ones come from inside.
    positions = {stage: len(reductions) - 1 - reductions[::-1].index(stride) for stage, stride in _STRIDES.items()}
    inside = dict(body.named_modules())
    stages = {}
    for stage, position in positions.items():
        module = modules[position]
        # timm renames a.b to a_b where it takes a network apart.
        stages[stage] = module if module in inside else module.replace(".", "_")
    if config.norm == "frozen_batch_norm":
        body = freeze_batch_norm_2d(body)  # type: ignore[no-untyped-call]
    elif config.norm == "group_norm":
        _batch_to_group_norm(body)
    if config.weights_backbone is not None and not published:
        _load(body, _read_weights(config, "'pretrained'"), config)
    return body, stages, positions, {stage: widths[position] for stage, position in positions.items()}


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


def _freeze(body: nn.Module, stages: list[str], trainable: int) -> None:
    """Freeze all but the last stages; 5 keeps all of them and the stem."""
    level = 0  # of the stem; what comes between two stages belongs to the second
    for name, parameter in body.named_parameters():
        inside = next((k for k, stage in enumerate(stages, 1) if name.startswith(f"{stage}.")), None)
        level = max(level, inside or 0)
        own = inside or (min(level + 1, 4) if level else 0)
        parameter.requires_grad_(own > 4 - trainable)


def _torchvision_weights(config: ModelConfig) -> Mapping[str, Tensor]:
    published = get_model_weights(config.backbone).__members__
    name = str(config.weights_backbone).rpartition("_Weights.")[2]
    if name not in published:
        return _read_weights(config, ", ".join(published))
    with _fetching(config):
        weights: Mapping[str, Tensor] = published[name].get_state_dict(progress=False, check_hash=True)
    return weights


def _read_weights(config: ModelConfig, published: str) -> Mapping[str, Tensor]:
    path = Path(str(config.weights_backbone)).expanduser()
    if not path.is_file():
        raise UserError(
            f"model.weights_backbone: {config.weights_backbone!r} is no file and none of the published weights of "
            f"{config.backbone!r} ({published}); null starts without"
        )
    try:
        if path.suffix == ".safetensors":
            weights: Any = safetensors.torch.load_file(path)
        else:
            weights = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever the readers raise on bytes that are no such file
        raise UserError(
            f"model.weights_backbone: cannot read {path} ({type(error).__name__}): expected a safetensors file, or "
            "tensors that torch.load(weights_only=True) accepts"
        ) from error
    if isinstance(weights, dict):
        weights = next((weights[key] for key in ("state_dict", "model") if isinstance(weights.get(key), dict)), weights)
    if not isinstance(weights, dict) or not all(isinstance(value, Tensor) for value in weights.values()):
        raise UserError(f"model.weights_backbone: {path} holds no state dict: a mapping from names to tensors")
    return weights


def _load(body: nn.Module, weights: Mapping[str, Tensor], config: ModelConfig) -> None:
    """Load a whole network's weights into its body; what belongs to the classifier is left out."""
    children = {name for name, _ in body.named_children()}
    own = {}
    for key, value in weights.items():
        first, _, rest = key.partition(".")
        second, _, tail = rest.partition(".")
        if first in ("fc", "head", "classifier"):
            continue
        own[f"{first}_{second}.{tail}" if f"{first}_{second}" in children else key] = value
    expected = body.state_dict()
    # Frozen norms have no such counter and published ones from before 2018 neither.
    counters = {key for key in (*expected, *own) if key.endswith("num_batches_tracked")}
    faults = [f"{key} is missing" for key in expected if key not in own and key not in counters]
    faults += [f"{key} is unexpected" for key in own if key not in expected and key not in counters]
    faults += [
        f"{key} has shape {tuple(own[key].shape)}, expected {tuple(value.shape)}"
        for key, value in expected.items()
        if key in own and own[key].shape != value.shape
    ]
    if faults:
        more = f" and {len(faults) - 5} more" if len(faults) > 5 else ""
        raise UserError(
            f"model.weights_backbone: {config.weights_backbone!r} does not fit {config.backbone!r} with norm "
            f"{config.norm!r}: {'; '.join(faults[:5])}{more}"
        )
    body.load_state_dict(own, strict=False)


@contextmanager
def _refusing(name: str) -> Iterator[None]:
    """Networks that timm cannot take apart say so in many ways."""
    try:
        yield
    except (AssertionError, AttributeError, IndexError, RuntimeError, TypeError, ValueError) as error:
        raise UserError(f"model.backbone: timm/{name} gives no feature maps for a detector: {error}") from error


@contextmanager
def _fetching(config: ModelConfig) -> Iterator[None]:
    """Fail within seconds without a network, where the downloaders would wait or retry for minutes."""
    offline, timeout = huggingface_hub.constants.HF_HUB_OFFLINE, socket.getdefaulttimeout()
    try:
        socket.setdefaulttimeout(_CONNECT_SECONDS)
        if config.backbone.startswith("timm/") and not _reachable(huggingface_hub.constants.ENDPOINT):
            # Offline, the hub's client takes what it has in its cache and does not try again and again.
            huggingface_hub.constants.HF_HUB_OFFLINE = True
        yield
    except Exception as error:  # each client has errors of its own, and no base class in common
        raise UserError(
            f"model.weights_backbone: cannot get {config.weights_backbone!r} for {config.backbone!r} "
            f"({type(error).__name__}: {error}). Without a network, give a file of weights, or start without: "
            "--model.weights_backbone null"
        ) from error
    finally:
        huggingface_hub.constants.HF_HUB_OFFLINE = offline
        socket.setdefaulttimeout(timeout)


def _reachable(url: str) -> bool:
    try:
        urlopen(Request(url, method="HEAD"), timeout=_CONNECT_SECONDS).close()
    except HTTPError:
        return True
    except (OSError, HTTPException):
        return False
    return True


def _check(config: ModelConfig, num_classes: int) -> None:
    """Refuse what no library below would refuse in the user's own words."""
    if num_classes < 1:
        raise UserError(f"a detector needs at least one category, got {num_classes}")
    if config.norm == "group_norm" and config.weights_backbone in ("pretrained", "DEFAULT", "IMAGENET1K_V1"):
        raise UserError(
            f"model.weights_backbone: {config.weights_backbone!r} was trained with batch norm and does not fit "
            "model.norm 'group_norm'; take batch_norm or frozen_batch_norm, or --model.weights_backbone null"
        )
