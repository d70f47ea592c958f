"""Types, lengths and products that every path computes in the same way."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from latentgnn import launches
from latentgnn.modes import is_eager_on_gpu, is_in_function_transform

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


def inverse_length(x: Tensor, dim: int) -> Tensor:
    """1 / length along `dim`, with `keepdim`, in the wide dtype; 0 with a zero gradient for a zero vector."""
    if is_eager_on_gpu(x):
        return launches.inverse_length(x, dim, wide(x.dtype), EPS)
    if x.stride(dim) == 1 and not _may_be_derived_twice(x):
        return reciprocal(torch.linalg.vector_norm(x, dim=dim, keepdim=True, dtype=wide(x.dtype)))
    # Several times as fast along a strided dimension; and unlike `vector_norm`, it has second derivatives at 0.
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


def sum_in_range(left: Tensor, right: Tensor) -> Tensor:
    """left^T right of float16 tensors, a sum over nodes, in float32.

    The sum over many nodes could overflow float16; the factor 1 / sqrt(nodes) keeps it in range.

    Args:
        left: (..., N, P).
        right: (..., N, Q).
    """
    root = max(left.shape[-2], 1) ** 0.5
    return product(left.mT, right * (1 / root)).float() * root


def row_bound(matrices: Sequence[Tensor]) -> Tensor:
    """The length of the longest row of several matrices, at least 1.

    If they are divided by it, sums over channels do not overflow float16.
    """
    lengths = [torch.linalg.vector_norm(matrix.detach().float(), dim=1).amax() for matrix in matrices]
    return torch.stack(lengths).amax().clamp_min(1)
