"""The three steps of LatentGNN as pure functions of tensors, one equation each.

Axes: B batch, N visible nodes, D latent nodes, R reduced channels. Equations have nodes last, as in docs/layer.md: V is
(R, N), P and Q are (D, N), Z and Y are (D, R). Tensors have them before channels, so that V is ``value_BNR``.

Source: Zhang, Yan, He: "LatentGNN: Learning Efficient Non-local Relations for Visual Recognition", ICML 2019,
arXiv 1905.11634, section 3.
"""

import math
from typing import Literal

import torch
from torch import Tensor

from latentgnn import launches
from latentgnn.modes import is_exporting, is_in_function_transform

NodeScale = Literal["published", "mean"]

EPS = 1e-12


def wide(dtype: torch.dtype) -> torch.dtype:
    """The type for sums over nodes and for norms: float32, or float64 for float64."""
    return dtype if dtype is torch.float64 else torch.float32


def cast(x: Tensor, dtype: torch.dtype) -> Tensor:
    """A tensor in a type; as it is where it has it, without a call."""
    return x if x.dtype == dtype else x.to(dtype)


def reciprocal(size: Tensor) -> Tensor:
    """1 / size, and 0 where size is at most `EPS`: what has no length or no weight stays zero, with zero gradients.

    A division by max(size, EPS) gives the same values, but gradients of 1e12 at an all-zero pixel.
    """
    # Infinity has the reciprocal 0, and lets no gradient through.
    return torch.threshold(size, EPS, math.inf).reciprocal()


def _may_be_derived_twice(x: Tensor) -> bool:
    """Whether autograd records what is done with a tensor, or a transform is active; a compiler has no second pass."""
    if torch.compiler.is_compiling():
        return False
    return (x.requires_grad and torch.is_grad_enabled()) or is_in_function_transform()


def length(x: Tensor, dim: int) -> Tensor:
    """Euclidean length along `dim`, which is kept, in the wide type."""
    if _may_be_derived_twice(x):
        # `vector_norm` has no second derivatives where the length is 0.
        return x.to(wide(x.dtype)).square().sum(dim, keepdim=True).clamp_min((EPS / 2) ** 2).sqrt()
    if x.is_cpu and x.stride(dim) != 1 and not torch.compiler.is_compiling():
        # Several times as fast as `vector_norm` over what lies far apart.
        x = cast(x, wide(x.dtype))
        return (x * x).sum(dim, keepdim=True).sqrt()
    return torch.linalg.vector_norm(x, dim=dim, keepdim=True, dtype=wide(x.dtype))


def inverse_length(x: Tensor, dim: int) -> Tensor:
    """1 / length along `dim`, which is kept, in the wide type; 0 for what has none, with zero gradients."""
    if launches.pay(x):
        return launches.inverse_length(x, dim, wide(x.dtype), EPS)
    if x.stride(dim) == 1 and not _may_be_derived_twice(x):
        return reciprocal(length(x, dim))
    # As in `length`; and it has second derivatives.
    x = cast(x, wide(x.dtype))
    return torch.threshold((x * x).sum(dim, keepdim=True), EPS**2, math.inf).rsqrt()


def l2(x: Tensor, dim: int) -> Tensor:
    """Scale to unit length along `dim`: x / ||x||; a zero vector stays zero.

    Example:
        >>> l2(torch.tensor([[3.0, 4.0], [0.0, 0.0]]), dim=-1)
        tensor([[0.6000, 0.8000],
                [0.0000, 0.0000]])
    """
    if launches.pay(x):
        return launches.unit(x, dim, wide(x.dtype), EPS)
    return cast(x * inverse_length(x, dim), x.dtype)


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
        scale_BD1: what the sums are multiplied by, in the wide type; ``None`` for 1.

    Returns:
        (B, D, R) in the wide type.

    Example:
        >>> gather(torch.ones(1, 5, 2), torch.ones(1, 5, 1))
        tensor([[[5., 5.]]])
    """
    if value_BNR.dtype == assign_BND.dtype and _is_long_sum(assign_BND, value_BNR.shape[-1]):
        sums_BDR = launches.sum_over_nodes(value_BNR, assign_BND)
    elif assign_BND.dtype == torch.float16:
        # A product over many nodes overflows before it is divided by the nodes' weight; 1 / N keeps it in range.
        nodes = max(assign_BND.shape[-2], 1)
        sums_BDR = product(assign_BND.mT, value_BNR * nodes**-0.5).float() * nodes**0.5
    else:
        sums_BDR = product(assign_BND.mT, value_BNR)
    return cast(sums_BDR, wide(value_BNR.dtype)) if scale_BD1 is None else sums_BDR * scale_BD1


def _is_long_sum(assign_BND: Tensor, columns: int) -> bool:
    """Whether a sum over nodes on a GPU is faster in parts, or may leave float16's range in one of the passes."""
    if not launches.pay(assign_BND) or assign_BND.dim() != 3 or assign_BND.dtype == torch.bfloat16:
        return False
    samples, nodes, latents = assign_BND.shape
    return assign_BND.dtype == torch.float16 or launches.parts_of_sum(samples, latents, columns, nodes) > 1


def node_weight(assign_BND: Tensor, *, node_scale: NodeScale) -> Tensor:
    """What `gather`'s sums are divided by, (B, D, 1): the assignment's length over nodes, or its sum for ``mean``."""
    if node_scale == "mean":
        return assign_BND.sum(-2, dtype=wide(assign_BND.dtype)).unsqueeze(-1)
    return length(assign_BND, -2).mT


def inverse_node_weight(assign_BND: Tensor, *, node_scale: NodeScale) -> Tensor:
    """1 / `node_weight`, 0 where that is 0."""
    if node_scale == "published" and launches.pay(assign_BND):
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
    """Each latent takes in the others, Y = A Z: (B, D, R)."""
    return product(affinity(latent_BDR), latent_BDR)


def scatter(latent_BDR: Tensor, assign_BND: Tensor) -> Tensor:
    """Latent to visible, O = Y^T Q: each node sums the latents, weighted by its assignment, (B, N, R).

    Nodes are innermost in memory where they are in the assignments.
    """
    if _is_long_sum(assign_BND, latent_BDR.shape[-1]):
        return launches.spread(latent_BDR, assign_BND)
    latent_BDR = cast(latent_BDR, assign_BND.dtype)
    if is_exporting() or assign_BND.stride(-1) == 1:
        return product(assign_BND, latent_BDR)
    return product(latent_BDR.mT, assign_BND.mT).mT
