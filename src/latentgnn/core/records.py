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
    """What a block has computed; what its backward pass needs, or will compute again.

    Args:
        raw: W x of every way before a norm with statistics, (s, T, ways * R).
        raw_statistics: that the norm took.
        unit: V, and after it L, of unit length, (s, H, T, r); L alone where the rest was let go.
        scale: what they were multiplied by, (s, H, T, 1).
        assigned: Psi V of each way before a norm with statistics, (s, T, G * D).
        assigned_statistics: that the norms took.
        gather_assign: P, (s, G, T, D); if symmetric of unit length over each kernel's latents.
        scatter_assign: Q, likewise, of unit length.
        assign_scales: what each kernel's part of Q was multiplied by, (s, G, T, 1).
        convolved: G O of all kernels before a norm with statistics, (s, T, K * R).
        convolved_statistics: that the norm took.
        to_feature: what takes assignments to features, (S, D, R); of the Triton kernels.
        feature: what the output is expanded from, (s, T, F).
        expanded: f U^T of each part of its channels before a norm with statistics.
        expanded_statistics: that the norms took.
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
        """Put what is there at the end of a list; where each went, for `restored`."""
        return {name: _store(value, tensors) for name, value in vars(self).items() if value is not None}

    @classmethod
    def restored(cls, places: dict[str, Any], tensors: Sequence[Tensor]) -> "Record":
        """What `stored` put into a list."""
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
    """Of what the core multiplies by, added up over blocks, in the wide type.

    Args:
        reduce: (ways * R, C), of the reductions times their scale.
        reduce_vectors: of scale and shift folded in, of which only the shift's is here, (None, shift); of a batch
            norm's weight and bias.
        assigns: (G, D, r) of each way.
        assign_vectors: likewise, of each way.
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
        """Of no blocks yet.

        Args:
            to_features: of each kernel, the matrix from assignments to features, (S, G, r, D_k).
            plan: of the layer.
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
    """`add` for a weight and a bias, either of which may not be there."""
    weight, bias = (old if new is None else add(old, new) for old, new in zip(total, part, strict=True))
    return weight, bias


def add(total: Tensor | None, part: Tensor) -> Tensor:
    """total + part, where the first part starts the total."""
    return part if total is None else total.add_(part)
