"""What a detection run is made of, as plain data: model, data, training, evaluation."""

from dataclasses import dataclass, field
from typing import Literal

from latentgnn.tasks.blocks import BlockConfig
from latentgnn.training.config import TrainingConfig

Stage = Literal["C2", "C3", "C4", "C5"]


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The detector.

    Args:
        detector: the head, torchvision's.
        backbone: a torchvision ResNet or ResNeXt (``resnet50``), or ``timm/<name>`` for one of timm's.
        weights_backbone: ``null`` for none, the name of published weights to download (``IMAGENET1K_V1`` for
            torchvision, ``pretrained`` for timm), or a file that holds a state dict.
        norm: the norm inside the backbone.
        trainable_stages: stages that learn, counted from the last (5 is all of them and the stem).
        blocks: latents of the block after each named stage, for example ``{C4: 100}``; ``{}`` for none.
        block: see `latentgnn.tasks.blocks.BlockConfig`.
        fpn_channels: width of the feature pyramid.
        min_size: shorter side that an image is resized to; of several, one is drawn for each image in training.
        max_size: longest side allowed.
        image_mean: per channel, of images in 0..1.
        image_std: per channel, of images in 0..1.
        anchor_sizes: one anchor size a pyramid level, in pixels of the resized image.
        anchor_ratios: height over width.
        rpn_pre_nms: proposals a level kept before non-maximum suppression, in training and in evaluation.
        rpn_post_nms: proposals kept after it, likewise.
        rpn_batch_size: anchors an image sampled for the proposal loss.
        box_batch_size: proposals an image sampled for the box and mask losses.
        box_head_channels: width of the box head's two layers.
        mask_head_layers: convolutions of the mask head.
        mask_head_channels: their width.
        score_threshold: detections below it are dropped.
        nms_threshold: overlap above which the weaker of two detections of one category is dropped.
        detections_per_image: detections kept.
    """

    detector: Literal["mask_rcnn", "faster_rcnn", "retinanet"] = "mask_rcnn"
    backbone: str = "resnet50"
    weights_backbone: str | None = None
    norm: Literal["batch_norm", "frozen_batch_norm", "group_norm"] = "frozen_batch_norm"
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
    rpn_batch_size: int = 256
    box_batch_size: int = 512
    box_head_channels: int = 1024
    mask_head_layers: int = 4
    mask_head_channels: int = 256
    score_threshold: float = 0.05
    nms_threshold: float = 0.5
    detections_per_image: int = 100


@dataclass(frozen=True, kw_only=True)
class AugmentConfig:
    """Random changes of a training image; boxes and masks follow. Each probability is 0 for never.

    Args:
        horizontal_flip: probability.
        vertical_flip: probability.
        quarter_turns: rotate by a random multiple of 90 degrees.
        crop: side in pixels of a random square crop, ``null`` for none; smaller images are left as they are.
        scale: range of a random zoom, ``null`` for none.
        brightness: largest relative change; likewise contrast and saturation.
        contrast: largest relative change.
        saturation: largest relative change.
        hue: largest change, as a fraction of the colour circle.
        grayscale: probability.
        invert: probability of a negative.
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


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Where images and annotations are.

    Args:
        root: a COCO-format folder; ``null`` takes the embedded set, made on the fly.
        train_annotations: COCO JSON file, relative to ``root``; ``null`` finds ``annotations/instances_train*.json``.
        train_images: image folder, relative to ``root``; ``null`` finds ``train2017``, ``train2014`` or ``train``.
        val_annotations: likewise for validation.
        val_images: likewise for validation.
        on_fault: ``stop`` at faulty records, or ``skip`` them and say how many.
        group_by_aspect: batches hold only wide or only tall images, which saves padding.
        augment: see `AugmentConfig`.
        categories: id and name of every category; ``null`` takes those of the training annotations, and a run's
            resolved configuration names them.
        embedded_train: images in the embedded training set; an even number, two for each scene.
        embedded_val: images in the embedded validation set; likewise.
        embedded_size: height of an embedded image in pixels; it is twice as wide.
    """

    root: str | None = None
    train_annotations: str | None = None
    train_images: str | None = None
    val_annotations: str | None = None
    val_images: str | None = None
    on_fault: Literal["stop", "skip"] = "stop"
    group_by_aspect: bool = True
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    categories: tuple[tuple[int, str], ...] | None = None
    embedded_train: int = 1000
    embedded_val: int = 200
    embedded_size: int = 128


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    """How detections are scored.

    Args:
        max_detections: the three limits of detections an image, ascending, of COCO's figures.
        per_category: also give every category's AP.
        sample_pictures: pictures with ground truth beside predictions that a run writes.
    """

    max_detections: tuple[int, int, int] = (1, 10, 100)
    per_category: bool = False
    sample_pictures: int = 8


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
