"""The core as PyTorch operators, for compilers and dispatch modes.

The operators are ``torch.ops.latentgnn.forward`` and ``torch.ops.latentgnn.backward``. They hold
nothing for the backward pass but the input and the latents' sums, and have no second derivatives.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from latentgnn.config import LatentGNNConfig
from latentgnn.core import passes
from latentgnn.core.backward import backward
from latentgnn.core.layouts import empty_like_layout
from latentgnn.core.nodes import bounds_of
from latentgnn.core.plan import SCHEMA, Plan
from latentgnn.cost import cost
from latentgnn.numerics import wide

NO_SECOND_DERIVATIVES = (
    "LatentGNN's fast path has no second derivatives: call the layer inside torch.func.grad or torch.func.vjp, which "
    "take the plain path, or use latentgnn.reference.forward(layer, x)"
)
NO_BATCHED_GRADIENTS = (
    "LatentGNN's fast path takes one gradient at a time: in place of is_grads_batched=True, or vectorize=True in "
    "torch.autograd.functional.jacobian, call torch.func.jacrev or torch.func.vjp, which take the plain path"
)

_library = torch.library.Library("latentgnn", "DEF")
# PyTorch gives gradients to a list of tensors, but not to one that contains ``None``; `present` marks the gaps.
_LAYER = "Tensor x, Tensor? mask, Tensor? offsets, Tensor[] tensors, bool[] present"
_library.define(f"forward({_LAYER}, {SCHEMA}) -> (Tensor, Tensor, Tensor)")
_library.define(
    f"backward(Tensor grad, {_LAYER}, Tensor sums, Tensor weights, bool needs_x, bool[] needs, {SCHEMA}) -> Tensor[]"
)


def _with_gaps(given: Sequence[Any], present: Sequence[bool]) -> list[Any]:
    """Each of `given` where `present` says so, ``None`` elsewhere."""
    values = iter(given)
    return [next(values) if there else None for there in present]


def _forward(
    x: Tensor, mask: Tensor | None, offsets: Tensor | None, given: Sequence[Tensor], present: Sequence[bool], *plan: Any
) -> tuple[Tensor, Tensor, Tensor]:
    tensors, decoded = _with_gaps(given, present), Plan.of(*plan)
    out, state = passes.forward(x, mask, bounds_of(offsets, x), tensors, decoded, keep=False)
    # Outputs of an operator must not share memory, and sums and weights may be parts of one buffer.
    return (
        out,
        state.sums.clone(memory_format=torch.contiguous_format),
        state.weights.clone(memory_format=torch.contiguous_format),
    )


def _fake_forward(
    x: Tensor, mask: Tensor | None, offsets: Tensor | None, given: Sequence[Tensor], present: Sequence[bool], *plan: Any
) -> tuple[Tensor, Tensor, Tensor]:
    decoded = Plan.of(*plan)
    samples = x.shape[0] if offsets is None else offsets.shape[0] - 1
    shape = (samples, decoded.groups, sum(decoded.latents), given[0].shape[0] // decoded.groups)
    dtype = wide(decoded.compute)
    sums, weights = x.new_empty(shape, dtype=dtype), x.new_empty(shape[:-1], dtype=dtype)
    return empty_like_layout(x, x.shape[-1]), sums, weights


def _backward(
    grad: Tensor,
    x: Tensor,
    mask: Tensor | None,
    offsets: Tensor | None,
    given: Sequence[Tensor],
    present: Sequence[bool],
    sums: Tensor,
    weights: Tensor,
    needs_x: bool,
    needs: Sequence[bool],
    *plan: Any,
) -> list[Tensor]:
    tensors, wanted = _with_gaps(given, present), [bool(need) for need in _with_gaps(needs, present)]
    decoded = Plan.of(*plan)
    state = passes.State(sums, weights, [], by_triton=passes.why_not_kernels(x, tensors, decoded) is None)
    with torch.autocast(x.device.type, enabled=False), _above_autograd():
        grad_x, grads = backward(
            grad,
            x,
            mask,
            bounds_of(offsets, x),
            tensors,
            state,
            decoded,
            needs_x=needs_x,
            needs=wanted,
        )
    # Outputs of an operator must not share memory, and have the strides that `_fake_backward` tells.
    copies = [
        torch.empty_like(tensor).copy_(grad)
        for tensor, grad in zip(tensors, grads, strict=True)
        if tensor is not None and grad is not None
    ]
    return copies if grad_x is None else [grad_x, *copies]


@contextmanager
def _above_autograd() -> Iterator[None]:
    """Turn autograd back on: operators run below it, but mixing and folding get their gradients from it."""
    include, exclude = torch._C._dispatch_tls_local_include_set(), torch._C._dispatch_tls_local_exclude_set()
    for name in ("AutogradFunctionality", "ADInplaceOrView", "AutogradOther"):
        exclude = exclude.remove(getattr(torch._C.DispatchKey, name))
    with torch._C._ForceDispatchKeyGuard(include, exclude):
        yield


def _fake_backward(
    grad: Tensor,
    x: Tensor,
    mask: Tensor | None,
    offsets: Tensor | None,
    given: Sequence[Tensor],
    present: Sequence[bool],
    sums: Tensor,
    weights: Tensor,
    needs_x: bool,
    needs: Sequence[bool],
    *plan: Any,
) -> list[Tensor]:
    of_x = [empty_like_layout(x, x.shape[-1])] if needs_x else []
    return of_x + [torch.empty_like(tensor) for tensor, need in zip(given, needs, strict=True) if need]


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    x, mask, offsets, given, ctx.present, *ctx.plan = inputs
    _, sums, weights = output
    ctx.mark_non_differentiable(sums, weights)
    ctx.save_for_backward(x, mask, offsets, sums, weights, *given)


def _differentiate(ctx: Any, grad: Tensor, _sums: None, _weights: None) -> tuple[Any, ...]:
    x, mask, offsets, sums, weights, *given = ctx.saved_tensors
    needs_x, needs = ctx.needs_input_grad[0], list(ctx.needs_input_grad[3])
    grads = iter(
        torch.ops.latentgnn.backward(
            grad, x, mask, offsets, given, ctx.present, sums, weights, needs_x, needs, *ctx.plan
        )
    )
    grad_x = next(grads) if needs_x else None
    return grad_x, None, None, [next(grads) if need else None for need in needs], None, *[None] * len(ctx.plan)


def _no_second_derivative(ctx: Any, *grads: Any) -> Any:
    raise RuntimeError(NO_SECOND_DERIVATIVES)


_library.impl("forward", _forward, "CompositeExplicitAutograd")
_library.impl("backward", _backward, "CompositeExplicitAutograd")
torch.library.register_fake("latentgnn::forward", _fake_forward, lib=_library)
torch.library.register_fake("latentgnn::backward", _fake_backward, lib=_library)
torch.library.register_autograd("latentgnn::forward", _differentiate, setup_context=_save, lib=_library)
torch.library.register_autograd("latentgnn::backward", _no_second_derivative, lib=_library)


def _operations(x: Sequence[int], given: Sequence[Sequence[int]], plan: Plan) -> tuple[int, int]:
    """Forward and backward operations for shapes of the input and of the tensors."""
    config = LatentGNNConfig(
        channels=x[2],
        num_latents=plan.latents,
        reduction=x[2] // given[0][0],
        symmetric=plan.symmetric,
        graph_conv=plan.graph_conv,
        num_groups=plan.groups,
    )
    # An operator holds nothing but its input.
    counted = cost(config, (x[0], x[2], x[1]), held=False)
    return counted.forward_operations, counted.backward_operations


@register_flop_formula(torch.ops.latentgnn.forward)
def _forward_operations(x: Any, mask: Any, offsets: Any, given: Any, present: Any, *plan: Any, **_: object) -> int:
    return _operations(x, given, Plan.of(*plan))[0]


@register_flop_formula(torch.ops.latentgnn.backward)
def _backward_operations(
    grad: Any,
    x: Any,
    mask: Any,
    offsets: Any,
    given: Any,
    present: Any,
    sums: Any,
    weights: Any,
    needs_x: Any,
    needs: Any,
    *plan: Any,
    **_: object,
) -> int:
    return _operations(x, given, Plan.of(*plan))[1]
