"""Folding and mixing under autograd: they work on small tensors, so autograd computes their gradients.

If a layer holds what it computes, the backward pass uses the graph that the forward pass recorded; otherwise it records
the graph again.

Axes: S samples, G groups, D latents of all kernels in a group, r channels of a group.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from latentgnn.core.layouts import cat
from latentgnn.core.mix import scatter_matrices
from latentgnn.core.parameters import Matrices, Parts, Vectors, fold, vectors
from latentgnn.core.plan import Plan
from latentgnn.core.records import Gradients
from latentgnn.numerics import to_dtype


@dataclass
class Folding:
    """The matrices that the core multiplies by, and the tensors that they were folded from.

    Args:
        leaves: the layer's tensors, detached: the leaves of autograd's graph.
        folded: the matrices that they were folded into.
        folded_vectors: weights and biases of norms with statistics.
        matrices: ``folded``, detached.
        vectors: ``folded_vectors``, detached.
    """

    leaves: list[Tensor | None]
    folded: Matrices
    folded_vectors: Vectors | None
    matrices: Matrices
    vectors: Vectors | None

    @classmethod
    def of(cls, tensors: Sequence[Tensor | None], needs: Sequence[bool], plan: Plan) -> "Folding":
        """Fold under autograd, with gradients for the tensors that need one."""
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
        """Fold without autograd."""
        parts = Parts.of(tensors, plan)
        folded, folded_vectors = fold(parts, plan), vectors(parts, plan) if plan.takes_statistics else None
        return cls([], folded, folded_vectors, folded, folded_vectors)

    def gradients(self, gradients: Gradients, grad_convs: Sequence[Tensor | None]) -> list[Tensor | None]:
        """Gradients of the layer's tensors, from those of the folded matrices; ``None`` where none is needed."""
        outputs, grads_of_outputs = _folded_gradients(self.folded, self.folded_vectors, grad_convs, gradients)
        wanted = [leaf for leaf in self.leaves if leaf is not None and leaf.requires_grad]
        grads = iter(gradients_of(outputs, wanted, grads_of_outputs))
        return [
            None if leaf is None or not leaf.requires_grad else _as_given(next(grads), leaf) for leaf in self.leaves
        ]


@dataclass
class Mixing:
    """Each kernel's matrix from assignments to features, and what it was computed from.

    Args:
        sums: of values by assignments, (S, G, D, r).
        weights: their divisors, (S, G, D).
        convs: of the graph convolutions.
        to_features: one matrix per kernel, (S, G, r, D_k).
        multiplied: ``to_features``, detached and in the ddtype of the products.
    """

    sums: Tensor
    weights: Tensor
    convs: list[Tensor]
    to_features: list[Tensor]
    multiplied: list[Tensor]

    @classmethod
    def of(cls, sums: Tensor, weights: Tensor, convs: Sequence[Tensor], plan: Plan, *, records: bool) -> "Mixing":
        """Mix; under autograd if ``records``."""
        sums, weights = sums.detach().requires_grad_(records), weights.detach().requires_grad_(records)
        own = [conv.detach().requires_grad_(records) for conv in convs]
        with torch.set_grad_enabled(records), _kept():
            to_features = scatter_matrices(sums, weights, own, plan)
        return cls(sums, weights, own, to_features, [to_dtype(matrix.detach(), plan.compute) for matrix in to_features])

    def gradients(self, grad_features: Sequence[Tensor]) -> tuple[Tensor, Tensor, list[Tensor | None]]:
        """Gradients of the sums, the weights and the graph convolutions, from that of ``to_features``."""
        grad_sums, grad_weights, *grad_convs = gradients_of(
            self.to_features, [self.sums, self.weights, *self.convs], grad_features
        )
        grad_sums = torch.zeros_like(self.sums) if grad_sums is None else grad_sums
        grad_weights = torch.zeros_like(self.weights) if grad_weights is None else grad_weights
        return grad_sums, grad_weights, grad_convs


