"""torchvision's networks for dense prediction, with its own or timm's backbones, and LatentGNN blocks."""

from collections import OrderedDict
from typing import Any

import timm
import torch
from torch import Tensor, nn
from torchvision.models import get_model, list_models, segmentation
from torchvision.models.segmentation.deeplabv3 import DeepLabHead
from torchvision.models.segmentation.fcn import FCNHead

from latentgnn.errors import UserError, first_line, system_error
from latentgnn.tasks.blocks import insert_blocks
from latentgnn.tasks.segmentation.config import ModelConfig

_HEADS = {"fcn": FCNHead, "deeplabv3": DeepLabHead}
_ALONE = 65  # side of the image for placing blocks: large enough for maps of more than one node at any stride


class TimmBody(nn.Module):
    """The last two feature maps of a timm network.

    Args:
        network: made with ``features_only=True``.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """Return ``out``, the last map, and ``aux``, the one before it."""
        maps = self.network(x)
        return OrderedDict(out=maps[-1], aux=maps[-2])


def build_segmenter(config: ModelConfig, *, num_classes: int, auxiliary: bool, download: bool = True) -> nn.Module:
    """Build a network that returns ``{"out": logits}`` for normalised images, and ``"aux"`` with an auxiliary head.

    Args:
        config: see `ModelConfig`.
        num_classes: K; logits are (B, K, H, W).
        auxiliary: whether to add an auxiliary head.
        download: whether to download ``config.weights_backbone``; not needed if other weights are loaded afterwards.

    Raises:
        UserError: if there is no such network, its weights cannot be downloaded, or a block does not fit.
    """
    weights = config.weights_backbone if download else None
    if auxiliary and config.architecture == "lraspp":
        raise UserError("loss.auxiliary: lraspp has no auxiliary head; take 0")
    try:
        model = _network(config, num_classes, auxiliary, weights)
    except UserError:
        raise
    except Exception as error:  # the libraries raise many kinds of errors for names, strides and downloads
        if (fault := system_error(error)) is not None and weights is None:
            raise fault from error
        what = f"{config.architecture} on {config.backbone}" + (f" with {weights}" if weights else "")
        raise UserError(f"model: {what} cannot be made ({type(error).__name__}: {first_line(error)})") from error
    if config.blocks:
        try:
            insert_blocks(model, config.blocks, config.block, example_input=torch.zeros(2, 3, _ALONE, _ALONE))
        except (ValueError, TypeError) as error:
            raise UserError(f"model.blocks: {error}") from error
    return model


def _network(config: ModelConfig, num_classes: int, auxiliary: bool, weights: str | None) -> nn.Module:
    name = f"{config.architecture}_{config.backbone}"
    if name in list_models(module=segmentation):
        options = {} if config.architecture == "lraspp" else {"aux_loss": auxiliary}
        return get_model(name, weights=None, weights_backbone=weights, num_classes=num_classes, **options)
    if config.architecture not in _HEADS or config.backbone not in timm.list_models():
        known = ", ".join(list_models(module=segmentation))
        raise UserError(
            f"model.backbone: there is no {config.architecture} on {config.backbone}: torchvision has {known}, and fcn "
            "and deeplabv3 take any network of timm's (timm.list_models())"
        )
    if weights not in (None, "pretrained"):
        raise UserError(f"model.weights_backbone: networks of timm's take null or pretrained; got {weights}")
    network = timm.create_model(
        config.backbone, pretrained=weights is not None, features_only=True, output_stride=config.output_stride
    )
    info: Any = network.feature_info
    before, last = info.channels()[-2:]
    head = _HEADS[config.architecture](last, num_classes)
    second = FCNHead(before, num_classes) if auxiliary else None
    kind = segmentation.FCN if config.architecture == "fcn" else segmentation.DeepLabV3
    return kind(TimmBody(network), head, second)


def last_layers(model: nn.Module) -> list[str]:
    """Return the names of the layers that have one row per class."""
    names = ("classifier.4", "aux_classifier.4", "classifier.low_classifier", "classifier.high_classifier")
    present = dict(model.named_modules())
    return [name for name in names if isinstance(present.get(name), nn.Conv2d)]
