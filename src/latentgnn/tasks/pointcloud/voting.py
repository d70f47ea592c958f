"""A point network on a scan, or on a part of one: overlapping crops vote on the class of every original point."""

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

# Keeps the votes' random stream apart from that of the training crops.
_VOTES = 0x766F746573


class Part(NamedTuple):
    """Which part of a scan points are.

    Args:
        bounds: of the whole scan.
        wanted: the points whose classes are asked for, bool, shape (N,); of each crop that holds one of them, all
            points must be there.
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
    """Probabilities of the classes for every point of a scan.

    The scan is cut into overlapping crops, each crop thinned out by voxels; a point takes the probabilities of the
    point that was kept of its voxel, and their mean over the crops that hold it.

    Args:
        model: in evaluation mode; it runs where it is.
        points: metres, float64, shape (N, 3).
        features: shape (N, F).
        config: ``crop``, ``crop_size``, ``overlap`` and ``voxel``.
        votes: times that all crops are predicted, each time with other points kept.
        part: if the points are a part of a scan.
        on_crop: called after each crop with the share of the work that is done, from 0 to 1.

    Returns:
        Float32, shape (N, K); of a part, the rows of the wanted points. They are those of the whole scan to the last
        bit, if the points have the same order and the network repeats itself.
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
            # The first vote takes the points nearest to the middles of their voxels.
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
    """The same items, each next one made while the one before is in use."""
    with ThreadPoolExecutor(1) as pool:
        coming = pool.submit(next, items, None)
        while (item := coming.result()) is not None:
            coming = pool.submit(next, items, None)
            yield item
