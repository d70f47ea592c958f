"""The equations in as few calls as possible, for small inputs and GPUs, where calls take much of the time.

Only for one group. Affine norms are folded into the matrices; on a GPU, other norms are one call each. Autograd
computes the gradients.

Axes: B batch, N nodes, C channels, R reduced channels, D latents of one kernel, F features, O rows of matrices.
"""

from collections.abc import Iterator, Sequence
from itertools import accumulate

import torch
from torch import Tensor

from latentgnn import modes
from latentgnn.config import LatentGNNConfig
from latentgnn.core.layouts import cat, cat_nodes, laid_out_like
from latentgnn.functional import gather, mix, scatter
from latentgnn.modes import is_eager_on_gpu, is_transformed
from latentgnn.norms import are_alike, joined_affine
from latentgnn.numerics import l2, to_dtype, wide
from latentgnn.plain.equations import scale_of_sums
from latentgnn.plain.norm_calls import are_single, norm_calls
from latentgnn.plain.samples import outside_unchanged
from latentgnn.plain.steps import (
    SMALL_MATRIX,
    add_,
    apply,
    apply_whole,
    matrices_round_alike,
    rectified_,
    to_unit_length_,
)
from latentgnn.projections import Arrangement


def fits(layer: Arrangement, x_BNC: Tensor, mask_BN: Tensor | None, compute: torch.dtype) -> bool:
    """Whether this module supports the layer and the input, and it pays to use it.

    Args:
        layer: the layer's projections.
        x_BNC: the input, (B, N, C).
        mask_BN: nodes that take part.
        compute: dtype of products over nodes.
    """
    # It makes no sums over processes.
    if layer.ranks is not None or layer.config.num_groups > 1 or is_transformed():
        return False
    if _folds(layer, x_BNC, compute):
        return True
    # Sums over channels may leave float16's range before a norm.
    if not is_eager_on_gpu(x_BNC) or compute == torch.float16:
        return False
    return (mask_BN is None or layer.norm_kind not in ("batch", "group")) and are_single(layer, x_BNC, compute)


def _folds(layer: Arrangement, x_BNC: Tensor, compute: torch.dtype) -> bool:
    """Whether the norms can be folded into the matrices, and it is worth copying the matrices for it.

    It is worth it for small matrices, for at least as many nodes as channels, and on a GPU.
    """
    config, matrix = layer.config, layer.matrices[0]
    if layer.norm_kind != "affine":
        return False
    if not compute == matrix.dtype == x_BNC.dtype == wide(compute):
        return False
    rows = max(config.channels * len(config.latents), *config.latents)
    worth_it = rows * config.reduced_channels <= SMALL_MATRIX or x_BNC.shape[0] * x_BNC.shape[1] >= config.channels
    return (worth_it or modes.is_on_gpu(x_BNC)) and are_alike(layer.norm_columns, layer.eps)


def latent_gnn(layer: Arrangement, x_BNC: Tensor, mask_BN: Tensor | None, compute: torch.dtype) -> Tensor:
    """The layer's output, (B, N, C), for what `fits`.

    Args:
        layer: the layer's projections.
        x_BNC: the input.
        mask_BN: nodes that take part; the others are returned unchanged.
        compute: dtype of products over nodes.
    """
    projections = _Folded(layer) if _folds(layer, x_BNC, compute) else _Normed(layer, compute)
    mask_BN1 = None if mask_BN is None else mask_BN.unsqueeze(-1)
    # Nodes outside the mask may hold NaN.
    inside_BNC = x_BNC if mask_BN1 is None else x_BNC.masked_fill(~mask_BN1, 0)
    contexts = _contexts(layer.config, projections, inside_BNC, mask_BN1)
    out_BNC = projections.added(inside_BNC, cat_nodes(contexts, 2))
    return outside_unchanged(out_BNC, x_BNC, mask_BN)


def _contexts(
    config: LatentGNNConfig, projections: "_Folded | _Normed", inside_BNC: Tensor, mask_BN1: Tensor | None
) -> Sequence[Tensor]:
    """O of each kernel, (B, N, R), or relu(norm(G O)); what else was computed is free then, as in the plain path."""
    values = projections.values(inside_BNC)
    assigns = [projections.rectified(value, config.latents) for value in values]
    contexts: list[Tensor] = []
    for kernel in zip(*assigns, strict=True):
        back_BND = to_unit_length_(kernel[-1])
        assign_BND = back_BND if config.symmetric else kernel[0]
        assign_BND = assign_BND if mask_BN1 is None else assign_BND * mask_BN1
        latent_BDR = gather(values[0], assign_BND, scale_of_sums(config, assign_BND))
        contexts.append(scatter(mix(latent_BDR), back_BND))
    if config.graph_conv:
        contexts = [projections.rectified(context, [config.reduced_channels])[0] for context in contexts]
    return contexts


