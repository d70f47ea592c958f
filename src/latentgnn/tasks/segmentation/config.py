"""What a segmentation run is made of, as plain data: model, data, training, evaluation."""

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
"""That a label picture can hold: 16 bits."""


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The network: a backbone, and a head of torchvision's.

    Args:
        architecture: ``fcn``, ``deeplabv3`` or ``lraspp``.
        backbone: ``resnet50``, ``resnet101`` (``fcn``, ``deeplabv3``) and ``mobilenet_v3_large`` (``deeplabv3``,
            ``lraspp``) are torchvision's own models; any other is a network of timm's, by its name there, under
            ``fcn`` or ``deeplabv3``.
        output_stride: pixels of the input for one of the last map, of timm's backbones; torchvision's have 8, and 16
            with ``mobilenet_v3_large``.
        weights: a run's folder or a checkpoint of this task, with other classes or blocks perhaps, whose weights the
            network starts from; ``null`` for none.
        weights_backbone: ``null`` for none, or the name of published weights to download: ``IMAGENET1K_V1`` for
            torchvision's backbones, ``pretrained`` for timm's.
        image_mean: of the pixels, in 0..1, that are taken off before the network.
        image_std: by which they are then divided.
        blocks: latents of the LatentGNN block after each submodule, by its name in the network, for example
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
        scale: range of a random factor of the size, beside ``data.scale``; ``null`` for none.
        crop: height and width of the part that is cut out, after scaling; what is smaller is padded. ``null`` takes
            whole images.
        flip: probability of a mirror image.
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
    """Where images and their label pictures are, and what the ids in these mean.

    A label picture is as large as its image, and has the id of a class in each pixel: gray of 8 or 16 bits, the place
    in a palette, or a colour of ``colors``.

    Args:
        root: the data folder.
        layout: ``folders`` (``images/SPLIT`` and ``labels/SPLIT``, where partners have the same name), ``cityscapes``,
            ``voc`` (Pascal VOC's ``SegmentationClass``) or ``ade20k``; ``null`` finds out.
        train: the split that is learnt from; ``null`` takes the layout's, such as ``train``.
        val: that to validate on.
        classes: the name of every class by its id in the label pictures, such as ``{0: sky, 3: road}``; ids of the same
            name are one class. ``null`` takes the layout's.
        ignored: further ids that label pictures may hold, which are neither learnt nor scored; ``null`` takes the
            layout's.
        colors: red, green and blue, 0 to 255, of ids: what they mean in label pictures of colours, and how classes are
            drawn.
        scale: factor of the size at which the network sees images; predictions are made, and scored, at their own.
        class_weighting: weight of a class in the cross entropy: its frequency in the training set's labels to the power
            of minus this number (0 weighs all pixels alike, 1 all classes alike), or a list with the weight of each
            class, in their order.
        on_fault: ``stop`` at faulty images, or ``skip`` them and say how many.
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
    """What is minimised.

    Args:
        label_smoothing: part of the cross entropy's target that goes to all classes alike.
        auxiliary: weight of the cross entropy of a second head, of torchvision's ``FCNHead``, on the map before the
            last; 0 for no such head. ``lraspp`` has none.
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
    """How predictions are made and shown.

    Args:
        tiles: side in pixels, after ``data.scale``, of overlapping windows that large images are looked at by, and
            whose scores are averaged; ``null`` looks at images whole.
        tile_overlap: part of its side that a window shares with the next.
        sample_pictures: pictures with ground truth beside predictions that a run writes.
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
