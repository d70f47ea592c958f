"""Folding and mixing with autograd's record: small tensors, whose gradients are autograd's.

Where a layer holds what it computes, the record of the forward pass serves the backward pass; otherwise that makes it
again.

Axes: S samples, G groups, D latents of all kernels in a group, r channels of a group.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from latentgnn.core.mix import scatter_matrices
from latentgnn.core.parameters import Matrices, Parts, Vectors, fold, vectors
from latentgnn.core.plan import Plan
from latentgnn.functional import cast


@dataclass
class Folding:
    """What the core multiplies by, and the tensors that it was folded from.

    Args:
        leaves: of the layer's tensors, which autograd's record ends at.
        folded: what they were folded into.
        folded_vectors: likewise, of norms with statistics.
        matrices: ``folded`` without a record.
        vectors: ``folded_vectors`` without one.
    """

    leaves: list[Tensor | None]
    folded: Matrices
    folded_vectors: Vectors | None
    matrices: Matrices
    vectors: Vectors | None

    @classmethod
    def of(cls, tensors: Sequence[Tensor | None], needs: Sequence[bool], plan: Plan) -> "Folding":
        """With gradients for the tensors that need one."""
        leaves = [
            None if tensor is None else tensor.detach().requires_grad_(need)
            for tensor, need in zip(tensors, needs, strict=True)
        ]
        with torch.enable_grad(), _kept():
            parts = Parts.of(leaves, plan)
            folded, folded_vectors = fold(parts, plan), vectors(parts, plan) if plan.takes_statistics else None
        without = None if folded_vectors is None else Vectors(*_detached(folded_vectors))
        return cls(leaves, folded, folded_vectors, Matrices(*_detached(folded)), without)

    @classmethod
    def without_record(cls, tensors: Sequence[Tensor | None], plan: Plan) -> "Folding":
        """Without gradients."""
        parts = Parts.of(tensors, plan)
        folded, folded_vectors = fold(parts, plan), vectors(parts, plan) if plan.takes_statistics else None
        return cls([], folded, folded_vectors, folded, folded_vectors)


@dataclass
class Mixing:
    """What takes each kernel's assignments to features, and what it was computed from.

    Args:
        sums: of values by assignments, (S, G, D, r).
        weights: what they are divided by, (S, G, D).
        convs: of the graph convolutions.
        to_features: of each kernel, (S, G, r, D_k).
        multiplied: ``to_features`` without a record, in the type of the products.
    """

    sums: Tensor
    weights: Tensor
    convs: list[Tensor]
    to_features: list[Tensor]
    multiplied: list[Tensor]

    @classmethod
    def of(cls, sums: Tensor, weights: Tensor, convs: Sequence[Tensor], plan: Plan, *, records: bool) -> "Mixing":
        """With gradients for all of them where it ``records``."""
        sums, weights = sums.detach().requires_grad_(records), weights.detach().requires_grad_(records)
        own = [conv.detach().requires_grad_(records) for conv in convs]
        with torch.set_grad_enabled(records), _kept():
            to_features = scatter_matrices(sums, weights, own, plan)
        return cls(sums, weights, own, to_features, [cast(matrix.detach(), plan.compute) for matrix in to_features])


def _kept() -> saved_tensors_hooks:
    """Record past whatever hooks there are: activation checkpointing would run the layer again for each record."""
    return saved_tensors_hooks(lambda tensor: tensor, lambda tensor: tensor)


def _detached(fields: Sequence[Any]) -> list[Any]:
    """The fields of `Matrices` or `Vectors`, tensors or sequences of them, without autograd's record."""
    detached: list[Any] = []
    for field in fields:
        if field is None or isinstance(field, Tensor):
            detached.append(None if field is None else field.detach() if field.requires_grad else field)
        else:
            detached.append(tuple(_detached(field)))
    return detached


def gradients_of(
    outputs: Sequence[Tensor], inputs: Sequence[Tensor], grads: Sequence[Tensor]
) -> Sequence[Tensor | None]:
    """Of inputs, from those of outputs, as often as it is asked for."""
    recorded = [
        (output, cast(grad, output.dtype)) for output, grad in zip(outputs, grads, strict=True) if output.requires_grad
    ]
    if not recorded or not inputs:
        return [None] * len(inputs)
    outputs, grads = zip(*recorded, strict=True)
    return torch.autograd.grad(outputs, inputs, grads, allow_unused=True, retain_graph=True)
