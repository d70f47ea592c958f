"""The three steps of LatentGNN as pure functions of tensors, one equation each.

Axes: B batch, N visible nodes, D latent nodes, R reduced channels. The equations put nodes last, as in docs/layer.md: V
is (R, N), P and Q are (D, N), Z and Y are (D, R). The tensors put nodes before channels: V is ``value_BNR``.

Source: Zhang, Yan, He: "LatentGNN: Learning Efficient Non-local Relations for Visual Recognition", ICML 2019,
arXiv 1905.11634, section 3.
"""

import math
from typing import Literal

import torch
from torch import Tensor

from latentgnn import launches
from latentgnn.modes import is_eager, is_eager_on_gpu, is_exporting
from latentgnn.numerics import EPS, inverse_length, l2, product, reciprocal, sum_in_range, to_dtype, wide

NodeScale = Literal["published", "mean"]


def gather(value_BNR: Tensor, assign_BND: Tensor, scale_BD1: Tensor | None = None) -> Tensor:
    """Visible to latent, Z = P V^T: each latent sums the values of its nodes, weighted by their assignment.

    The sums add up over any partition of the nodes.

    Args:
        value_BNR: values of the visible nodes.
        assign_BND: assignment of each node to each latent, not negative.
        scale_BD1: a factor for the sums, in the wide dtype; ``None`` means 1.

    Returns:
        (B, D, R) in the wide dtype.

    Example:
        >>> gather(torch.ones(1, 5, 2), torch.ones(1, 5, 1))
        tensor([[[5., 5.]]])
    """
    if value_BNR.dtype == assign_BND.dtype and _is_long_sum(assign_BND, value_BNR.shape[-1]):
        sums_BDR = launches.sum_over_nodes(value_BNR, assign_BND)
    elif assign_BND.dtype == torch.float16:
        sums_BDR = sum_in_range(assign_BND, value_BNR)
    else:
        sums_BDR = product(assign_BND.mT, value_BNR)
    return to_dtype(sums_BDR, wide(value_BNR.dtype)) if scale_BD1 is None else sums_BDR * scale_BD1


def _is_long_sum(assign_BND: Tensor, columns: int) -> bool:
    """Whether a sum over nodes may leave float16's range in one of the passes, or is faster in parts, on a GPU."""
    if assign_BND.dim() != 3:
        return False
    if assign_BND.dtype == torch.float16:
        return is_eager(assign_BND)
    if assign_BND.dtype == torch.bfloat16 or not is_eager_on_gpu(assign_BND):
        return False
    samples, nodes, latents = assign_BND.shape
    return launches.parts_of_sum(samples, latents, columns, nodes) > 1


def node_weight(assign_BND: Tensor, *, node_scale: NodeScale) -> Tensor:
    """The sum of each latent's squared assignments, or for ``mean`` of its assignments, (B, D, 1), in the wide dtype.

    Like `gather`'s sums, it adds up over any partition of the nodes.
    """
    wide_BND = to_dtype(assign_BND, wide(assign_BND.dtype))
    return (wide_BND if node_scale == "mean" else wide_BND.square()).sum(-2).unsqueeze(-1)


def scale_of_weight(weight: Tensor, *, node_scale: NodeScale) -> Tensor:
    """The factor of `gather`'s sums, from a `node_weight`: 1 / its root, or for ``mean`` 1 / it; 0 where it is 0."""
    if node_scale == "mean":
        return reciprocal(weight)
    # Not `rsqrt`: parts of the gradient nearly cancel, and its rounding doubles the error that they leave.
    return torch.threshold(weight, EPS**2, math.inf).sqrt().reciprocal()


def latent_scale(assign_BND: Tensor, *, node_scale: NodeScale) -> Tensor:
    """`scale_of_weight` of the `node_weight` of assignments, (B, D, 1); fewer calls without gradients or on a GPU."""
    if node_scale == "published" and (is_eager_on_gpu(assign_BND) or not assign_BND.requires_grad):
        return inverse_length(assign_BND, -2).mT
    return scale_of_weight(node_weight(assign_BND, node_scale=node_scale), node_scale=node_scale)


def affinity(latent_BDR: Tensor) -> Tensor:
    """Latent to latent, A = softmax(z z^T) with z = l2(Z): (B, D, D), each row a distribution.

    Example:
        >>> affinity(torch.ones(1, 2, 3))
        tensor([[[0.5000, 0.5000],
                 [0.5000, 0.5000]]])
    """
    unit_BDR = l2(latent_BDR, dim=-1)
    return torch.softmax(product(unit_BDR, unit_BDR.mT), dim=-1)


def mix(latent_BDR: Tensor) -> Tensor:
    """Each latent becomes a weighted mean of all latents, Y = A Z: (B, D, R)."""
    return product(affinity(latent_BDR), latent_BDR)


def scatter(latent_BDR: Tensor, assign_BND: Tensor) -> Tensor:
    """Latent to visible, O = Y^T Q: each node sums the latents, weighted by its assignment, (B, N, R).

    The result has the memory layout of the assignments: nodes or channels innermost.
    """
    if _is_long_sum(assign_BND, latent_BDR.shape[-1]):
        return launches.spread(latent_BDR, assign_BND)
    latent_BDR = to_dtype(latent_BDR, assign_BND.dtype)
    if is_exporting() or assign_BND.stride(-1) == 1:
        return product(assign_BND, latent_BDR)
    return product(latent_BDR.mT, assign_BND.mT).mT
