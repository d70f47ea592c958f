"""The configuration of a segmentation run as plain data: model, data, training, evaluation."""

import math
from dataclasses import dataclass, field
from typing import Literal

from latentgnn.configuration.settings import expect
from latentgnn.tasks.blocks import MOST_LATENTS, BlockConfig, latents_are_sound
from latentgnn.tasks.settings import TaskSettings
from latentgnn.training.config import TrainingConfig

Layout = Literal["folders", "cityscapes", "voc", "ade20k"]
Color = tuple[int, int, int]

LARGEST_ID = 65_535
"""Largest id that a label picture can store: 16 bits."""


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The network: a backbone and one of torchvision's heads.

    Args:
        architecture: ``fcn``, ``deeplabv3`` or ``lraspp``.
        backbone: ``resnet50``, ``resnet101`` (``fcn``, ``deeplabv3``) and ``mobilenet_v3_large`` (``deeplabv3``,
            ``lraspp``) are torchvision's own models; any other is a network of timm's, by its name there, under
            ``fcn`` or ``deeplabv3``.
        output_stride: stride of the last map, for timm backbones; torchvision's backbones have 8, and
            ``mobilenet_v3_large`` has 16.
        weights: a run's folder or a checkpoint of this task whose weights the network starts from; it may have other
            classes or blocks; ``null`` for none.
        weights_backbone: ``null`` for none, or the name of published weights to download: ``IMAGENET1K_V1`` for
            torchvision's backbones, ``pretrained`` for timm's.
        image_mean: mean that is subtracted from the pixels, in 0..1.
        image_std: standard deviation by which they are then divided.
        blocks: number of latents of the LatentGNN block after each submodule, by its name in the network, for example
            ``{backbone.layer3: 64}``, or ``{classifier.2: 64}`` for one in the head; ``{}`` for none.
        block: see `latentgnn.tasks.blocks.BlockConfig`.
    """

    architecture: Literal["fcn", "deeplabv3", "lraspp"] = "fcn"
    backbone: str = "resnet50"
    output_stride: int = 8
    weights: str | None = None
    weights_backbone: str | None = None
    image_mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    image_std: tuple[float, float, float] = (0.229, 0.224, 0.225)
    blocks: dict[str, int | tuple[int, ...]] = field(default_factory=dict)
    block: BlockConfig = field(default_factory=BlockConfig)

    def __post_init__(self) -> None:
        expect(
            self,
            {
                "backbone": (bool(self.backbone), "the name of a network"),
                "output_stride": (self.output_stride in (8, 16, 32), "8, 16 or 32"),
                "weights": (self.weights != "", "a run's folder or a checkpoint, or null"),
                "weights_backbone": (self.weights_backbone != "", "the name of published weights, or null"),
                "image_mean": (all(map(math.isfinite, self.image_mean)), "finite numbers"),
                "image_std": (all(0 < part < math.inf for part in self.image_std), "numbers above 0"),
                "blocks": (
                    latents_are_sound(self.blocks),
                    f"submodules with 1 to {MOST_LATENTS:,} latents a kernel",
                ),
            },
        )


@dataclass(frozen=True, kw_only=True)
class AugmentConfig:
    """Random changes of a training image; its labels follow.

    Args:
        scale: range of a random factor of the size, in addition to ``data.scale``; ``null`` for none.
        crop: height and width of a random crop after scaling; smaller images are padded. ``null`` takes whole images.
        flip: probability of mirroring.
        color: probability of each of torchvision's changes of brightness, contrast, saturation and hue
            (``RandomPhotometricDistort``).
    """

    scale: tuple[float, float] | None = (0.5, 2.0)
    crop: tuple[int, int] | None = (512, 512)
    flip: float = 0.5
    color: float = 0.5

    def __post_init__(self) -> None:
        scale, crop = self.scale, self.crop
        expect(
            self,
            {
                "scale": (
                    scale is None or 0.05 <= scale[0] <= scale[1] <= 20,
                    "two ascending factors from 0.05 to 20, or null",
                ),
                "crop": (crop is None or all(16 <= side <= 16_384 for side in crop), "16 to 16,384 pixels, or null"),
                "flip": (0 <= self.flip <= 1, "a probability from 0 to 1"),
                "color": (0 <= self.color <= 1, "a probability from 0 to 1"),
            },
        )


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """The location of images and label pictures, and the meaning of the ids in them.

    A label picture has the size of its image, and the id of a class in each pixel: gray of 8 or 16 bits, the index in a
    palette, or a colour of ``colors``.

    Args:
        root: the data folder.
        layout: ``folders`` (``images/SPLIT`` and ``labels/SPLIT``, where partners have the same name), ``cityscapes``,
            ``voc`` (Pascal VOC's ``SegmentationClass``) or ``ade20k``; ``null`` detects it.
        train: the split to train on; ``null`` takes the layout's, such as ``train``.
        val: the split to validate on; ``null`` takes the layout's.
        classes: the name of every class by its id in the label pictures, such as ``{0: sky, 3: road}``; ids with the
            same name are one class. ``null`` takes the layout's.
        ignored: other ids that may occur in label pictures, and are neither trained on nor scored; ``null`` takes the
            layout's.
        colors: red, green and blue, 0 to 255, of ids: their meaning in coloured label pictures, and the colours of
            classes in drawings.
        scale: factor on the size of images for the network; predictions are made and scored at the original size.
        class_weighting: weight of a class in the cross entropy: its frequency in the training set's labels to the power
            of minus this number (0 weighs all pixels alike, 1 all classes alike), or a list with the weight of each
            class, in their order.
        on_fault: what to do about faulty images: ``stop``, or ``skip`` them and say how many.
        augment: see `AugmentConfig`.
    """

    root: str | None = None
    layout: Layout | None = None
    train: str | None = None
    val: str | None = None
    classes: dict[int, str] | None = None
    ignored: tuple[int, ...] | None = None
    colors: dict[int, Color] | None = None
    scale: float = 1.0
    class_weighting: float | tuple[float, ...] = 0.0
    on_fault: Literal["stop", "skip"] = "stop"
    augment: AugmentConfig = field(default_factory=AugmentConfig)

    def __post_init__(self) -> None:
        ids = [*(self.classes or {}), *(self.ignored or ()), *(self.colors or {})]
        both = sorted(set(self.classes or {}) & set(self.ignored or ()))
        expect(
            self,
            {
                "root": (self.root != "", "a folder, or null"),
                "classes": (
                    all(0 <= id <= LARGEST_ID for id in ids) and self.classes != {},
                    "ids of 0 to 65,535, or null",
                ),
                "ignored": (not both, f"ids that are no classes ({', '.join(map(str, both))} are both)"),
                "colors": (
                    all(0 <= part <= 255 for color in (self.colors or {}).values() for part in color),
                    "red, green and blue of 0 to 255",
                ),
                "scale": (0.05 <= self.scale <= 20, "0.05 to 20"),
                "class_weighting": (
                    all(0 < weight < math.inf for weight in self.class_weighting)
                    if isinstance(self.class_weighting, tuple)
                    else 0 <= self.class_weighting <= 1,
                    "a power from 0 to 1, or a list with a weight above 0 for each class",
                ),
            },
        )


@dataclass(frozen=True, kw_only=True)
class LossConfig:
    """The loss.

    Args:
        label_smoothing: fraction of the cross entropy's target that is spread over all classes.
        auxiliary: weight of the cross entropy of a second head, torchvision's ``FCNHead``, on the second-last map; 0
            for no such head. ``lraspp`` has none.
    """

    label_smoothing: float = 0.0
    auxiliary: float = 0.0

    def __post_init__(self) -> None:
        expect(
            self,
            {
                "label_smoothing": (0 <= self.label_smoothing <= 1, "from 0 to 1"),
                "auxiliary": (0 <= self.auxiliary < math.inf, "0 or more"),
            },
        )


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    """Settings of predictions and of pictures.

    Args:
        tiles: side in pixels, after ``data.scale``, of overlapping windows in which large images are processed, with
            averaged scores; ``null`` processes images whole.
        tile_overlap: fraction of its side that a window shares with the next.
        sample_pictures: number of pictures with ground truth beside predictions that a run writes.
    """

    tiles: int | None = None
    tile_overlap: float = 0.2
    sample_pictures: int = 8

    def __post_init__(self) -> None:
        expect(
            self,
            {
                "tiles": (self.tiles is None or 32 <= self.tiles <= 16_384, "32 to 16,384 pixels, or null"),
                "tile_overlap": (0 <= self.tile_overlap < 0.9, "0 or more and less than 0.9"),
                "sample_pictures": (self.sample_pictures >= 0, "0 or more"),
            },
        )


@dataclass(frozen=True, kw_only=True)
class SegmentationConfig:
    """A run of semantic segmentation of images: everything that its result depends on.

    Args:
        task: always ``segmentation``.
        model: see `ModelConfig`.
        loss: see `LossConfig`.
        data: see `DataConfig`.
        training: see `latentgnn.training.config.TrainingConfig`.
        evaluation: see `EvaluationConfig`.
    """

    task: Literal["segmentation"] = "segmentation"
    model: ModelConfig = field(default_factory=ModelConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    data: DataConfig = field(default_factory=DataConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)


_CHECKED = ("data.root", "data.layout", "data.train", "data.val", "data.classes", "data.ignored", "data.colors")
_EXPLAINED = ("data.scale", "training.accelerator")
SETTINGS = TaskSettings(
    config=SegmentationConfig,
    loader="load_segmenter",
    places=("data.root", "model.weights"),
    checked=_CHECKED,
    explained=_EXPLAINED,
    diagnosed=(*_CHECKED, "data.on_fault", *_EXPLAINED),
)
