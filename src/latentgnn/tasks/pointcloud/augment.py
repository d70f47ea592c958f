"""Random changes of a block of points: coordinates, and the features that depend on them."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from latentgnn.errors import UserError
from latentgnn.tasks.pointcloud.config import AugmentConfig
from latentgnn.tasks.pointcloud.datasets import COLOR_COLUMNS, NORMAL_COLUMNS


class Augmented(NamedTuple):
    """A changed block.

    Args:
        points: metres, float64, shape (n, 3).
        features: float32, shape (n, F).
        kept: indices of the points that were not dropped, ascending, shape (n,).
    """

    points: NDArray[np.float64]
    features: NDArray[np.float32]
    kept: NDArray[np.int64]


def check_augment(config: AugmentConfig) -> None:
    """Refuse values out of their range.

    Raises:
        UserError: naming the value.
    """
    for name in ("flip", "color_drop", "drop"):
        value = getattr(config, name)
        if not 0 <= value <= 1 or (name == "drop" and value == 1):
            expected = "0 or more and less than 1" if name == "drop" else "a probability from 0 to 1"
            raise UserError(f"data.augment.{name}: expected {expected}; got {value}")
    for name in ("jitter", "color_jitter"):
        if not getattr(config, name) >= 0:
            raise UserError(f"data.augment.{name}: expected 0 or more; got {getattr(config, name)}")
    if config.scale is not None and not 0 < config.scale[0] <= config.scale[1]:
        raise UserError(f"data.augment.scale: expected two ascending factors above 0; got {list(config.scale)}")


def augment(
    points: NDArray[np.float64],
    features: NDArray[np.float32],
    names: Sequence[str],
    config: AugmentConfig,
    rng: np.random.Generator,
) -> Augmented:
    """A block with random changes; the same for the same state of ``rng``.

    Args:
        points: metres from a middle of their own, about which they turn, float64, shape (N, 3).
        features: float32, shape (N, F).
        names: of the columns of ``features``.
        config: what may happen.
        rng: is advanced.
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
