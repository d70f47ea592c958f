"""Random changes of a crop of points: of coordinates, and of the features that depend on them."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from latentgnn.tasks.pointcloud.config import AugmentConfig
from latentgnn.tasks.pointcloud.features import COLOR_COLUMNS, NORMAL_COLUMNS


class Augmented(NamedTuple):
    """A crop after random changes.

    Args:
        points: metres, float64, shape (n, 3).
        features: float32, shape (n, F).
        kept: indices of the points that were not dropped, ascending, shape (n,).
    """

    points: NDArray[np.float64]
    features: NDArray[np.float32]
    kept: NDArray[np.int64]


def augment(
    points: NDArray[np.float64],
    features: NDArray[np.float32],
    names: Sequence[str],
    config: AugmentConfig,
    rng: np.random.Generator,
) -> Augmented:
    """Return a crop with random changes, which depend only on the state of ``rng``.

    Args:
        points: metres relative to the centre of rotation, float64, shape (N, 3).
        features: float32, shape (N, F).
        names: names of the columns of ``features``.
        config: the possible changes.
        rng: random generator; its state is advanced.
    """
    number = len(points)
    kept = np.arange(number)
    if config.drop:
        left = max(1, round(number * (1 - config.drop * rng.random())))
        kept = np.sort(rng.choice(number, left, replace=False))
    points, features = points[kept], features[kept]

    angle = rng.uniform(0, 2 * np.pi) if config.rotate else 0.0
    cosine, sine = np.cos(angle), np.sin(angle)
    mirror = np.where(rng.random(2) < config.flip, -1.0, 1.0)
    turn = np.array([[cosine, -sine, 0], [sine, cosine, 0], [0, 0, 1]]) * np.array([*mirror, 1.0])
    factor = rng.uniform(*config.scale) if config.scale is not None else 1.0
    points = points @ (factor * turn).T
    if config.jitter:
        shift = config.jitter * rng.standard_normal(points.shape)
        points = points + shift.clip(-3 * config.jitter, 3 * config.jitter)

    column_of = {name: column for column, name in enumerate(names)}
    if set(NORMAL_COLUMNS) <= set(names):
        normal = [column_of[name] for name in NORMAL_COLUMNS]
        features[:, normal] = features[:, normal] @ turn.T.astype(np.float32)
    if "height" in names:
        features[:, column_of["height"]] *= np.float32(factor)
    if set(COLOR_COLUMNS) <= set(names):
        color = [column_of[name] for name in COLOR_COLUMNS]
        if config.color_jitter:
            noise = config.color_jitter * rng.standard_normal((len(kept), 3))
            features[:, color] = (features[:, color] + noise).clip(0, 1)
        if rng.random() < config.color_drop:
            features[:, color] = 0
    return Augmented(points=points, features=features, kept=kept)
