"""`latentgnn.tiles` as PyTorch operators, so that autograd, `torch.compile` and `torch.export` know them.

The operators are ``torch.ops.latentgnn.forward`` and ``torch.ops.latentgnn.backward``. They have no second
derivatives: asking for them is an error that says so.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from latentgnn import tiles
from latentgnn.config import LatentGNNConfig
from latentgnn.cost import cost
from latentgnn.functional import wide
from latentgnn.tiles import Plan, Weights, rows

_PLAN = "int groups, int[] latents, bool symmetric, bool graph_conv, bool residual, str node_scale, ScalarType compute"
_LAYER = "Tensor x, Tensor? mask, Tensor? offsets, Tensor[] matrices, Tensor[] scales, Tensor[] shifts"

_library = torch.library.Library("latentgnn", "DEF")
_library.define(f"forward({_LAYER}, {_PLAN}) -> (Tensor, Tensor, Tensor)")
_library.define(
    f"backward(Tensor grad, {_LAYER}, Tensor sums, Tensor squares, bool needs_x, {_PLAN}) -> "
    "(Tensor[], Tensor[], Tensor[], Tensor[])"
)


class Projected(NamedTuple):
    """What a matrix and the norm after it do: x to (matrix x) * scale + shift."""

    matrix: Tensor
    scale: Tensor
    shift: Tensor


def tiled(
    x_BNC: Tensor, mask_BN: Tensor | None, offsets: Tensor | None, projected: Sequence[Projected], plan: Plan
) -> Tensor:
    """The layer's output, (B, N, C), with the gradients of `latentgnn.tiles`.

    Args:
        x_BNC: input.
        mask_BN: nodes that take part.
        offsets: (S + 1,), where each sample begins among the nodes of a single row, and the end.
        projected: the reduction of gather and, unless symmetric, of scatter; the assignments of gather, and unless
            symmetric of scatter, of every kernel; the graph convolution of every kernel, if there are any; the
            expansion. The matrices are what is kept for the backward pass, not copies of them.
        plan: of the layer.
    """
    plain = (
        *(plan.groups, list(plan.latents), plan.symmetric, plan.graph_conv),
        *(plan.residual, plan.node_scale, plan.compute),
    )
    matrices, scales, shifts = (list(parts) for parts in zip(*projected, strict=True))
    return torch.ops.latentgnn.forward(x_BNC, mask_BN, offsets, matrices, scales, shifts, *plain)[0]


def fold(projected: Sequence[Projected], plan: Plan) -> Weights:
    """The matrices with scales and shifts in them."""
    dtype, ways, kernels = wide(plan.compute), 1 if plan.symmetric else 2, len(plan.latents)
    rest = [Projected(*(part.to(dtype) for part in one)) for one in projected]
    reduces, assigns = rest[:ways], rest[ways : ways + ways * kernels]
    convs, expand = rest[ways + ways * kernels : -1], rest[-1]

    def affine(one: Projected) -> Tensor:
        return torch.cat([one.matrix * one.scale.unsqueeze(1), one.shift.unsqueeze(1)], 1)

    def of_groups(parts: Sequence[Projected]) -> list[Tensor]:
        return [affine(one).unflatten(0, (plan.groups, -1)) for one in parts]

    down = _down(reduces, plan)
    expand_CF = rows((expand.matrix.shape[0], expand.matrix.shape[1] + 1), expand.matrix, dtype)
    torch.mul(expand.matrix, expand.scale.unsqueeze(1), out=expand_CF[:, :-1])
    expand_CF[:, -1] = expand.shift
    gather_assign = torch.cat(of_groups(assigns[:kernels]), 1)
    return Weights(
        reduce=torch.cat([(one.matrix * (one.scale * down).unsqueeze(1)).to(plan.compute) for one in reduces]),
        reduce_shift=torch.cat([one.shift * down for one in reduces]).to(plan.compute),
        gather_assign=gather_assign,
        scatter_assign=gather_assign if plan.symmetric else torch.cat(of_groups(assigns[kernels:]), 1),
        graph_conv=torch.stack(of_groups(convs)) if convs else None,
        expand=expand_CF,
    )


def _down(reduces: Sequence[Projected], plan: Plan) -> Tensor | float:
    """Rows longer than 1 may take a sum over channels out of float16's range; unit length comes next anyway."""
    if plan.compute != torch.float16:
        return 1.0
    lengths = [torch.linalg.vector_norm(one.matrix.float(), dim=1) * one.scale.float().abs() for one in reduces]
    return torch.cat(lengths).amax().clamp_min(1).reciprocal()


def _unfold(grads: Weights, projected: Sequence[Projected], plan: Plan) -> list[Projected]:
    """From the gradients of what `fold` gives to those of what it takes."""
    ways = 1 if plan.symmetric else 2
    down = _down([Projected(*(part.to(grads.reduce.dtype) for part in one)) for one in projected[:ways]], plan)
    pairs = list(zip((grads.reduce * down).chunk(ways), (grads.reduce_shift * down).chunk(ways), strict=True))
    assigns = [grads.gather_assign] if plan.symmetric else [grads.gather_assign, grads.scatter_assign]
    affines = [part.flatten(0, 1) for assign in assigns for part in assign.split(list(plan.latents), 1)]
    if grads.graph_conv is not None:
        affines += [part.flatten(0, 1) for part in grads.graph_conv]
    pairs += [(affine[:, :-1], affine[:, -1]) for affine in (*affines, grads.expand)]
    found = []
    for one, (matrix, shift) in zip(projected, pairs, strict=True):
        scale = (matrix * one.matrix).sum(1)
        parts = (matrix * one.scale.to(matrix.dtype).unsqueeze(1), scale, shift)
        found.append(Projected(*(part.to(like.dtype) for part, like in zip(parts, one, strict=True))))
    return found


def _plan(groups: int, latents: Sequence[int], *rest: Any) -> Plan:
    return Plan(groups, tuple(latents), *rest)


def _samples(offsets: Tensor | None) -> list[int] | None:
    return None if offsets is None else offsets.tolist()


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
    plan = _plan(*plain)
    return tiles.forward(x, mask, _samples(offsets), fold(_projected(matrices, scales, shifts), plan), plan)


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
    *plain: Any,
) -> tuple[list[Tensor], list[Tensor], list[Tensor], list[Tensor]]:
    plan, projected = _plan(*plain), _projected(matrices, scales, shifts)
    grad_x, grads = tiles.backward(
        grad, x, mask, _samples(offsets), fold(projected, plan), sums, squares, plan, needs_x=needs_x
    )
    found = _unfold(grads, projected, plan)
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
    grad_x, *grads = torch.ops.latentgnn.backward(grad, x, mask, offsets, *parts, sums, squares, needs_x, *ctx.plain)
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
    *plain: Any,
    **_: object,
) -> int:
    return _count(x, matrices, plain)[1]
