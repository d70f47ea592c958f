"""The options of a LatentGNN layer, validated once and saved as plain data."""

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, cast, get_args

from torch import nn

from latentgnn.files.writing import write_json
from latentgnn.functional import NodeScale
from latentgnn.norms import NORMS, NormFactory

_MOST_CHANNELS = 2**20
_MOST_LATENTS = 2**16  # in one kernel; its affinity has the square of this many entries


def _check_count(name: str, value: object, most: int = _MOST_CHANNELS) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an int, got {type(value).__name__} ({value!r})")
    if value < 1:
        raise ValueError(f"{name} must be at least 1, got {value}")
    if value > most:
        raise ValueError(f"{name} must be at most {most:,}, got {value:,}")


@dataclass(frozen=True, kw_only=True)
class LatentGNNConfig:
    """The fields of `latentgnn.LatentGNN`, checked at construction.

    Args:
        channels: channels C of the input and the output.
        num_latents: latents in each group: one number, or one per kernel; stored as a tuple.
        reduction: C is reduced to R = C // reduction channels inside.
        symmetric: one assignment for gather and scatter instead of two.
        graph_conv: a graph convolution with a norm and a ReLU after the scatter step.
        residual: add the result, times gamma, to the input.
        norm: callable from a channel count to a norm, or a name in `latentgnn.norms.NORMS`.
        num_groups: groups of the reduced channels, each with latent graphs of its own.
        gamma_init: initial value of gamma; with 0, a new layer is an identity.
        node_scale: ``published``, or ``mean`` to make each latent a weighted mean of its nodes.

    Raises:
        TypeError: a field of the wrong kind.
        ValueError: a count below one or absurdly large, or channels that do not divide.

    Example:
        >>> LatentGNNConfig(channels=64, num_latents=16).num_latents
        (16,)
    """

    channels: int
    num_latents: int | Sequence[int]
    reduction: int = 8
    symmetric: bool = False
    graph_conv: bool = False
    residual: bool = True
    norm: NormFactory | str = "batch_norm"
    num_groups: int = 1
    gamma_init: float = 0.0
    node_scale: NodeScale = "published"

    def __post_init__(self) -> None:
        for name in ("channels", "reduction", "num_groups"):
            _check_count(name, getattr(self, name))
        object.__setattr__(self, "num_latents", _latents(self.num_latents))
        for name in ("symmetric", "graph_conv", "residual"):
            if not isinstance(getattr(self, name), bool):
                raise TypeError(f"{name} must be True or False, got {getattr(self, name)!r}")
        if isinstance(self.gamma_init, bool) or not isinstance(self.gamma_init, int | float):
            raise TypeError(f"gamma_init must be a number, got {self.gamma_init!r}")
        if not math.isfinite(self.gamma_init):
            raise ValueError(f"gamma_init must be finite, got {self.gamma_init}")
        if self.channels % self.reduction:
            raise ValueError(
                f"channels must be divisible by reduction, got {self.channels} and {self.reduction}; take a reduction "
                f"that divides them, such as {_divisor(self.channels, self.reduction)}"
            )
        if self.reduced_channels % self.num_groups:
            raise ValueError(
                f"the reduced channels, channels // reduction = {self.reduced_channels}, must be divisible by "
                f"num_groups, got {self.num_groups}; take a number of groups that divides them, such as "
                f"{_divisor(self.reduced_channels, self.num_groups)}"
            )
        if self.node_scale not in get_args(NodeScale):
            raise ValueError(f"node_scale must be one of {', '.join(get_args(NodeScale))}; got {self.node_scale!r}")
        if isinstance(self.norm, str):
            if self.norm not in NORMS:
                raise ValueError(f"norm must be a callable or one of {', '.join(NORMS)}; got {self.norm!r}")
        elif isinstance(self.norm, nn.Module):
            raise TypeError(
                f"norm must be a callable from a channel count to a module, for the layer has norms over several "
                f"channel counts; got one module, {self.norm!r}; give its class, {type(self.norm).__name__}, with "
                "arguments of its own through functools.partial"
            )
        elif not callable(self.norm):
            raise TypeError(f"norm must be a callable from a channel count to a module, got {self.norm!r}")
        # Store a named norm by its name, so that a configuration equals itself after saving and loading.
        named = next((name for name, factory in NORMS.items() if self.norm == factory), self.norm)
        object.__setattr__(self, "norm", named)

    @property
    def reduced_channels(self) -> int:
        """R, the channels inside the layer."""
        return self.channels // self.reduction

    @property
    def latents(self) -> tuple[int, ...]:
        """`num_latents` as a tuple, one entry per kernel."""
        return cast(tuple[int, ...], self.num_latents)

    @property
    def norm_factory(self) -> NormFactory:
        """`norm` as a callable."""
        return NORMS[self.norm] if isinstance(self.norm, str) else self.norm

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON values.

        Raises:
            ValueError: the norm is not in `latentgnn.norms.NORMS`, so it has no name to save.
        """
        if not isinstance(self.norm, str):
            raise ValueError(f"norm can be saved if it is one of {', '.join(NORMS)}; got {self.norm!r}")
        return {**asdict(self), "num_latents": list(self.latents)}

    def save(self, path: Path | str) -> None:
        """Write the fields as JSON, in one step."""
        write_json(path, self.to_dict())

    @classmethod
    def load(cls, path: Path | str) -> "LatentGNNConfig":
        """Read what `save` wrote.

        Raises:
            ValueError: invalid JSON, or missing or unknown fields.
        """
        try:
            values = json.loads(Path(path).read_text())
        except json.JSONDecodeError as error:
            raise ValueError(f"{path} is no JSON: {error}") from None
        known = {field.name for field in fields(cls)}
        if not isinstance(values, dict) or not {"channels", "num_latents"} <= set(values) <= known:
            raise ValueError(
                f"{path} must hold an object with channels, num_latents and any of {', '.join(sorted(known))}; "
                f"got {sorted(values) if isinstance(values, dict) else type(values).__name__}"
            )
        return cls(**values)


def _divisor(count: int, most: int) -> int:
    """The largest divisor of a count that is at most ``most``."""
    return next(divisor for divisor in range(min(most, count), 0, -1) if count % divisor == 0)


def _latents(num_latents: int | Sequence[int]) -> tuple[int, ...]:
    if isinstance(num_latents, int) and not isinstance(num_latents, bool):
        num_latents = (num_latents,)
    if isinstance(num_latents, str | bool) or not isinstance(num_latents, Sequence):
        raise TypeError(f"num_latents must be an int or a sequence with one int a kernel, got {num_latents!r}")
    if not num_latents:
        raise ValueError("num_latents must name at least one kernel, got an empty sequence")
    for count in num_latents:
        _check_count("num_latents", count, _MOST_LATENTS)
    return tuple(num_latents)
