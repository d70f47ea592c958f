"""What a block has computed, and the gradients that blocks add up.

Axes: s rows of the input, T nodes, C channels, S samples, G groups, H = ways * G, r channels of a group, D latents of
all kernels in a group, K kernels, F features.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from latentgnn.core.plan import Plan
from latentgnn.core.statistics import Statistics


@dataclass
class Record:
    """What a block has computed; the backward pass recomputes what is ``None``.

    Args:
        raw: W x of every way before a norm with statistics, (s, T, ways * R).
        raw_statistics: statistics of that norm.
        unit: V and then L, of unit length, (s, H, T, r); only L if V was freed.
        scale: the factor to unit length, (s, H, T, 1).
        assigned: Psi V of each way before a norm with statistics, (s, T, G * D).
        assigned_statistics: statistics of these norms.
        gather_assign: P, (s, G, T, D); if symmetric of unit length over each kernel's latents.
        scatter_assign: Q, (s, G, T, D), of unit length over each kernel's latents.
        assign_scales: the factor to unit length of each kernel's part of Q, (s, G, T, 1).
        convolved: G O of all kernels before a norm with statistics, (s, T, K * R).
        convolved_statistics: statistics of that norm.
        to_feature: the matrix from assignments to features, (S, D, R); only of the Triton kernels.
        feature: what the output is expanded from, (s, T, F).
        expanded: f U^T of each part of its channels before a norm with statistics.
        expanded_statistics: statistics of these norms.
    """

    raw: Tensor | None = None
    raw_statistics: Statistics | None = None
    unit: Tensor | None = None
    scale: Tensor | None = None
    assigned: list[Tensor] | None = None
    assigned_statistics: list[Statistics] | None = None
    gather_assign: Tensor | None = None
    scatter_assign: Tensor | None = None
    assign_scales: list[Tensor] | None = None
    convolved: Tensor | None = None
    convolved_statistics: Statistics | None = None
    to_feature: Tensor | None = None
    feature: Tensor | None = None
    expanded: list[Tensor] | None = None
    expanded_statistics: list[Statistics] | None = None

    def stored(self, tensors: list[Tensor]) -> dict[str, Any]:
        """Append the tensors to a list; returns their places in it, for `restored`."""
        return {name: _store(value, tensors) for name, value in vars(self).items() if value is not None}

    @classmethod
    def restored(cls, places: dict[str, Any], tensors: Sequence[Tensor]) -> "Record":
        """Undo `stored`."""
        return cls(**{name: _restore(place, tensors) for name, place in places.items()})


def _store(value: Any, tensors: list[Tensor]) -> Any:
    if isinstance(value, Tensor):
        tensors.append(value)
        return len(tensors) - 1
    if isinstance(value, Statistics):
        return Statistics(*(_store(part, tensors) for part in value))
    return None if value is None else [_store(part, tensors) for part in value]


def _restore(place: Any, tensors: Sequence[Tensor]) -> Any:
    if isinstance(place, int):
        return tensors[place]
    if isinstance(place, Statistics):
        return Statistics(*(_restore(part, tensors) for part in place))
    return None if place is None else [_restore(part, tensors) for part in place]


@dataclass
class Gradients:
    """Gradients of what the core multiplies by, summed over blocks, in the wide dtype.

    Args:
        reduce: (ways * R, C), of the reductions times their scale.
        reduce_vectors: with affine norms (None, gradient of the shift); otherwise gradients of the norm's weight and
            bias.
        assigns: (G, D, r) of each way.
        assign_vectors: the same for each way.
        features: of each kernel's matrix from assignments to features, (S, G, r, D_k).
        conv_vectors: of the graph convolution's norm, (K * R,).
        expand: (C, F), of the expansion times its scale.
        expand_shift: (C,).
        expand_vectors: of the weight and the bias of the output's batch norm, gamma in them.
    """

    reduce: Tensor | None = None
    reduce_vectors: tuple[Tensor | None, Tensor | None] = (None, None)
    assigns: list[Tensor | None] | None = None
    assign_vectors: list[tuple[Tensor | None, Tensor | None]] | None = None
    features: list[Tensor] | None = None
    conv_vectors: tuple[Tensor | None, Tensor | None] = (None, None)
    expand: Tensor | None = None
    expand_shift: Tensor | None = None
    expand_vectors: tuple[Tensor | None, Tensor | None] = (None, None)

    @classmethod
    def nothing(cls, to_features: Sequence[Tensor], plan: Plan) -> "Gradients":
        """Zero gradients, before any block.

        Args:
            to_features: of each kernel, the matrix from assignments to features, (S, G, r, D_k).
            plan: the layer's plan.
        """
        return cls(
            assigns=[None] * plan.ways,
            assign_vectors=[(None, None)] * plan.ways,
            features=[
                torch.zeros_like(matrix_SGrD, memory_format=torch.contiguous_format) for matrix_SGrD in to_features
            ],
        )


def add_pair(
    total: tuple[Tensor | None, Tensor | None], part: Sequence[Tensor | None]
) -> tuple[Tensor | None, Tensor | None]:
    """`add` for a weight and a bias; either may be ``None``."""
    weight, bias = (old if new is None else add(old, new) for old, new in zip(total, part, strict=True))
    return weight, bias


def add(total: Tensor | None, part: Tensor) -> Tensor:
    """total + part; the first part becomes the total."""
    return part if total is None else total.add_(part)
