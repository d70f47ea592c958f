"""Training samples: random crops of scans, packed one after another."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from latentgnn.tasks.classes import IGNORE
from latentgnn.tasks.pointcloud.augment import augment
from latentgnn.tasks.pointcloud.config import DataConfig
from latentgnn.tasks.pointcloud.datasets import ScanSet
from latentgnn.tasks.pointcloud.voxels import crop, recentre, voxelize

# Separates the crops' random stream from others with the same seed.
_CROPS = 0x626C6F636B73


class Sample(NamedTuple):
    """A crop.

    Args:
        name: name of the scan.
        coordinates: metres, float32, shape (n, 3), see `latentgnn.tasks.pointcloud.voxels.recentre`.
        features: float32, shape (n, F).
        labels: classes or `IGNORE`, int64, shape (n,).
    """

    name: str
    coordinates: Tensor
    features: Tensor
    labels: Tensor


class Batch(NamedTuple):
    """Crops packed one after another; crop b consists of the points ``offsets[b]`` to ``offsets[b + 1]``.

    Args:
        names: names of the scans, B.
        coordinates: metres, float32, shape (T, 3).
        features: float32, shape (T, F).
        labels: classes or `IGNORE`, int64, shape (T,).
        offsets: int64, shape (B + 1,).
    """

    names: list[str]
    coordinates: Tensor
    features: Tensor
    labels: Tensor
    offsets: Tensor


def collate(samples: Sequence[Sample]) -> Batch:
    """Pack crops of any sizes."""
    sizes = torch.tensor([0, *(len(sample.coordinates) for sample in samples)])
    return Batch(
        names=[sample.name for sample in samples],
        coordinates=torch.cat([sample.coordinates for sample in samples]),
        features=torch.cat([sample.features for sample in samples]),
        labels=torch.cat([sample.labels for sample in samples]),
        offsets=sizes.cumsum(0),
    )


class TrainingCrops:
    """Augmented random crops whose content depends only on the seed, the epoch and the index.

    Args:
        scans: scans with labels.
        config: how crops are cut and changed.
        seed: seed of everything that is drawn.
    """

    def __init__(self, scans: ScanSet, config: DataConfig, *, seed: int) -> None:
        self._scans = scans
        self._config = config
        self._seed = seed

    def __len__(self) -> int:
        return len(self._scans) * self._config.crops_per_scan

    def group_of(self, index: int) -> int:
        """Return 0: crops of any sizes can share a batch."""
        return 0

    def __getitem__(self, key: tuple[int, int], /) -> Sample:
        epoch, index = key
        rng = np.random.default_rng(np.random.SeedSequence([self._seed, _CROPS, epoch, index]))
        scan = self._scans.scan(index % len(self._scans))
        assert scan.labels is not None
        config = self._config
        centre = scan.points[_centre(scan.labels, config.balance, rng)]
        inside = crop(scan.points, centre, shape=config.crop, size=config.crop_size)
        changed = augment(
            scan.points[inside] - centre, scan.features[inside], self._scans.feature_names, config.augment, rng
        )
        chosen = voxelize(changed.points, config.voxel, rng).kept
        if config.max_points is not None and len(chosen) > config.max_points:
            # For columns and whole scans, the distance is horizontal.
            offset = changed.points[chosen] if config.crop == "sphere" else changed.points[chosen, :2]
            nearest = np.argpartition((offset**2).sum(axis=1), config.max_points)[: config.max_points]
            chosen = chosen[np.sort(nearest)]
        return Sample(
            name=scan.name,
            coordinates=torch.from_numpy(recentre(changed.points[chosen])),
            features=torch.from_numpy(changed.features[chosen]),
            labels=torch.from_numpy(scan.labels[inside][changed.kept][chosen]),
        )


def _centre(labels: NDArray[np.int64], balance: float, rng: np.random.Generator) -> int:
    """Index of a labelled point: any, or with probability ``balance`` one of a class that is drawn first."""
    if rng.random() < balance:
        present = np.unique(labels[labels != IGNORE])
        return int(rng.choice(np.flatnonzero(labels == rng.choice(present))))
    return int(rng.choice(np.flatnonzero(labels != IGNORE)))