def _kept() -> saved_tensors_hooks:
    """Override outer saved-tensor hooks: activation checkpointing would run the layer again for each graph."""
    return saved_tensors_hooks(lambda tensor: tensor, lambda tensor: tensor)


def _detached(fields: Sequence[Any]) -> list[Any]:
    """The fields of `Matrices` or `Vectors`, tensors or sequences of them, detached."""
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
    """Gradients of inputs from those of outputs; can be called repeatedly."""
    recorded = [
        (output, to_dtype(grad, output.dtype))
        for output, grad in zip(outputs, grads, strict=True)
        if output.requires_grad
    ]
    if not recorded or not inputs:
        return [None] * len(inputs)
    outputs, grads = zip(*recorded, strict=True)
    return torch.autograd.grad(outputs, inputs, grads, allow_unused=True, retain_graph=True)


def _folded_gradients(
    folded: Matrices,
    folded_vectors: Vectors | None,
    grad_convs: Sequence[Tensor | None],
    gradients: Gradients,
) -> tuple[list[Tensor], list[Tensor]]:
    """The folded tensors in autograd's graph that have gradients, and these gradients."""
    pairs: list[tuple[Tensor | None, Tensor | None]] = []
    if gradients.reduce is not None:
        pairs += _unscaled(gradients.reduce, folded.reduces, folded.reduce_scale)
    if gradients.expand is not None:
        pairs += _unscaled(gradients.expand, [folded.expand], folded.expand_scale)
    assert gradients.assigns is not None
    assert gradients.assign_vectors is not None
    pairs += zip(folded.assigns, gradients.assigns, strict=True)
    pairs += zip(folded.convs, grad_convs, strict=True)
    if folded_vectors is None:
        pairs.append((folded.reduce_shift, gradients.reduce_vectors[1]))
        pairs += zip(folded.assign_shifts, (shift for _, shift in gradients.assign_vectors), strict=True)
        pairs.append((folded.expand_shift, gradients.expand_shift))
        shift_F = gradients.conv_vectors[1]
        if shift_F is not None:
            pairs += zip(folded.conv_shifts, shift_F.chunk(len(folded.conv_shifts)), strict=True)
    else:
        pairs += zip(folded_vectors.reduce, gradients.reduce_vectors, strict=True)
        for vector_pair, grad_pair in zip(folded_vectors.assigns, gradients.assign_vectors, strict=True):
            pairs += zip(vector_pair, grad_pair, strict=True)
        pairs += zip(folded_vectors.conv, gradients.conv_vectors, strict=True)
        pairs += zip(folded_vectors.expand, gradients.expand_vectors, strict=True)
    known = [(output, grad) for output, grad in pairs if output is not None and grad is not None]
    return [output for output, _ in known], [grad for _, grad in known]


def _unscaled(
    grad_RC: Tensor, matrices: Sequence[Tensor], scale_R: Tensor | None
) -> list[tuple[Tensor, Tensor | None]]:
    """Gradients of stacked matrices and of their scale, from that of the scaled matrices.

    By hand and in place, because these are the largest parameters.
    """
    grads = grad_RC.split([matrix.shape[0] for matrix in matrices])
    if scale_R is None:
        return list(zip(matrices, grads, strict=True))
    pairs: list[tuple[Tensor, Tensor | None]] = []
    if scale_R.requires_grad:
        sums = [torch.linalg.vecdot(grad, matrix.detach()) for grad, matrix in zip(grads, matrices, strict=True)]
        pairs.append((scale_R, cat(sums)))
    grad_RC.mul_(scale_R.detach().unsqueeze(1))
    return [*pairs, *zip(matrices, grads, strict=True)]


def _as_given(grad: Tensor | None, leaf: Tensor) -> Tensor:
    return torch.zeros_like(leaf) if grad is None else to_dtype(grad, leaf.dtype)
