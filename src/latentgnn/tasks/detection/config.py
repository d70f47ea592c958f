"""The configuration of a detection run as plain data: model, data, training, evaluation."""

import math
import re
from dataclasses import dataclass, field
from typing import Literal, get_args

from latentgnn.configuration.settings import expect
from latentgnn.tasks.blocks import MOST_CHANNELS, MOST_LATENTS, BlockConfig, latents_are_sound
from latentgnn.tasks.settings import TaskSettings
from latentgnn.training.config import TrainingConfig

Stage = Literal["C2", "C3", "C4", "C5"]
Detector = Literal["mask_rcnn", "faster_rcnn", "retinanet"]
Heads = Literal["v1", "v2"]
Norm = Literal["batch_norm", "frozen_batch_norm", "group_norm"]
Format = Literal["coco", "voc", "voc_masks", "yolo", "labelme"]

_MOST_DETECTIONS = 10_000
_MOST_PROPOSALS = 1_000_000
_MOST_PIXELS = 16_384  # maximum length of a side


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The detector.

    Args:
        detector: the head, torchvision's.
        heads: torchvision's first generation of heads and pyramid, or its second (``v2``: with norms, and deeper).
        weights: trained weights of a whole detector to start from: the name of one of torchvision's to download, such
            as ``MaskRCNN_ResNet50_FPN_Weights.COCO_V1``, a run's folder, a checkpoint, or a file with a state dict;
            ``null`` for none. If set, ``weights_backbone`` is ignored.
        backbone: a torchvision ResNet or ResNeXt (``resnet50``), ``mobilenet_v3_large``, or ``timm/<name>`` for one of
            timm's.
        weights_backbone: ``null`` for none, the name of published weights to download (``IMAGENET1K_V1`` for
            torchvision, ``pretrained`` for timm), or a file with a state dict.
        norm: the norm inside the backbone, and in the second generation of R-CNN's heads.
        norm_eps: epsilon that these norms add to the variance; torchvision's first trained ResNet-50 detectors need 0.
        stride_in_1x1: put a ResNet stage's stride into its first convolution, as Caffe and detectron2 do, instead of
            its second.
        trainable_stages: number of stages that are trained, counted from the last (5 is all of them and the stem).
        blocks: number of latents of the block after each named stage, for example ``{C4: 100}``; ``{}`` for none.
        block: see `latentgnn.tasks.blocks.BlockConfig`.
        fpn_channels: number of channels of the feature pyramid.
        min_size: length to which an image's shorter side is resized; if there are several, one is drawn per training
            image.
        max_size: maximum length of the longer side.
        image_mean: mean per channel, of images in 0..1.
        image_std: standard deviation per channel, of images in 0..1.
        anchor_sizes: one anchor size a pyramid level, in pixels of the resized image; on ``mobilenet_v3_large``, all of
            them at each of its three levels.
        anchor_ratios: ratios of height to width.
        rpn_pre_nms: proposals per level kept before non-maximum suppression, in training and in evaluation.
        rpn_post_nms: proposals kept after it, in training and in evaluation.
        rpn_score_threshold: proposals that score less are dropped.
        rpn_batch_size: anchors sampled per image for the proposal loss.
        box_batch_size: proposals sampled per image for the box and mask losses.
        box_head_channels: number of channels of the box head's two layers.
        mask_head_layers: number of convolutions of the mask head.
        mask_head_channels: number of channels of these convolutions.
        score_threshold: detections that score less are dropped.
        nms_threshold: overlap above which the lower-scoring of two detections of one category is dropped.
        detections_per_image: maximum number of detections kept.
    """

    detector: Detector = "mask_rcnn"
    heads: Heads = "v1"
    weights: str | None = None
    backbone: str = "resnet50"
    weights_backbone: str | None = None
    norm: Norm = "frozen_batch_norm"
    norm_eps: float = 1e-5
    stride_in_1x1: bool = False
    trainable_stages: int = 3
    blocks: dict[Stage, int | tuple[int, ...]] = field(default_factory=dict)
    block: BlockConfig = field(default_factory=BlockConfig)
    fpn_channels: int = 256
    min_size: tuple[int, ...] = (800,)
    max_size: int = 1333
    image_mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    image_std: tuple[float, float, float] = (0.229, 0.224, 0.225)
    anchor_sizes: tuple[int, ...] = (32, 64, 128, 256, 512)
    anchor_ratios: tuple[float, ...] = (0.5, 1.0, 2.0)
    rpn_pre_nms: tuple[int, int] = (2000, 1000)
    rpn_post_nms: tuple[int, int] = (2000, 1000)
    rpn_score_threshold: float = 0.0
    rpn_batch_size: int = 256
    box_batch_size: int = 512
    box_head_channels: int = 1024
    mask_head_layers: int = 4
    mask_head_channels: int = 256
    score_threshold: float = 0.05
    nms_threshold: float = 0.5
    detections_per_image: int = 100

    def __post_init__(self) -> None:
        def within(name: str, low: float, high: float) -> tuple[bool, str]:
            values = getattr(self, name)
            values = values if isinstance(values, tuple) else (values,)
            return bool(values) and all(low <= value <= high for value in values), f"{low:,} to {high:,}"

        ratios = self.anchor_ratios
        expect(
            self,
            {
                "detector": (self.detector in get_args(Detector), f"one of {', '.join(get_args(Detector))}"),
                "heads": (self.heads in get_args(Heads), f"one of {', '.join(get_args(Heads))}"),
                "weights": (self.weights != "", "a name, a folder or a file, or null"),
                "norm": (self.norm in get_args(Norm), f"one of {', '.join(get_args(Norm))}"),
                "norm_eps": (0 <= self.norm_eps < math.inf, "0 or more"),
                "trainable_stages": within("trainable_stages", 0, 5),
                "blocks": (
                    set(self.blocks) <= set(get_args(Stage)) and latents_are_sound(self.blocks),
                    f"stages among {', '.join(get_args(Stage))} with 1 to {MOST_LATENTS:,} latents a kernel",
                ),
                "fpn_channels": within("fpn_channels", 1, MOST_CHANNELS),
                "min_size": within("min_size", 1, _MOST_PIXELS),
                # Images may be up to 50 times as long as wide.
                "max_size": within("max_size", 64, _MOST_PIXELS),
                "image_mean": (all(map(math.isfinite, self.image_mean)), "finite numbers"),
                "image_std": (all(0 < value < math.inf for value in self.image_std), "numbers above 0"),
                "anchor_sizes": (
                    len(self.anchor_sizes) == 5 and within("anchor_sizes", 1, _MOST_PIXELS)[0],
                    f"five sizes of 1 to {_MOST_PIXELS:,}, one a pyramid level",
                ),
                "anchor_ratios": (
                    1 <= len(ratios) <= 100 and all(0 < value < math.inf for value in ratios),
                    "1 to 100 numbers above 0",
                ),
                "rpn_pre_nms": within("rpn_pre_nms", 1, _MOST_PROPOSALS),
                "rpn_post_nms": within("rpn_post_nms", 1, _MOST_PROPOSALS),
                "rpn_score_threshold": within("rpn_score_threshold", 0, 1),
                "rpn_batch_size": within("rpn_batch_size", 1, _MOST_PROPOSALS),
                "box_batch_size": within("box_batch_size", 1, _MOST_PROPOSALS),
                "box_head_channels": within("box_head_channels", 1, MOST_CHANNELS),
                "mask_head_layers": within("mask_head_layers", 1, 100),
                "mask_head_channels": within("mask_head_channels", 1, MOST_CHANNELS),
                "score_threshold": within("score_threshold", 0, 1),
                "nms_threshold": within("nms_threshold", 0, 1),
                "detections_per_image": within("detections_per_image", 1, _MOST_DETECTIONS),
            },
        )


@dataclass(frozen=True, kw_only=True)
class AugmentConfig:
    """Random changes of a training image; boxes and masks follow. A probability of 0 means never.

    Args:
        horizontal_flip: probability.
        vertical_flip: probability.
        quarter_turns: rotate by a random multiple of 90 degrees.
        crop: side in pixels of a random square crop, ``null`` for none; smaller images are not cropped.
        scale: range of a random zoom, ``null`` for none.
        brightness: largest relative change; likewise contrast and saturation.
        contrast: largest relative change.
        saturation: largest relative change.
        hue: largest change, as a fraction of the colour circle.
        grayscale: probability.
        invert: probability of inverting the colours.
    """

    horizontal_flip: float = 0.5
    vertical_flip: float = 0.0
    quarter_turns: bool = False
    crop: int | None = None
    scale: tuple[float, float] | None = None
    brightness: float = 0.0
    contrast: float = 0.0
    saturation: float = 0.0
    hue: float = 0.0
    grayscale: float = 0.0
    invert: float = 0.0

    def __post_init__(self) -> None:
        expectations = {
            name: (0 <= getattr(self, name) <= 1, "a probability from 0 to 1")
            for name in ("horizontal_flip", "vertical_flip", "grayscale", "invert")
        }
        expectations |= {
            name: (0 <= getattr(self, name) < math.inf, "a relative change of 0 or more")
            for name in ("brightness", "contrast", "saturation")
        }
        scale = self.scale
        expect(
            self,
            expectations
            | {
                "hue": (0 <= self.hue <= 0.5, "a fraction of the colour circle from 0 to 0.5"),
                "crop": (self.crop is None or self.crop >= 1, "a side of 1 pixel or more, or null"),
                "scale": (
                    scale is None or 0 < scale[0] <= scale[1] < math.inf,
                    "the lowest and the highest factor, above 0 and ascending, or null",
                ),
            },
        )


@dataclass(frozen=True, kw_only=True)
class CropConfig:
    """Training on crops of large images: each time an image is drawn, one random window of it is read.

    Unlike ``augment.crop``, which crops an image that was read whole, this never holds the masks and pixels of the
    whole image as tensors.

    Args:
        size: side of the square window in pixels, ``null`` for whole images; an image that is shorter in a dimension is
            not cropped in it.
        visible: an object cut by the window's edge is kept if at least this fraction of its mask, or of its box if
            there are no masks, is in the window.
        on_object: probability that the window is placed to contain a random object, whole if it fits; otherwise it is
            placed anywhere.
    """

    size: int | None = None
    visible: float = 0.1
    on_object: float = 0.5

    def __post_init__(self) -> None:
        expect(
            self,
            {
                "size": (self.size is None or 32 <= self.size <= _MOST_PIXELS, f"32 to {_MOST_PIXELS:,}, or null"),
                "visible": (0 < self.visible <= 1, "a fraction above 0, up to 1"),
                "on_object": (0 <= self.on_object <= 1, "a probability from 0 to 1"),
            },
        )


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """The location of images and annotations.

    Args:
        root: a folder with images and annotations; ``null`` takes the embedded set, which is generated.
        format: ``coco``, ``voc`` (Pascal VOC's XML files), ``voc_masks`` (its segmentation pictures), ``yolo`` or
            ``labelme``; ``null`` detects it.
        val_fraction: fraction of the images that is drawn for validation, for a set without a val split.
        val_seed: seed of that draw, independent of the training's seed.
        val_groups: a regular expression that finds the group in an image's file name, such as ``(.*)_[0-9]+`` for
            frames with numbers at the end; images of one group are all in the same split.
        train_annotations: COCO JSON file, relative to ``root``; ``null`` finds ``annotations/instances_train*.json``.
        train_images: image folder or tar file, relative to ``root``; ``null`` finds ``train2017``, ``train2014`` or
            ``train``, or a tar file of such a name.
        val_annotations: likewise for validation.
        val_images: likewise for validation.
        on_fault: what to do about faulty records: ``stop``, or ``skip`` them and say how many.
        group_by_aspect: batches hold only wide or only tall images, which saves padding.
        crop: see `CropConfig`.
        augment: see `AugmentConfig`.
        categories: id and name of every category; ``null`` takes those of the annotations; a run's resolved
            configuration lists them.
        embedded_train: images in the embedded training set; an even number, two per scene.
        embedded_val: images in the embedded validation set; an even number, two per scene.
        embedded_size: height of an embedded image in pixels; it is twice as wide.
    """

    root: str | None = None
    format: Format | None = None
    val_fraction: float | None = None
    val_seed: int = 0
    val_groups: str | None = None
    train_annotations: str | None = None
    train_images: str | None = None
    val_annotations: str | None = None
    val_images: str | None = None
    on_fault: Literal["stop", "skip"] = "stop"
    group_by_aspect: bool = True
    crop: CropConfig = field(default_factory=CropConfig)
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    categories: tuple[tuple[int, str], ...] | None = None
    embedded_train: int = 1000
    embedded_val: int = 200
    embedded_size: int = 128

    @property
    def is_whole(self) -> bool:
        """Whether training uses whole images; with crops, an image's masks are never decoded together."""
        return self.crop.size is None

    def __post_init__(self) -> None:
        ids = [id for id, _ in self.categories or ()]
        even = {
            name: (2 <= getattr(self, name) <= 1_000_000 and getattr(self, name) % 2 == 0, "an even number from 2 on")
            for name in ("embedded_train", "embedded_val")
        }
        expect(
            self,
            even
            | {
                "root": (self.root != "", "a folder, or null"),
                "val_fraction": (
                    self.val_fraction is None or 0 < self.val_fraction < 1,
                    "a part above 0 and below 1, or null",
                ),
                "val_groups": (is_pattern(self.val_groups), "a regular expression, or null"),
                "categories": (
                    self.categories is None or (len(set(ids)) == len(ids) > 0 and min(ids) >= 0),
                    "ids of 0 or more, each once, or null",
                ),
                "embedded_size": (64 <= self.embedded_size <= 4096, "64 to 4096 pixels"),
            },
        )


def is_pattern(text: str | None) -> bool:
    """Whether a string is a regular expression, or ``None``."""
    try:
        re.compile(text or "")
    except (re.error, OverflowError, RecursionError):
        return False
    return True


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    """How images are processed in validations, ``evaluate`` and ``predict``, and how detections are scored.

    Args:
        tiles: side in pixels of the overlapping tiles in which an image is processed, ``null`` for whole images.
        tile_overlap: overlap of neighbouring tiles, as a fraction of ``tiles``.
        max_detections: the three limits of detections per image for COCO's figures, ascending.
        per_category: also report every category's AP.
        sample_pictures: number of pictures with ground truth beside predictions that a run writes.
    """

    tiles: int | None = None
    tile_overlap: float = 0.2
    max_detections: tuple[int, int, int] = (1, 10, 100)
    per_category: bool = False
    sample_pictures: int = 8

    def __post_init__(self) -> None:
        first, second, last = self.max_detections
        expect(
            self,
            {
                "tiles": (self.tiles is None or 32 <= self.tiles <= _MOST_PIXELS, f"32 to {_MOST_PIXELS:,}, or null"),
                "tile_overlap": (0 <= self.tile_overlap <= 0.9, "a fraction from 0 to 0.9"),
                "max_detections": (
                    0 < first < second < last <= _MOST_DETECTIONS,
                    f"three ascending limits of 1 to {_MOST_DETECTIONS:,}",
                ),
                "sample_pictures": (self.sample_pictures >= 0, "0 or more"),
            },
        )


@dataclass(frozen=True, kw_only=True)
class DetectionConfig:
    """A detection run: everything that its result depends on.

    Args:
        task: always ``detection``.
        model: see `ModelConfig`.
        data: see `DataConfig`.
        training: see `latentgnn.training.config.TrainingConfig`.
        evaluation: see `EvaluationConfig`.
    """

    task: Literal["detection"] = "detection"
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)


