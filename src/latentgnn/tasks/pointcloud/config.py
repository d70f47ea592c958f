"""What a point-cloud run is made of, as plain data: model, data, training, evaluation."""

from dataclasses import dataclass, field
from typing import Literal

Feature = Literal[
    "intensity", "log_intensity", "return_number", "number_of_returns", "last_return", "color", "normal", "height"
]
Layout = Literal["scans", "scannet", "s3dis"]
BlockShape = Literal["sphere", "column", "scan"]


@dataclass(frozen=True, kw_only=True)
class AugmentConfig:
    """Random changes of a training block; coordinates, normals, heights and colours follow.

    Args:
        rotate: turn about the vertical axis by a random angle.
        flip: probability of a mirror image, in x and in y each.
        scale: range of a random factor of all coordinates, ``null`` for none.
        jitter: standard deviation in metres of a shift of every point by itself, cut off at three times it.
        drop: largest fraction of the points that is left out; the fraction is drawn for each block.
        color_drop: probability that a block has no colours (all zero).
        color_jitter: standard deviation of a change of every point's colours, which are in 0..1.
    """

    rotate: bool = True
    flip: float = 0.5
    scale: tuple[float, float] | None = (0.9, 1.1)
    jitter: float = 0.0
    drop: float = 0.0
    color_drop: float = 0.0
    color_jitter: float = 0.0


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Where scans are, what their classes are, and how they are cut into blocks.

    A ``dataset.yaml`` in the data folder may set ``layout``, ``train``, ``val``, ``classes``, ``ignored`` and
    ``features``; what it says wins over what is said here.

    Args:
        root: the data folder.
        layout: ``scans`` for LAS, LAZ, PLY and NPZ files, ``scannet`` for ScanNet v2, ``s3dis`` for S3DIS's text files;
            ``null`` finds out.
        train: what the training set consists of, relative to ``root``; files, folders and globs for ``scans``
            (``null``: the folder ``train``), split files for ``scannet`` (``scannetv2_train.txt``), areas for
            ``s3dis`` (all that are not validated on).
        val: likewise for validation (the folder ``val``; ``scannetv2_val.txt``; ``Area_5``).
        classes: id in the files and name of every class; ``null`` takes the layout's.
        ignored: further ids that files may hold, which are neither learnt nor scored.
        features: what is known of a point besides its coordinates.
        height_radius: ``height`` is that above the lowest point within this many metres.
        voxel: edge in metres of the voxels of which each keeps one point; 0 keeps all points.
        block: what the network sees at once: all within half of ``block_size`` of a point (``sphere``), a square of
            that edge seen from above (``column``), or the whole ``scan``.
        block_size: diameter or edge in metres.
        overlap: part of its edge that a block shares with the next in evaluation, from 0 to less than 1.
        max_points: of a training block, after voxel subsampling, those nearest to its centre; ``null`` for no limit.
        blocks_per_scan: training blocks drawn from each scan in an epoch.
        balance: part of the training blocks whose centre is drawn from a random class instead of from all points, so
            that rare classes are seen.
        on_fault: ``stop`` at faulty scans, or ``skip`` them and say how many.
        cached_points: points of read scans that each process keeps in memory.
        augment: see `AugmentConfig`.
    """

    root: str | None = None
    layout: Layout | None = None
    train: tuple[str, ...] | None = None
    val: tuple[str, ...] | None = None
    classes: tuple[tuple[int, str], ...] | None = None
    ignored: tuple[int, ...] = ()
    features: tuple[Feature, ...] = ()
    height_radius: float = 8.0
    voxel: float = 0.02
    block: BlockShape = "sphere"
    block_size: float = 6.0
    overlap: float = 0.5
    max_points: int | None = 100_000
    blocks_per_scan: int = 1
    balance: float = 0.0
    class_weighting: float = 0.0
    on_fault: Literal["stop", "skip"] = "stop"
    cached_points: int = 20_000_000
    augment: AugmentConfig = field(default_factory=AugmentConfig)
