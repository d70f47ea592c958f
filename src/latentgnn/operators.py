"""`latentgnn.tiles` as PyTorch operators, so that autograd, `torch.compile` and `torch.export` know them.

The operators are ``torch.ops.latentgnn.forward`` and ``torch.ops.latentgnn.backward``. They have no second
derivatives: asking for them is an error that says so.
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from latentgnn import tiles
from latentgnn.config import LatentGNNConfig
from latentgnn.cost import cost
from latentgnn.folding import Projected, fold, scatter_assigns, shifts_nothing, unfold
from latentgnn.functional import wide
from latentgnn.tiles import Plan

_PLAN = "int groups, int[] latents, bool symmetric, bool graph_conv, bool residual, str node_scale, ScalarType compute"
_LAYER = "Tensor x, Tensor? mask, Tensor? offsets, Tensor[] matrices, Tensor[] scales, Tensor[] shifts"

_library = torch.library.Library("latentgnn", "DEF")
_library.define(f"forward({_LAYER}, {_PLAN}) -> (Tensor, Tensor, Tensor)")
_library.define(
    f"backward(Tensor grad, {_LAYER}, Tensor sums, Tensor squares, bool needs_x, bool needs_shifts, {_PLAN}) -> "
    "(Tensor[], Tensor[], Tensor[], Tensor[])"
)


def tiled(
    x_BNC: Tensor, mask_BN: Tensor | None, offsets: Tensor | None, projected: Sequence[Projected], plan: Plan
) -> Tensor:
    """The layer's output, (B, N, C), with the gradients of `latentgnn.tiles`.

    Args:
        x_BNC: input.
        mask_BN: nodes that take part.
        offsets: (S + 1,), where each sample begins among the nodes of a single row, and the end.
        projected: as `fold` takes it. The matrices are what is kept for the backward pass, not copies of them.
        plan: of the layer.
    """
    plain = (
        *(plan.groups, list(plan.latents), plan.symmetric, plan.graph_conv),
        *(plan.residual, plan.node_scale, plan.compute),
    )
    matrices, scales, shifts = (list(parts) for parts in zip(*projected, strict=True))
    return torch.ops.latentgnn.forward(x_BNC, mask_BN, offsets, matrices, scales, shifts, *plain)[0]


def _plan(groups: int, latents: Sequence[int], *rest: Any) -> Plan:
    return Plan(groups, tuple(latents), *rest)


def check_offsets(offsets: Sequence[int], points: int) -> None:
    """Refuse offsets that leave points out."""
    if offsets[0] != 0 or offsets[-1] != points or any(last < first for first, last in pairwise(offsets)):
        shown = list(offsets) if len(offsets) <= 8 else [*offsets[:4], "...", *offsets[-3:]]
        raise ValueError(f"offsets must rise from 0 to the number of points, {points}; got {shown}")


def _samples(offsets: Tensor | None, x: Tensor) -> list[int] | None:
    if offsets is None:
        return None
    samples = offsets.tolist()
    # The layer checks them too, and adds a leading 0, but cannot where a compiler traces it.
    check_offsets(samples, x.shape[1])
    return samples


def _projected(*parts: Sequence[Tensor]) -> list[Projected]:
    return [Projected(*one) for one in zip(*parts, strict=True)]


def _forward(
    x: Tensor,
    mask: Tensor | None,
    offsets: Tensor | None,
    matrices: Sequence[Tensor],
    scales: Sequence[Tensor],
    shifts: Sequence[Tensor],
    *plain: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    plan, projected = _plan(*plain), _projected(matrices, scales, shifts)
    unshifted = shifts_nothing(projected, plan)
    # The folded matrices have no name here, so that they can go as soon as they are no longer needed.
    return tiles.forward(x, mask, _samples(offsets, x), fold(projected, plan, unshifted=unshifted), plan)


def _fake_forward(
    x: Tensor,
    mask: Tensor | None,
    offsets: Tensor | None,
    matrices: Sequence[Tensor],
    scales: Sequence[Tensor],
    shifts: Sequence[Tensor],
    *plain: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    plan = _plan(*plain)
    samples = x.shape[0] if offsets is None else offsets.shape[0] - 1
    shape = (samples, plan.groups, sum(plan.latents), matrices[0].shape[0] // plan.groups + 1)
    dtype = wide(plan.compute)
    return tiles.like_input(x), x.new_empty(shape, dtype=dtype), x.new_empty(shape[:-1], dtype=dtype)


def _backward(
    grad: Tensor,
    x: Tensor,
    mask: Tensor | None,
    offsets: Tensor | None,
    matrices: Sequence[Tensor],
    scales: Sequence[Tensor],
    shifts: Sequence[Tensor],
    sums: Tensor,
    squares: Tensor,
    needs_x: bool,
    needs_shifts: bool,
    *plain: Any,
) -> tuple[list[Tensor], list[Tensor], list[Tensor], list[Tensor]]:
    plan, projected = _plan(*plain), _projected(matrices, scales, shifts)
    # Who calls for gradients inside autocast still gets them in the types of the forward pass.
    with torch.autocast(x.device.type, enabled=False):
        weights = fold(projected, plan, unshifted=not needs_shifts and shifts_nothing(projected, plan))
        samples = _samples(offsets, x)
        grad_x, grads = tiles.backward(grad, x, mask, samples, weights, sums, squares, plan, needs_x=needs_x)
        found = unfold(grads, projected, plan)
    return (
        [] if grad_x is None else [grad_x],
        [one.matrix for one in found],
        [one.scale for one in found],
        # Views of the sums' gradients would be outputs that share memory.
        [one.shift.clone() for one in found],
    )


def _fake_backward(
    grad: Tensor,
    x: Tensor,
    mask: Tensor | None,
    offsets: Tensor | None,
    matrices: Sequence[Tensor],
    scales: Sequence[Tensor],
    shifts: Sequence[Tensor],
    sums: Tensor,
    squares: Tensor,
    needs_x: bool,
    needs_shifts: bool,
    *plain: Any,
) -> tuple[list[Tensor], list[Tensor], list[Tensor], list[Tensor]]:
    found = [[torch.empty_like(one) for one in parts] for parts in (matrices, scales, shifts)]
    return [tiles.like_input(x)] if needs_x else [], found[0], found[1], found[2]


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    x, mask, offsets, matrices, scales, shifts, *plain = inputs
    _, sums, squares = output
    ctx.mark_non_differentiable(sums, squares)
    ctx.save_for_backward(x, mask, offsets, sums, squares, *matrices, *scales, *shifts)
    ctx.plain = plain


def _differentiate(ctx: Any, grad: Tensor, _sums: None, _squares: None) -> tuple[Any, ...]:
    x, mask, offsets, sums, squares, *rest = ctx.saved_tensors
    count = len(rest) // 3
    parts = (rest[:count], rest[count : 2 * count], rest[2 * count :])
    needs_x = ctx.needs_input_grad[0]
    # Shifts that are to get a gradient count, though they be zero.
    needs_shifts = any(ctx.needs_input_grad[5][scatter_assigns(_plan(*ctx.plain))])
    grad_x, *grads = torch.ops.latentgnn.backward(
        grad, x, mask, offsets, *parts, sums, squares, needs_x, needs_shifts, *ctx.plain
    )
    return grad_x[0] if needs_x else None, None, None, *grads, *[None] * len(ctx.plain)


def _no_second_derivative(ctx: Any, *grads: Any) -> Any:
    raise RuntimeError(
        "LatentGNN's fast path has no second derivatives; use latentgnn.reference.forward(layer, x) where you need them"
    )


_library.impl("forward", _forward, "CompositeExplicitAutograd")
_library.impl("backward", _backward, "CompositeExplicitAutograd")
torch.library.register_fake("latentgnn::forward", _fake_forward, lib=_library)
torch.library.register_fake("latentgnn::backward", _fake_backward, lib=_library)
torch.library.register_autograd("latentgnn::forward", _differentiate, setup_context=_save, lib=_library)
torch.library.register_autograd("latentgnn::backward", _no_second_derivative, lib=_library)


def _count(shape: Sequence[int], matrices: Sequence[Sequence[int]], plain: Sequence[Any]) -> tuple[int, int]:
    """Forward and backward operations for shapes of input and matrices."""
    plan = _plan(*plain)
    config = LatentGNNConfig(
        channels=shape[2],
        num_latents=plan.latents,
        reduction=shape[2] // matrices[0][0],
        symmetric=plan.symmetric,
        graph_conv=plan.graph_conv,
        num_groups=plan.groups,
    )
    found = cost(config, (shape[0], shape[2], shape[1]))
    return found.forward_operations, found.backward_operations


@register_flop_formula(torch.ops.latentgnn.forward)
def _forward_operations(
    x: Sequence[int],
    mask: object,
    offsets: object,
    matrices: Sequence[Sequence[int]],
    scales: object,
    shifts: object,
    *plain: Any,
    **_: object,
) -> int:
    return _count(x, matrices, plain)[0]


@register_flop_formula(torch.ops.latentgnn.backward)
def _backward_operations(
    grad: object,
    x: Sequence[int],
    mask: object,
    offsets: object,
    matrices: Sequence[Sequence[int]],
    scales: object,
    shifts: object,
    sums: object,
    squares: object,
    needs_x: bool,
    needs_shifts: bool,
    *plain: Any,
    **_: object,
) -> int:
    return _count(x, matrices, plain)[1]