def _kept_by_runs(trained: DetectionConfig, now: DetectionConfig) -> dict[str, str]:
    """Return settings of the data that must stay as in the run, and why: its categories, and its split if drawn.

    Args:
        trained: the run's configuration.
        now: the configuration in use; if it names another set that has its own val split, the run's split does not
            matter.
    """
    kept = {"data.categories": "its weights know these categories"}
    if trained.data.val_fraction is not None and now.data.val_fraction is not None:
        why = "with another split, images that it was trained on would be scored"
        kept |= dict.fromkeys(("data.val_fraction", "data.val_seed", "data.val_groups"), why)
    return kept


_SET = (
    *("data.format", "data.val_fraction", "data.val_seed", "data.val_groups", "data.categories"),
    *("data.train_annotations", "data.train_images", "data.val_annotations", "data.val_images"),
)
_EXPLAINED = (
    *("model.min_size", "model.max_size", "model.score_threshold", "model.nms_threshold"),
    *("model.detections_per_image", "training.accelerator"),
)
SETTINGS = TaskSettings(
    config=DetectionConfig,
    loader="load_detector",
    places=(
        *("data.root", "data.train_annotations", "data.train_images", "data.val_annotations", "data.val_images"),
        *("model.weights", "model.weights_backbone"),
    ),
    checked=(
        *("data.root", *_SET, "data.crop.size", "evaluation.tiles", "model.detector", "model.min_size"),
        *("model.max_size", "model.anchor_sizes", "model.anchor_ratios", "model.detections_per_image"),
        *("evaluation.max_detections", "evaluation.sample_pictures"),
    ),
    explained=_EXPLAINED,
    diagnosed=("data.root", *_SET, "data.on_fault", *_EXPLAINED),
    converted=(*_SET, "data.on_fault"),
    free_when_trained=frozenset(
        f"model.{name}"
        for name in (
            *("min_size", "max_size", "score_threshold", "nms_threshold", "detections_per_image"),
            *("rpn_pre_nms", "rpn_post_nms", "rpn_score_threshold"),
        )
    ),
    without_effect_alone={
        "data.val_seed": "data.val_fraction",
        "data.val_groups": "data.val_fraction",
        "data.crop.visible": "data.crop.size",
        "data.crop.on_object": "data.crop.size",
        "evaluation.tile_overlap": "evaluation.tiles",
    },
    kept_by_runs=_kept_by_runs,
)
