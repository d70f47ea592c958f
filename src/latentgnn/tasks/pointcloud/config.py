"""The configuration of a point-cloud run as plain data: model, data, training, evaluation."""

import math
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Literal

from latentgnn.configuration.settings import expect
from latentgnn.tasks.blocks import MOST_CHANNELS, MOST_LATENTS, BlockConfig, latents_are_sound
from latentgnn.tasks.settings import TaskSettings
from latentgnn.training.config import TrainingConfig

Feature = Literal[
    "intensity", "log_intensity", "return_number", "number_of_returns", "last_return", "color", "normal", "height"
]
Layout = Literal["scans", "scannet", "s3dis", "semantickitti"]
CropShape = Literal["sphere", "column", "scan"]
LevelName = Literal["L0", "L1", "L2", "L3", "L4", "L5", "L6", "L7"]


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The point network.

    Args:
        weights: a run's folder or a checkpoint whose weights the network starts from; it may have other classes,
            features or blocks; ``null`` for none.
        widths: number of channels of each level, finest level first.
        depths: number of residual blocks of each level.
        grids: edges in metres of the voxels in which the coarser levels keep one point each, one for each level except
            the finest, ascending.
        neighbors: number of neighbours of a point.
        dropout: dropout probability before the last layer.
        blocks: number of latents of the LatentGNN block at each named level, for example ``{L3: 64}``; ``{}`` for none.
        block: see `latentgnn.tasks.blocks.BlockConfig`.
    """

    weights: str | None = None
    widths: tuple[int, ...] = (32, 64, 128, 256, 512)
    depths: tuple[int, ...] = (1, 1, 1, 1, 1)
    grids: tuple[float, ...] = (0.05, 0.1, 0.2, 0.4)
    neighbors: int = 16
    dropout: float = 0.0
    blocks: dict[LevelName, int | tuple[int, ...]] = field(default_factory=dict)
    block: BlockConfig = field(default_factory=BlockConfig)

    def __post_init__(self) -> None:
        levels, grids = len(self.widths), self.grids
        ascending = all(finer < coarser for finer, coarser in pairwise(grids))
        known = [f"L{level}" for level in range(levels)]
        expect(
            self,
            {
                "weights": (self.weights != "", "a run's folder or a checkpoint, or null"),
                "widths": (
                    2 <= levels <= 8 and all(1 <= width <= MOST_CHANNELS for width in self.widths),
                    f"2 to 8 channel counts of 1 to {MOST_CHANNELS:,}",
                ),
                "depths": (
                    len(self.depths) == levels and all(0 <= depth <= 100 for depth in self.depths),
                    f"{levels} numbers of 0 to 100, one a width",
                ),
                "grids": (
                    len(grids) == levels - 1 and ascending and all(0 < edge < math.inf for edge in grids),
                    f"{levels - 1} ascending edges in metres",
                ),
                "neighbors": (1 <= self.neighbors <= 1000, "1 to 1000"),
                "dropout": (0 <= self.dropout < 1, "0 or more and less than 1"),
                "blocks": (
                    set(self.blocks) <= set(known) and latents_are_sound(self.blocks),
                    f"levels among {', '.join(known)} with 1 to {MOST_LATENTS:,} latents a kernel",
                ),
            },
        )


@dataclass(frozen=True, kw_only=True)
class AugmentConfig:
    """Random changes of a training crop; coordinates, normals, heights and colours follow.

    Args:
        rotate: rotate by a random angle about the vertical axis.
        flip: probability of mirroring, in x and in y each.
        scale: range of a random factor of all coordinates, ``null`` for none.
        jitter: standard deviation in metres of a shift of each point, truncated at three standard deviations.
        drop: maximum fraction of the points that is dropped; the fraction is drawn for each crop.
        color_drop: probability that a crop has no colours (all zero).
        color_jitter: standard deviation of a change of each point's colours, which are in 0..1.
    """

    rotate: bool = True
    flip: float = 0.5
    scale: tuple[float, float] | None = (0.9, 1.1)
    jitter: float = 0.0
    drop: float = 0.0
    color_drop: float = 0.0
    color_jitter: float = 0.0

    def __post_init__(self) -> None:
        probability = "a probability from 0 to 1"
        scale = self.scale
        expect(
            self,
            {
                "flip": (0 <= self.flip <= 1, probability),
                "color_drop": (0 <= self.color_drop <= 1, probability),
                "drop": (0 <= self.drop < 1, "0 or more and less than 1"),
                "jitter": (0 <= self.jitter < math.inf, "0 or more"),
                "color_jitter": (0 <= self.color_jitter < math.inf, "0 or more"),
                "scale": (
                    scale is None or 0 < scale[0] <= scale[1] < math.inf,
                    "two ascending factors above 0, or null",
                ),
            },
        )


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """The scans: where they are, what their classes are, and how they are cut into crops.

    A ``dataset.yaml`` in the data folder may set ``layout``, ``train``, ``val``, ``classes``, ``ignored`` and
    ``features``; see ``dataset_yaml``.

    Args:
        root: the data folder.
        layout: ``scans`` for LAS, LAZ, PLY, NPZ, CSV and XYZ files, ``scannet`` for ScanNet v2, ``s3dis`` for S3DIS's
            text files, ``semantickitti`` for SemanticKITTI's sequences; ``null`` detects it.
        dataset_yaml: whether the folder's ``dataset.yaml`` ``wins`` over these settings, or only ``fills`` those that
            are ``null`` or empty.
        train: the training set, relative to ``root``: files, folders and globs for ``scans`` (``null``: the folder
            ``train``), split files for ``scannet`` (``scannetv2_train.txt``), areas for ``s3dis`` (all that are not
            used for validation), sequences for ``semantickitti`` (00 to 07, 09 and 10).
        val: likewise for validation (the folder ``val``; ``scannetv2_val.txt``; ``Area_5``; 08).
        classes: the name of every class by its id in the files, such as ``{2: ground, 6: building}``; ids with the same
            name are one class. ``null`` takes the layout's.
        ignored: other ids that may occur in files, and are neither trained on nor scored.
        features: inputs for each point besides its coordinates.
        height_radius: radius in metres within which the feature ``height`` takes the lowest point as ground.
        voxel: edge in metres of the voxels in which one point each is kept; 0 keeps all points.
        crop: what the network sees at once: everything within half of ``crop_size`` of a point (``sphere``), a square
            with that edge seen from above (``column``), or the whole ``scan``.
        crop_size: diameter or edge in metres.
        overlap: fraction of its edge that a crop shares with the next in evaluation, from 0 to less than 1.
        max_points: maximum number of points of a training crop after voxel subsampling, nearest to its centre first;
            ``null`` for no limit.
        crops_per_scan: number of training crops drawn from each scan in an epoch.
        balance: fraction of the training crops whose centre is drawn from a random class instead of from all points, so
            that rare classes are seen.
        class_weighting: a class's weight in the cross entropy is its frequency to the power of minus this; 0 weights
            all points equally, 1 all classes equally.
        on_fault: what to do about faulty scans: ``stop``, or ``skip`` them and say how many.
        cached_points: number of points of loaded scans that each process keeps in memory.
        augment: see `AugmentConfig`.
    """

    root: str | None = None
    layout: Layout | None = None
    dataset_yaml: Literal["wins", "fills"] = "wins"
    train: tuple[str, ...] | None = None
    val: tuple[str, ...] | None = None
    classes: dict[int, str] | None = None
    ignored: tuple[int, ...] = ()
    features: tuple[Feature, ...] = ()
    height_radius: float = 8.0
    voxel: float = 0.02
    crop: CropShape = field(default="sphere", metadata={"was": "block"})
    crop_size: float = field(default=6.0, metadata={"was": "block_size"})
    overlap: float = 0.5
    max_points: int | None = 100_000
    crops_per_scan: int = field(default=1, metadata={"was": "blocks_per_scan"})
    balance: float = 0.0
    class_weighting: float = 0.0
    on_fault: Literal["stop", "skip"] = "stop"
    cached_points: int = 20_000_000
    augment: AugmentConfig = field(default_factory=AugmentConfig)

    def __post_init__(self) -> None:
        expect(
            self,
            {
                "root": (self.root != "", "a folder, or null"),
                "voxel": (0 <= self.voxel < math.inf, "0 or more"),
                "crop_size": (0 < self.crop_size < math.inf, "more than 0"),
                "height_radius": (0 < self.height_radius < math.inf, "more than 0"),
                "overlap": (0 <= self.overlap < 1, "0 or more and less than 1"),
                "balance": (0 <= self.balance <= 1, "from 0 to 1"),
                "crops_per_scan": (1 <= self.crops_per_scan <= 1_000_000, "1 to 1,000,000"),
                "max_points": (self.max_points is None or self.max_points >= 1, "1 or more, or null"),
                "cached_points": (self.cached_points >= 0, "0 or more"),
                "class_weighting": (0 <= self.class_weighting <= 1, "from 0 to 1"),
                "features": (len(set(self.features)) == len(self.features), "each feature once"),
            },
        )


@dataclass(frozen=True, kw_only=True)
class LossConfig:
    """The loss.

    Args:
        label_smoothing: fraction of the cross entropy's target that is spread over all classes.
        lovasz: weight of the Lovasz-softmax loss, which approximates the mean IoU, beside the cross entropy; 0 for
            none.
    """

    label_smoothing: float = 0.0
    lovasz: float = 0.0

    def __post_init__(self) -> None:
        expect(
            self,
            {
                "label_smoothing": (0 <= self.label_smoothing <= 1, "from 0 to 1"),
                "lovasz": (0 <= self.lovasz < math.inf, "0 or more"),
            },
        )


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    """Settings of predictions and of pictures.

    Args:
        votes: number of times that a scan is predicted, each time with other points kept in its voxels; the
            probabilities are averaged.
        tiles: side in metres of the tiles in which ``latentgnn predict`` reads a scan, for scans larger than memory;
            ``null`` reads scans whole. If ``data.crop`` is the whole ``scan``, columns of that side are used instead.
        sample_pictures: number of pictures with ground truth beside predictions that a run writes, one per scan.
    """

    votes: int = 1
    tiles: float | None = None
    sample_pictures: int = 8

    def __post_init__(self) -> None:
        expect(
            self,
            {
                "votes": (1 <= self.votes <= 1000, "1 to 1000"),
                "tiles": (self.tiles is None or 1 <= self.tiles <= 1e6, "1 to 1,000,000 metres, or null"),
                "sample_pictures": (self.sample_pictures >= 0, "0 or more"),
            },
        )


@dataclass(frozen=True, kw_only=True)
class PointCloudConfig:
    """A point-cloud run: everything that its result depends on.

    Args:
        task: always ``pointcloud``.
        model: see `ModelConfig`.
        loss: see `LossConfig`.
        data: see `DataConfig`.
        training: see `latentgnn.training.config.TrainingConfig`.
        evaluation: see `EvaluationConfig`.
    """

    task: Literal["pointcloud"] = "pointcloud"
    model: ModelConfig = field(default_factory=ModelConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    data: DataConfig = field(default_factory=DataConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)

    @property
    def seen_by_crops(self) -> DataConfig:
        """``data`` with the crops used for predictions: a scan that is read in tiles is never seen whole."""
        if self.evaluation.tiles is None or self.data.crop != "scan":
            return self.data
        return replace(self.data, crop="column", crop_size=self.evaluation.tiles)


_CHECKED = (
    *("data.root", "data.layout", "data.dataset_yaml", "data.train", "data.val", "data.classes", "data.ignored"),
    *("data.features", "data.height_radius"),
)
_EXPLAINED = ("model.neighbors", "data.crop", "data.crop_size", "data.overlap", "training.accelerator")
SETTINGS = TaskSettings(
    config=PointCloudConfig,
    loader="load_segmenter",
    places=("data.root", "model.weights"),
    checked=_CHECKED,
    explained=_EXPLAINED,
    diagnosed=(*_CHECKED, "data.on_fault", *_EXPLAINED),
    free_when_trained=frozenset({"model.neighbors"}),
)
