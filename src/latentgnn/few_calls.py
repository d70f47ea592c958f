"""The equations in as few calls as they take, for small inputs and on GPUs, where calls take much of the time.

For one group and norms that are affine maps, which are folded into the matrices. Gradients are autograd's.

Axes: B batch, N nodes, C channels, R reduced channels, D latents of one kernel, O rows of matrices.
"""

from collections.abc import Iterator, Sequence
from itertools import accumulate
from typing import cast

import torch
from torch import Tensor

from latentgnn import launches, modes
from latentgnn.functional import gather, l2, mix, scatter, wide
from latentgnn.modes import is_transformed
from latentgnn.norms import are_alike, joined_affine
from latentgnn.plain import latent_scale
from latentgnn.projections import Arrangement
from latentgnn.steps import SMALL_MATRIX, apply_whole, laid_out_as, matrices_round_alike


def fits(layer: Arrangement, x_BNC: Tensor) -> bool:
    """Whether a layer is of the kind that this module computes, and folding its norms is worth copying its matrices.

    That is so for small matrices, where there are as many nodes as channels, and on a GPU.

    Args:
        layer: its parameters.
        x_BNC: the input, (B, N, C), whose type is that of the products.
    """
    config, matrix = layer.config, layer.tensors[0]
    if layer.norm_kind != "affine" or config.num_groups > 1 or is_transformed():
        return False
    if matrix is None or not matrix.dtype == x_BNC.dtype == wide(x_BNC.dtype):  # as under autocast
        return False
    rows = max(config.channels * len(config.latents), *config.latents)
    worth_it = rows * config.reduced_channels <= SMALL_MATRIX or x_BNC.shape[0] * x_BNC.shape[1] >= config.channels
    return (worth_it or modes.is_on_gpu(x_BNC)) and are_alike(_norm_columns(layer), layer.eps)


def _norm_columns(layer: Arrangement) -> list[list[Tensor | None]]:
    return [layer.tensors[place::5] for place in range(1, 5)]


def latent_gnn(layer: Arrangement, x_BNC: Tensor, mask_BN: Tensor | None = None) -> Tensor:
    """The layer's output, (B, N, C), for the nodes of an input in the type of the weights.

    Args:
        layer: its parameters.
        x_BNC: the input.
        mask_BN: nodes that take part; the others come back unchanged.
    """
    config, products = layer.config, _products(layer)
    latents, ways = config.latents, len(layer.reduces)
    mask_BN1 = None if mask_BN is None else mask_BN.unsqueeze(-1)
    # NaN too may be where nodes take no part.
    inside_BNC = x_BNC if mask_BN1 is None else x_BNC.masked_fill(~mask_BN1, 0)
    values = l2(apply_whole(inside_BNC, *next(products)).unflatten(-1, (ways, -1)), -1).unbind(2)
    assigns = []
    for value in values:
        assign = torch.relu(apply_whole(value, *next(products)))
        assigns.append([assign] if len(latents) == 1 else assign.split_with_sizes(latents, -1))
    contexts = []
    for kernel in zip(*assigns, strict=True):
        back_BND = l2(kernel[-1], -1)
        assign_BND = back_BND if config.symmetric else kernel[0]
        assign_BND = assign_BND if mask_BN1 is None else assign_BND * mask_BN1
        latent_BDR = gather(values[0], assign_BND)
        scale_BD1 = latent_scale(config, assign_BND)
        contexts.append(scatter(mix(latent_BDR if scale_BD1 is None else latent_BDR * scale_BD1), back_BND))
    if config.graph_conv:
        contexts = [torch.relu(apply_whole(context, *next(products))) for context in contexts]
    out_BNC = _expanded(_beside(contexts), *next(products), inside_BNC, residual=layer.gamma is not None)
    return out_BNC if mask_BN1 is None else torch.where(mask_BN1, out_BNC, x_BNC)


def _expanded(
    context_BNF: Tensor, weight_CF: Tensor, shift_C: Tensor | None, x_BNC: Tensor, *, residual: bool
) -> Tensor:
    """U f + shift, and x where the layer has a residual connection."""
    innermost = x_BNC.stride(-1) != 1 and context_BNF.stride(-1) != 1
    if residual and innermost and launches.pay(x_BNC) and matrices_round_alike(x_BNC):
        # A convolution's shift and the sum would each be a pass over the output.
        weight_BCF = weight_CF.expand(len(x_BNC), -1, -1)
        if shift_C is None:
            return torch.baddbmm(x_BNC.mT, weight_BCF, context_BNF.mT).mT
        return (x_BNC.mT + shift_C.unsqueeze(1)).baddbmm_(weight_BCF, context_BNF.mT).mT
    # A kernel of a single latent may have lost the order of the input's strides.
    out_BNC = laid_out_as(x_BNC, apply_whole(context_BNF, weight_CF, shift_C))
    return x_BNC + out_BNC if residual else out_BNC


def _beside(parts_BNR: Sequence[Tensor]) -> Tensor:
    """Parts one after the other in the last dimension, in their own layout."""
    if len(parts_BNR) == 1:
        return parts_BNR[0]
    if parts_BNR[0].stride(-1) == 1:
        return torch.cat(list(parts_BNR), -1)
    return torch.cat([part.mT for part in parts_BNR], 1).mT


def _products(layer: Arrangement) -> Iterator[tuple[Tensor, Tensor | None]]:
    """Matrices and shifts, norms and gamma in them, in the order of the equations; joined where they see the same."""
    matrices = cast(list[Tensor], layer.tensors[::5])
    joined = [len(layer.reduces), *map(len, layer.assigns), *[1] * (len(layer.convs) + 1)]
    ends = list(accumulate(joined))
    parts = [matrices[end - count : end] for end, count in zip(ends, joined, strict=True)]
    weights = [part[0] if len(part) == 1 else torch.cat(part) for part in parts]
    if layer.tensors[1] is None:
        if layer.gamma is not None:
            weights[-1] = weights[-1] * layer.gamma
        return zip(weights, [None] * len(weights), strict=True)
    scale_O, shift_O = joined_affine(_norm_columns(layer), layer.eps, weights[0].dtype)
    rows = [weight.shape[0] for weight in weights]
    scales, shifts = list(scale_O.unsqueeze(1).split_with_sizes(rows)), list(shift_O.split_with_sizes(rows))
    if layer.gamma is not None:
        scales[-1], shifts[-1] = scales[-1] * layer.gamma, shifts[-1] * layer.gamma
    return zip(torch._foreach_mul(weights, scales), shifts, strict=True)
