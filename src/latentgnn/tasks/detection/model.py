"""Detectors: torchvision's heads on a feature pyramid, with LatentGNN blocks in the backbone."""

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models.detection import FasterRCNN, MaskRCNN, RetinaNet
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNConvFCHead, FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.models.detection.retinanet import RetinaNetHead
from torchvision.models.detection.rpn import RPNHead
from torchvision.models.detection.transform import GeneralizedRCNNTransform

from latentgnn.errors import UserError
from latentgnn.tasks.blocks import insert_blocks
from latentgnn.tasks.detection.backbones import PyramidBackbone, build_backbone, norm_of
from latentgnn.tasks.detection.config import ModelConfig


def build_detector(config: ModelConfig, num_classes: int) -> nn.Module:
    """Build a Mask R-CNN, Faster R-CNN or RetinaNet with LatentGNN blocks in its backbone.

    The model is called like torchvision's: ``model(images, targets)`` returns a dict of losses in training mode, and
    ``model(images)`` a list of dicts with ``boxes``, ``labels``, ``scores`` (and ``masks``) in evaluation mode. Images
    are (3, H, W) in 0..1, of any sizes. Blocks are created last, so that with the same seed everything else is
    initialised equally with and without them.

    A timm network without batch norm, such as a ConvNeXt, keeps its own norms whatever ``norm`` says.

    RetinaNet uses the pyramid levels P3 to P7, three octave scales for each of ``anchor_sizes``, and ``rpn_pre_nms[1]``
    candidates per level before non-maximum suppression.

    Args:
        config: see `ModelConfig`. Its ``weights`` are not loaded here: `latentgnn.tasks.detection.weights.start` does.
        num_classes: number of categories, without the background.

    Raises:
        UserError: if a setting is out of range or does not fit the others, or the backbone's weights cannot be loaded.
    """
    _check(config, num_classes)
    backbone, stages = build_backbone(config)
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
    """Torchvision's transform with a fourth channel: 1 on an image's own pixels and 0 on the padding of the batch."""

    def batch_images(self, images: list[Tensor], size_divisible: int = 32) -> Tensor:
        """Combine images (3, H, W) of several sizes into one tensor (B, 4, H, W)."""
        marked = [torch.cat((image, image.new_ones(1, *image.shape[1:]))) for image in images]
        batch: Tensor = super().batch_images(marked, size_divisible)
        return batch


class _EqualSizes(nn.Module):
    """Evaluates images of one size at a time.

    The blocks do not see the padding, but convolutions do. Beyond an image's edge they see zeros if there is no
    padding, and otherwise what earlier layers made of the padding. So an image's result is independent of the other
    images of the batch only if all have the same padding.
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


def _rcnn_options(config: ModelConfig, backbone: PyramidBackbone, num_classes: int) -> dict[str, Any]:
    levels = len(backbone.positions) + 1
    # If there are as many levels as sizes, each level has one. Torchvision's MobileNet has fewer levels, with all sizes
    # each.
    one_each = levels == len(config.anchor_sizes)
    sizes = tuple((size,) for size in config.anchor_sizes) if one_each else (config.anchor_sizes,) * levels
    anchors = AnchorGenerator(sizes, (tuple(config.anchor_ratios),) * levels)
    width = config.fpn_channels
    options: dict[str, Any] = {
        "rpn_anchor_generator": anchors,
        "rpn_pre_nms_top_n_train": config.rpn_pre_nms[0],
        "rpn_pre_nms_top_n_test": config.rpn_pre_nms[1],
        "rpn_post_nms_top_n_train": config.rpn_post_nms[0],
        "rpn_post_nms_top_n_test": config.rpn_post_nms[1],
        "rpn_score_thresh": config.rpn_score_threshold,
        "rpn_batch_size_per_image": config.rpn_batch_size,
    }
    if config.heads == "v2":
        options["rpn_head"] = RPNHead(width, anchors.num_anchors_per_location()[0], conv_depth=2)
        options["box_head"] = FastRCNNConvFCHead(
            (width, 7, 7), [width] * 4, [config.box_head_channels], norm_layer=norm_of(config)
        )
    else:
        options["box_head"] = TwoMLPHead(width * 7 * 7, config.box_head_channels)
    return options | {
        "box_predictor": FastRCNNPredictor(config.box_head_channels, num_classes + 1),
        "box_score_thresh": config.score_threshold,
        "box_nms_thresh": config.nms_threshold,
        "box_detections_per_img": config.detections_per_image,
        "box_batch_size_per_image": config.box_batch_size,
    }


def _faster_rcnn(config: ModelConfig, backbone: PyramidBackbone, num_classes: int) -> nn.Module:
    return _FasterRCNN(backbone, **_rcnn_options(config, backbone, num_classes))


def _mask_rcnn(config: ModelConfig, backbone: PyramidBackbone, num_classes: int) -> nn.Module:
    width = config.mask_head_channels
    norm = norm_of(config) if config.heads == "v2" else None
    return _MaskRCNN(
        backbone,
        mask_head=MaskRCNNHeads(config.fpn_channels, (width,) * config.mask_head_layers, 1, norm_layer=norm),
        mask_predictor=MaskRCNNPredictor(width, width, num_classes + 1),
        **_rcnn_options(config, backbone, num_classes),
    )


def _retinanet(config: ModelConfig, backbone: PyramidBackbone, num_classes: int) -> nn.Module:
    sizes = tuple(tuple(int(size * 2 ** (octave / 3)) for octave in range(3)) for size in config.anchor_sizes)
    anchors = AnchorGenerator(sizes, (tuple(config.anchor_ratios),) * len(sizes))
    # Torchvision includes the background here, because labels start at 1.
    classes = num_classes + 1
    head = None
    if config.heads == "v2":
        groups = partial(nn.GroupNorm, 32)
        head = RetinaNetHead(config.fpn_channels, anchors.num_anchors_per_location()[0], classes, norm_layer=groups)
        head.regression_head._loss_type = "giou"
    return _RetinaNet(
        backbone,
        classes,
        anchor_generator=anchors,
        head=head,
        score_thresh=config.score_threshold,
        nms_thresh=config.nms_threshold,
        detections_per_img=config.detections_per_image,
        topk_candidates=config.rpn_pre_nms[1],
    )


_HEADS = {"faster_rcnn": _faster_rcnn, "mask_rcnn": _mask_rcnn, "retinanet": _retinanet}


def _check(config: ModelConfig, num_classes: int) -> None:
    """Refuse settings for which no library would raise an error that a user understands."""
    if num_classes < 1:
        raise UserError(f"a detector needs at least one category, got {num_classes}")
    if config.norm == "group_norm" and config.weights_backbone in ("pretrained", "DEFAULT", "IMAGENET1K_V1"):
        raise UserError(
            f"model.weights_backbone: {config.weights_backbone!r} was trained with batch norm and does not fit "
            "model.norm 'group_norm'; take batch_norm or frozen_batch_norm, or --model.weights_backbone null"
        )
    if config.detector == "retinanet" and config.heads == "v2" and config.fpn_channels % 32:
        raise UserError(
            "model.fpn_channels: the second generation of RetinaNet's heads has norms of 32 groups and takes "
            f"multiples of 32; got {config.fpn_channels}"
        )
