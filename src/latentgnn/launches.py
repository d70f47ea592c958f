"""Equations that a GPU computes in fewer kernel launches than their single operations would need.

Launching a small operation takes longer than computing it, in both passes. Each class here is one autograd function
with a hand-written backward pass, which can be differentiated again. `latentgnn.functional` uses them
where `latentgnn.modes.is_eager_on_gpu` says so.

Axes: B batch, N visible nodes, D latent nodes, R reduced channels.
"""

import math
from typing import Any

import torch
from torch import Tensor

# A sum over many nodes with a small output keeps few multiprocessors busy: cuBLAS gives an output tile to each and does
# not split float32 sums. It is cut into enough parts for about `_TILES` tiles of `_TILE` x `_TILE` outputs, each part
# with at least `_FEWEST_NODES` nodes. Uncut, the product of 150 x 16800 by 16800 x 64 for two samples took 507 of the
# 1007 microseconds of a layer's forward pass on an H100.
_TILES = 128
_TILE = 64
_FEWEST_NODES = 512


def parts_of_sum(samples: int, rows: int, columns: int, nodes: int) -> int:
    """Into how many parts a GPU should cut a sum over nodes, for an output of rows x columns per sample.

    Example:
        >>> parts_of_sum(2, 150, 64, 16800), parts_of_sum(32, 150, 64, 16800), parts_of_sum(8, 100, 64, 196)
        (21, 1, 1)
    """
    tiles = samples * -(-rows // _TILE) * -(-columns // _TILE)
    most = min(_TILES // tiles, nodes // _FEWEST_NODES) if tiles else 1
    if most < 2:
        return 1
    # Prefer a number of parts that divides the nodes, so that there is no remainder.
    return next((parts for parts in range(most, most // 2, -1) if nodes % (4 * parts) == 0), most)


def unit(x: Tensor, dim: int, dtype: torch.dtype, eps: float) -> Tensor:
    """x / ||x|| along a dimension, 0 where the length is at most ``eps``; lengths are computed in ``dtype``."""
    y: Tensor = _Unit.apply(x, dim, dtype, eps)[0]
    return y


def inverse_length(x: Tensor, dim: int, dtype: torch.dtype, eps: float) -> Tensor:
    """1 / ||x|| along a dimension, which is kept, in ``dtype``; 0 where the length is at most ``eps``."""
    inverse: Tensor = _InverseLength.apply(x, dim, dtype, eps)
    return inverse


def sum_over_nodes(value_BNR: Tensor, assign_BND: Tensor) -> Tensor:
    """P V^T, (B, D, R), in float32 at least, cut into `parts_of_sum`."""
    z: Tensor = _SumOverNodes.apply(value_BNR, assign_BND)
    return z


def spread(latent_BDR: Tensor, assign_BND: Tensor) -> Tensor:
    """Y^T Q, (B, N, R), in the type of Q; the gradient of Y is a `sum_over_nodes`."""
    o: Tensor = _Spread.apply(latent_BDR, assign_BND)
    return o


def _in_type(name: str, x: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    """A product or quotient in a dtype; unless autograd records, rounded in the same launch."""
    operation = getattr(torch, name)
    if x.dtype == factor.dtype == dtype or torch.is_grad_enabled():
        result: Tensor = operation(x, factor)
        return result if result.dtype == dtype else result.to(dtype)
    out: Tensor = operation(x, factor, out=torch.empty_like(x, dtype=dtype))
    return out


def _threshold_length(x: Tensor, dim: int, dtype: torch.dtype, eps: float) -> Tensor:
    # Dividing by infinity gives 0, without a gradient.
    length = torch.linalg.vector_norm(x, dim=dim, keepdim=True, dtype=dtype)
    return torch.threshold(length, eps, math.inf)


class _Unit(torch.autograd.Function):
    """x / ||x|| and ||x||, infinite for a zero vector. Both are outputs, so that they can be differentiated again."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, dim: int, dtype: torch.dtype, eps: float) -> tuple[Tensor, Tensor]:
        length = _threshold_length(x, dim, dtype, eps)
        y = _in_type("div", x, length, x.dtype)
        ctx.dim = dim
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(y, length)
        return y, length

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor | None, grad_length: Tensor | None) -> tuple[Tensor | None, None, None, None]:
        y, length = ctx.saved_tensors
        grad = None
        if grad_y is not None:
            along = (grad_y * y).sum(ctx.dim, keepdim=True, dtype=length.dtype)
            grad = _in_type("div", torch.addcmul(grad_y, y, along, value=-1), length, y.dtype)
        if grad_length is not None:
            more = (grad_length * y).to(y.dtype)
            grad = more if grad is None else grad + more
        return grad, None, None, None


class _InverseLength(torch.autograd.Function):
    """1 / ||x||."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, dim: int, dtype: torch.dtype, eps: float) -> Tensor:
        inverse = _threshold_length(x, dim, dtype, eps).reciprocal_()
        ctx.save_for_backward(x, inverse)
        return inverse

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        x, inverse = ctx.saved_tensors
        return _in_type("mul", x, (grad * inverse.pow(3)).neg(), x.dtype), None, None, None


class _SumOverNodes(torch.autograd.Function):
    """P V^T."""

    @staticmethod
    def forward(ctx: Any, value_BNR: Tensor, assign_BND: Tensor) -> Tensor:
        ctx.save_for_backward(value_BNR, assign_BND)
        return _sum(value_BNR, assign_BND)

    @staticmethod
    def backward(ctx: Any, grad_BDR: Tensor) -> tuple[Tensor | None, Tensor | None]:
        value_BNR, assign_BND = ctx.saved_tensors
        needs_value, needs_assign = ctx.needs_input_grad
        grad_value = spread(grad_BDR, assign_BND) if needs_value else None
        return grad_value, spread(grad_BDR.mT, value_BNR) if needs_assign else None


class _Spread(torch.autograd.Function):
    """Y^T Q, with nodes innermost in memory where they are in Q."""

    @staticmethod
    def forward(ctx: Any, latent_BDR: Tensor, assign_BND: Tensor) -> Tensor:
        ctx.save_for_backward(latent_BDR, assign_BND)
        latent_BDR = latent_BDR.to(assign_BND.dtype)
        if assign_BND.stride(-1) == 1:
            return torch.bmm(assign_BND, latent_BDR)
        # Not a view: autograd would forbid changing it in place.
        out = latent_BDR.new_empty(len(latent_BDR), latent_BDR.shape[2], assign_BND.shape[1]).mT
        torch.bmm(latent_BDR.mT, assign_BND.mT, out=out.mT)
        return out

    @staticmethod
    def backward(ctx: Any, grad_BNR: Tensor) -> tuple[Tensor | None, Tensor | None]:
        latent_BDR, assign_BND = ctx.saved_tensors
        needs_latent, needs_assign = ctx.needs_input_grad
        grad_latent = sum_over_nodes(grad_BNR, assign_BND).to(latent_BDR.dtype) if needs_latent else None
        return grad_latent, spread(latent_BDR.mT, grad_BNR) if needs_assign else None


def _sum(value_BNR: Tensor, assign_BND: Tensor) -> Tensor:
    samples, nodes, columns = value_BNR.shape
    if value_BNR.dtype == torch.float16:
        # The sum itself could overflow float16.
        scale = max(nodes, 1) ** 0.5
        return torch.bmm(assign_BND.mT, value_BNR / scale).float() * scale
    parts = parts_of_sum(samples, assign_BND.shape[2], columns, nodes)
    if parts == 1:
        return torch.bmm(assign_BND.mT, value_BNR)
    length = nodes // parts
    # A view where channels lie innermost or there is one sample, a copy otherwise.
    value, assign = (
        x[:, : parts * length].unflatten(1, (parts, length)).flatten(0, 1) for x in (value_BNR, assign_BND)
    )
    sums_BDR = torch.bmm(assign.mT, value).unflatten(0, (samples, parts)).sum(1)
    if parts * length < nodes:
        sums_BDR = sums_BDR.baddbmm_(assign_BND[:, parts * length :].mT, value_BNR[:, parts * length :])
    return sums_BDR
