"""`latentgnn.tiles` as PyTorch operators, so that autograd, `torch.compile` and `torch.export` know them.

The operators are ``torch.ops.latentgnn.forward`` and ``torch.ops.latentgnn.backward``. They have no second
derivatives: asking for them is an error that says so.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from latentgnn import tiles
from latentgnn.config import LatentGNNConfig
from latentgnn.cost import cost
from latentgnn.functional import wide
from latentgnn.tiles import Plan, Weights

_PLAN = "int groups, int[] latents, bool symmetric, bool graph_conv, bool residual, str node_scale, ScalarType compute"

_library = torch.library.Library("latentgnn", "DEF")
_library.define(
    f"forward(Tensor x, Tensor? mask, Tensor? offsets, Tensor[] weights, {_PLAN}) -> (Tensor, Tensor, Tensor)"
)
_library.define(
    "backward(Tensor grad, Tensor x, Tensor? mask, Tensor? offsets, Tensor[] weights, Tensor sums, Tensor squares, "
    f"bool needs_x, {_PLAN}) -> Tensor[]"
)


def tiled(x_BNC: Tensor, mask_BN: Tensor | None, offsets: Tensor | None, weights: Weights, plan: Plan) -> Tensor:
    """The layer's output, (B, N, C), with the gradients of `latentgnn.tiles`.

    Args:
        x_BNC: input.
        mask_BN: nodes that take part.
        offsets: (S + 1,), where each sample begins among the nodes of a single row, and the end.
        weights: affine tensors.
        plan: of the layer.
    """
    plain = (
        *(plan.groups, list(plan.latents), plan.symmetric, plan.graph_conv),
        *(plan.residual, plan.node_scale, plan.compute),
    )
    return torch.ops.latentgnn.forward(x_BNC, mask_BN, offsets, _distinct(weights, plan), *plain)[0]


def _distinct(weights: Weights, plan: Plan) -> list[Tensor]:
    scatter_assign = None if plan.symmetric else weights.scatter_assign
    tensors = [weights.reduce, weights.gather_assign, scatter_assign, weights.graph_conv, weights.expand]
    return [tensor for tensor in tensors if tensor is not None]


def _weights(tensors: Sequence[Tensor], plan: Plan) -> Weights:
    reduce, gather_assign, *rest = tensors
    scatter_assign = gather_assign if plan.symmetric else rest.pop(0)
    return Weights(reduce, gather_assign, scatter_assign, rest.pop(0) if plan.graph_conv else None, rest.pop(0))


def _plan(groups: int, latents: Sequence[int], *rest: Any) -> Plan:
    return Plan(groups, tuple(latents), *rest)


def _samples(offsets: Tensor | None) -> list[int] | None:
    return None if offsets is None else offsets.tolist()


def _forward(
    x: Tensor, mask: Tensor | None, offsets: Tensor | None, weights: Sequence[Tensor], *plain: Any
) -> tuple[Tensor, Tensor, Tensor]:
    plan = _plan(*plain)
    return tiles.forward(x, mask, _samples(offsets), _weights(weights, plan), plan)


def _fake_forward(
    x: Tensor, mask: Tensor | None, offsets: Tensor | None, weights: Sequence[Tensor], *plain: Any
) -> tuple[Tensor, Tensor, Tensor]:
    samples = x.shape[0] if offsets is None else offsets.shape[0] - 1
    shape = (samples, *weights[1].shape)
    dtype = wide(_plan(*plain).compute)
    return tiles.like_input(x), x.new_empty(shape, dtype=dtype), x.new_empty(shape[:-1], dtype=dtype)


def _backward(
    grad: Tensor,
    x: Tensor,
    mask: Tensor | None,
    offsets: Tensor | None,
    weights: Sequence[Tensor],
    sums: Tensor,
    squares: Tensor,
    needs_x: bool,
    *plain: Any,
) -> list[Tensor]:
    plan = _plan(*plain)
    grad_x, grads = tiles.backward(
        grad, x, mask, _samples(offsets), _weights(weights, plan), sums, squares, plan, needs_x=needs_x
    )
    return [*([] if grad_x is None else [grad_x]), *_distinct(grads, plan)]


def _fake_backward(
    grad: Tensor,
    x: Tensor,
    mask: Tensor | None,
    offsets: Tensor | None,
    weights: Sequence[Tensor],
    sums: Tensor,
    squares: Tensor,
    needs_x: bool,
    *plain: Any,
) -> list[Tensor]:
    return [*([tiles.like_input(x)] if needs_x else []), *(torch.empty_like(weight) for weight in weights)]


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    x, mask, offsets, weights, *plain = inputs
    _, sums, squares = output
    ctx.mark_non_differentiable(sums, squares)
    ctx.save_for_backward(x, mask, offsets, sums, squares, *weights)
    ctx.plain = plain


def _differentiate(ctx: Any, grad: Tensor, _sums: None, _squares: None) -> tuple[Any, ...]:
    x, mask, offsets, sums, squares, *weights = ctx.saved_tensors
    needs_x = ctx.needs_input_grad[0]
    found = torch.ops.latentgnn.backward(grad, x, mask, offsets, weights, sums, squares, needs_x, *ctx.plain)
    grad_x = found[0] if needs_x else None
    return grad_x, None, None, found[-len(weights) :], *[None] * len(ctx.plain)


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


def _count(shape: Sequence[int], weights: Sequence[Sequence[int]], plain: Sequence[Any]) -> tuple[int, int]:
    """Forward and backward operations for shapes of input and weights."""
    plan = _plan(*plain)
    width = weights[0][0] // (1 if plan.symmetric else 2)
    config = LatentGNNConfig(
        channels=shape[2],
        num_latents=plan.latents,
        reduction=shape[2] // width,
        symmetric=plan.symmetric,
        graph_conv=plan.graph_conv,
        num_groups=plan.groups,
    )
    found = cost(config, (shape[0], shape[2], shape[1]))
    return found.forward_operations, found.backward_operations


@register_flop_formula(torch.ops.latentgnn.forward)
def _forward_operations(
    x: Sequence[int], mask: object, offsets: object, weights: Sequence[Sequence[int]], *plain: Any, **_: object
) -> int:
    return _count(x, weights, plain)[0]


@register_flop_formula(torch.ops.latentgnn.backward)
def _backward_operations(
    grad: object,
    x: Sequence[int],
    mask: object,
    offsets: object,
    weights: Sequence[Sequence[int]],
    sums: object,
    squares: object,
    needs_x: bool,
    *plain: Any,
    **_: object,
) -> int:
    return _count(x, weights, plain)[1]
