"""One crop of a scan as the network sees it, shown for scans that are too large to be seen whole."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from latentgnn.tasks.pointcloud.loading import TrainedSegmenter
from latentgnn.tasks.pointcloud.neighbors import Hierarchy, Level, build_hierarchy
from latentgnn.tasks.pointcloud.voxels import crops, recentre, voxelize

Place = tuple[float, float]
"""x and y in the coordinates of the file."""

_MOST_CROPS = 2_000  # maximum number of crops that are searched for the one with the most points


class Crop(NamedTuple):
    """A part of a scan as the network sees it.

    Args:
        points: points of the finest level, in the file's coordinates, float64, shape (T, 3).
        features: features of these points, float32, shape (T, F).
        hierarchy: levels of these points.
    """

    points: NDArray[np.float64]
    features: NDArray[np.float32]
    hierarchy: Hierarchy

    def inputs(self, device: torch.device | str = "cpu") -> tuple[Tensor, Hierarchy]:
        """Return the network's inputs."""
        hierarchy = tuple(Level(*(tensor.to(device) for tensor in level)) for level in self.hierarchy)
        return torch.from_numpy(self.features).to(device), hierarchy

    def at_level(self, level: int) -> NDArray[np.float64]:
        """Return the points of a level."""
        points = self.points
        for coarser in self.hierarchy[1 : level + 1]:
            points = points[coarser.kept.numpy()]
        return points

    def to_finest(self, values: NDArray[np.float32], level: int) -> NDArray[np.float32]:
        """Convert a value per point of a level to one per point of the finest level: that of the nearest point."""
        for coarser in reversed(self.hierarchy[1 : level + 1]):
            values = values[coarser.anchors[:, 0].numpy()]
        return values


def take_crop(
    trained: TrainedSegmenter, points: NDArray[np.float64], features: NDArray[np.float32], places: Sequence[Place]
) -> Crop:
    """Return the crop nearest to a place, or with the most points, out of those that a prediction uses."""
    data = trained.config.data
    best, best_score = np.arange(len(points)), -np.inf
    found = crops(points, shape=data.crop, size=data.crop_size, overlap=data.overlap)
    for number, inside in enumerate(found):
        if number == _MOST_CROPS and not places:
            break
        middle = points[inside, :2].mean(axis=0)
        score = -float(np.abs(middle - places[0]).max()) if places else float(len(inside))
        if score > best_score:
            best, best_score = inside, score
    kept = best[voxelize(points[best], data.voxel).kept]
    hierarchy = build_hierarchy(
        recentre(points[kept]), grids=trained.model.grids, neighbors=trained.model.neighbors, workers=-1
    )
    return Crop(points[kept], features[kept], hierarchy)