class _Folded:
    """A layer's projections in order, with the norms folded into the matrices."""

    def __init__(self, layer: Arrangement) -> None:
        self.ways, self.residual, self.products = len(layer.reduces), layer.gamma is not None, _products(layer)

    def values(self, x_BNC: Tensor) -> Sequence[Tensor]:
        """l2(norm(W x)) of each reduction."""
        return to_unit_length_(apply_whole(x_BNC, *next(self.products)).unflatten(-1, (self.ways, -1))).unbind(2)

    def rectified(self, x_BNR: Tensor, sizes: Sequence[int]) -> Sequence[Tensor]:
        """relu(norm(W x)) of several joined matrices with these numbers of rows."""
        return _split(rectified_(apply_whole(x_BNR, *next(self.products))), sizes)

    def added(self, x_BNC: Tensor, context_BNF: Tensor) -> Tensor:
        """x + gamma norm(U f); without a residual connection, norm(U f)."""
        weight_CF, shift_C = next(self.products)
        innermost = x_BNC.stride(-1) != 1 and context_BNF.stride(-1) != 1
        if self.residual and innermost and is_eager_on_gpu(x_BNC) and matrices_round_alike(x_BNC):
            # A convolution's shift, and the sum with x, would each be one more pass over the output.
            weight_BCF = weight_CF.expand(len(x_BNC), -1, -1)
            if shift_C is None:
                return torch.baddbmm(x_BNC.mT, weight_BCF, context_BNF.mT).mT
            return (x_BNC.mT + shift_C.unsqueeze(1)).baddbmm_(weight_BCF, context_BNF.mT).mT
        # A kernel of a single latent may have lost the order of the input's strides.
        out_BNC = laid_out_like(apply_whole(context_BNF, weight_CF, shift_C), x_BNC)
        if not self.residual:
            return out_BNC
        return add_(out_BNC, x_BNC)


class _Normed:
    """A layer's projections in order, with one call for each norm."""

    def __init__(self, layer: Arrangement, compute: torch.dtype) -> None:
        self.gamma, self.compute = layer.gamma, compute
        self.weights, self.norms = _joined_matrices(layer), iter(norm_calls(layer))
        self.ways = len(layer.reduces)

    def values(self, x_BNC: Tensor) -> Sequence[Tensor]:
        """As `_Folded.values`."""
        y, dim = self._product(to_dtype(x_BNC, self.compute))
        parts = [y] if self.ways == 1 else y.chunk(self.ways, dim)
        return [l2(next(self.norms)(part, dim), -1) for part in parts]

    def rectified(self, x_BNR: Tensor, sizes: Sequence[int]) -> Sequence[Tensor]:
        """As `_Folded.rectified`."""
        y, dim = self._product(x_BNR)
        return [torch.relu(next(self.norms)(part, dim)) for part in _split(y, sizes, dim)]

    def added(self, x_BNC: Tensor, context_BNF: Tensor) -> Tensor:
        """As `_Folded.added`."""
        y, dim = self._product(context_BNF)
        out_BNC = laid_out_like(next(self.norms)(y, dim), x_BNC)
        out_BNC = out_BNC if self.gamma is None else torch.addcmul(x_BNC, self.gamma, out_BNC)
        return to_dtype(out_BNC, x_BNC.dtype)

    def _product(self, x_BNC: Tensor) -> tuple[Tensor, int]:
        """W x, and the dimension of its channels: 1 where nodes lie innermost."""
        weight_OC = to_dtype(next(self.weights), self.compute)
        if x_BNC.stride(-1) == 1:
            return apply(x_BNC, weight_OC), 2
        return torch.conv1d(x_BNC.mT, weight_OC.unsqueeze(-1)), 1


def _split(y: Tensor, sizes: Sequence[int], dim: int = -1) -> Sequence[Tensor]:
    return [y] if len(sizes) == 1 else y.split_with_sizes(list(sizes), dim)


def _joined_matrices(layer: Arrangement) -> Iterator[Tensor]:
    """The matrices in the order of the equations; those that are applied to the same tensor are joined."""
    joined = [len(layer.reduces), *map(len, layer.assigns), *[1] * (len(layer.convs) + 1)]
    ends = list(accumulate(joined))
    parts = [layer.matrices[end - count : end] for end, count in zip(ends, joined, strict=True)]
    return iter(cat(part) for part in parts)


def _products(layer: Arrangement) -> Iterator[tuple[Tensor, Tensor | None]]:
    """Matrices and shifts, norms and gamma in them, as `_joined_matrices` has them."""
    weights = list(_joined_matrices(layer))
    if layer.norm_columns[0][0] is None:
        if layer.gamma is not None:
            weights[-1] = weights[-1] * layer.gamma
        return zip(weights, [None] * len(weights), strict=True)
    scale_O, shift_O = joined_affine(layer.norm_columns, layer.eps, weights[0].dtype)
    rows = [weight.shape[0] for weight in weights]
    scales, shifts = list(scale_O.unsqueeze(1).split_with_sizes(rows)), list(shift_O.split_with_sizes(rows))
    if layer.gamma is not None:
        scales[-1], shifts[-1] = scales[-1] * layer.gamma, shifts[-1] * layer.gamma
    return zip(torch._foreach_mul(weights, scales), shifts, strict=True)
