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
from latentgnn.modes import is_eager_on_gpu, is_exporting, is_in_function_transform

NodeScale = Literal["published", "mean"]

EPS = 1e-12


def wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype for sums over nodes and for norms: float64 stays float64, everything else is float32."""
    return dtype if dtype is torch.float64 else torch.float32


def to_dtype(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Convert a tensor to a dtype; a tensor that has it already is returned without a call."""
    return x if x.dtype == dtype else x.to(dtype)


def reciprocal(size: Tensor) -> Tensor:
    """1 / size, but 0 with a zero gradient where size is at most `EPS`, so that zero vectors stay zero.

    A division by max(size, EPS) gives the same values, but gradients of 1e12 at an all-zero pixel.
    """
    # `threshold` replaces small sizes by infinity: its reciprocal is 0, and it gets no gradient.
    return torch.threshold(size, EPS, math.inf).reciprocal()


def _may_be_derived_twice(x: Tensor) -> bool:
    """Whether second derivatives may be asked for: autograd records or a transform is active; not under a compiler."""
    if torch.compiler.is_compiling():
        return False
    return (x.requires_grad and torch.is_grad_enabled()) or is_in_function_transform()


def length(x: Tensor, dim: int) -> Tensor:
    """Euclidean length along `dim`, with `keepdim`, in the wide dtype."""
    if _may_be_derived_twice(x):
        # `vector_norm` has no second derivatives where the length is 0.
        return x.to(wide(x.dtype)).square().sum(dim, keepdim=True).clamp_min((EPS / 2) ** 2).sqrt()
    if x.is_cpu and x.stride(dim) != 1 and not torch.compiler.is_compiling():
        # Several times as fast as `vector_norm` along a strided dimension.
        x = to_dtype(x, wide(x.dtype))
        return (x * x).sum(dim, keepdim=True).sqrt()
    return torch.linalg.vector_norm(x, dim=dim, keepdim=True, dtype=wide(x.dtype))


def inverse_length(x: Tensor, dim: int) -> Tensor:
    """1 / length along `dim`, with `keepdim`, in the wide dtype; 0 with a zero gradient for a zero vector."""
    if is_eager_on_gpu(x):
        return launches.inverse_length(x, dim, wide(x.dtype), EPS)
    if x.stride(dim) == 1 and not _may_be_derived_twice(x):
        return reciprocal(length(x, dim))
    # Faster along a strided dimension, as in `length`; and it has second derivatives.
    x = to_dtype(x, wide(x.dtype))
    return torch.threshold((x * x).sum(dim, keepdim=True), EPS**2, math.inf).rsqrt()


def l2(x: Tensor, dim: int) -> Tensor:
    """Scale to unit length along `dim`: x / ||x||; a zero vector stays zero.

    Example:
        >>> l2(torch.tensor([[3.0, 4.0], [0.0, 0.0]]), dim=-1)
        tensor([[0.6000, 0.8000],
                [0.0000, 0.0000]])
    """
    if is_eager_on_gpu(x):
        return launches.unit(x, dim, wide(x.dtype), EPS)
    return to_dtype(x * inverse_length(x, dim), x.dtype)


def product(left: Tensor, right: Tensor) -> Tensor:
    """left right: a matrix product of each graph, (..., P, K) with (..., K, Q)."""
    # A call of `matmul` takes twice as long as one of `bmm`.
    return torch.bmm(left, right) if left.dim() == 3 else torch.matmul(left, right)


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
        # The sum over many nodes would overflow before it is divided; the factor 1 / sqrt(N) keeps it in range.
        nodes = max(assign_BND.shape[-2], 1)
        sums_BDR = product(assign_BND.mT, value_BNR * nodes**-0.5).float() * nodes**0.5
    else:
        sums_BDR = product(assign_BND.mT, value_BNR)
    return to_dtype(sums_BDR, wide(value_BNR.dtype)) if scale_BD1 is None else sums_BDR * scale_BD1


def _is_long_sum(assign_BND: Tensor, columns: int) -> bool:
    """Whether to sum over nodes by `launches`: on a GPU, if cutting the sum is faster or float16 could overflow."""
    if not is_eager_on_gpu(assign_BND) or assign_BND.dim() != 3 or assign_BND.dtype == torch.bfloat16:
        return False
    samples, nodes, latents = assign_BND.shape
    return assign_BND.dtype == torch.float16 or launches.parts_of_sum(samples, latents, columns, nodes) > 1


def node_weight(assign_BND: Tensor, *, node_scale: NodeScale) -> Tensor:
    """The divisor of `gather`'s sums, (B, D, 1): the assignment's length over nodes, or its sum for ``mean``."""
    if node_scale == "mean":
        return assign_BND.sum(-2, dtype=wide(assign_BND.dtype)).unsqueeze(-1)
    return length(assign_BND, -2).mT


def inverse_node_weight(assign_BND: Tensor, *, node_scale: NodeScale) -> Tensor:
    """1 / `node_weight`, 0 where that is 0."""
    if node_scale == "published" and is_eager_on_gpu(assign_BND):
        return inverse_length(assign_BND, -2).mT
    return reciprocal(node_weight(assign_BND, node_scale=node_scale))


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
