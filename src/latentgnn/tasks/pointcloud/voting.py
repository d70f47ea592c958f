"""Runs a point network on a scan or a part of one: overlapping crops vote on the class of every original point."""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from latentgnn.tasks.pointcloud.config import DataConfig
from latentgnn.tasks.pointcloud.model import PointNetwork
from latentgnn.tasks.pointcloud.neighbors import Hierarchy, Level, build_hierarchy
from latentgnn.tasks.pointcloud.voxels import Bounds, numbered_crops, recentre, voxelize

T = TypeVar("T")

# Separates the votes' random stream from that of the training crops.
_VOTES = 0x766F746573


class Part(NamedTuple):
    """Describes which part of a scan some points are.

    Args:
        bounds: bounds of the whole scan.
        wanted: mask of the points whose classes are requested, bool, shape (N,); all points of every crop that contains
            one of them must be included.
    """

    bounds: Bounds
    wanted: NDArray[np.bool_]


def predict_scan(
    model: PointNetwork,
    points: NDArray[np.float64],
    features: NDArray[np.float32],
    config: DataConfig,
    *,
    votes: int = 1,
    part: Part | None = None,
    on_crop: Callable[[float], None] | None = None,
) -> NDArray[np.float32]:
    """Return class probabilities for every point of a scan.

    The scan is cut into overlapping crops, and each crop is subsampled by voxels. A point takes the probabilities of
    the point that was kept in its voxel, averaged over the crops that contain it.

    Args:
        model: the network in evaluation mode; it runs on its own device.
        points: metres, float64, shape (N, 3).
        features: shape (N, F).
        config: configuration with ``crop``, ``crop_size``, ``overlap`` and ``voxel``.
        votes: number of times that all crops are predicted, each time with other points kept.
        part: given if the points are a part of a scan.
        on_crop: called after each crop with the fraction of the work that is done, from 0 to 1.

    Returns:
        Float32, shape (N, K); for a part, the rows of the wanted points. They equal those of the whole scan bit for bit
        if the points have the same order and the network is deterministic.
    """
    device = next(model.parameters()).device
    total = np.zeros((len(points), model.num_classes), np.float32)
    with torch.inference_mode():
        for crop in _ahead(_prepared(model, points, features, config, votes, part)):
            hierarchy = tuple(Level(*(tensor.to(device) for tensor in level)) for level in crop.hierarchy)
            scores = model(torch.from_numpy(crop.features).to(device), hierarchy)
            total[crop.inside] += scores.float().softmax(dim=1).cpu().numpy()[crop.kept_of_point]
            if on_crop is not None:
                on_crop(crop.done)
    if part is not None:
        total = total[part.wanted]
    # Every point is in a crop, so no sum is zero.
    total /= total.sum(axis=1, keepdims=True)
    return total


class _Crop(NamedTuple):
    inside: NDArray[np.int64]
    kept_of_point: NDArray[np.int64]
    features: NDArray[np.float32]
    hierarchy: Hierarchy
    done: float


def _prepared(
    model: PointNetwork,
    points: NDArray[np.float64],
    features: NDArray[np.float32],
    config: DataConfig,
    votes: int,
    part: Part | None,
) -> Iterator[_Crop]:
    bounds, wanted = part or Part(Bounds.of(points), np.ones(len(points), bool))
    number_wanted = np.count_nonzero(wanted)
    for vote in range(votes):
        waiting = wanted.copy()
        for number, inside in numbered_crops(
            points, bounds, shape=config.crop, size=config.crop_size, overlap=config.overlap
        ):
            if not wanted[inside].any():
                continue
            waiting[inside] = False
            # The first vote takes the points nearest to the centres of their voxels.
            rng = np.random.default_rng(np.random.SeedSequence([_VOTES, vote, *number])) if vote else None
            voxels = voxelize(points[inside], config.voxel, rng)
            chosen = inside[voxels.kept]
            yield _Crop(
                inside=inside,
                kept_of_point=voxels.voxel_of_point,
                features=features[chosen],
                hierarchy=build_hierarchy(
                    recentre(points[chosen]), grids=model.grids, neighbors=model.neighbors, workers=-1
                ),
                done=(vote + 1 - np.count_nonzero(waiting) / number_wanted) / votes,
            )


def _ahead(items: Iterator[T]) -> Iterator[T]:
    """Yield the same items, preparing each next one while the previous one is in use."""
    with ThreadPoolExecutor(1) as pool:
        coming = pool.submit(next, items, None)
        while (item := coming.result()) is not None:
            coming = pool.submit(next, items, None)
            yield item
