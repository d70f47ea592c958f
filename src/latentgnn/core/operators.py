"""The core as PyTorch sees it: a node of autograd in eager mode, operators where a compiler or a dispatch mode traces.

The operators are ``torch.ops.latentgnn.forward`` and ``torch.ops.latentgnn.backward``. Neither way has second
derivatives: asking for them is an error that says so.
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch._subclasses import FakeTensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import is_in_torch_dispatch_mode
from torch.utils.flop_counter import register_flop_formula

from latentgnn.config import LatentGNNConfig
from latentgnn.core import passes
from latentgnn.core.gather import Record
from latentgnn.core.nodes import empty_like_layout
from latentgnn.core.parameters import SCHEMA, Plan
from latentgnn.cost import cost
from latentgnn.functional import wide

_SECOND = (
    "LatentGNN's fast path has no second derivatives: call the layer inside torch.func.grad or torch.func.vjp, which "
    "take the plain path, or use latentgnn.reference.forward(layer, x)"
)

_library = torch.library.Library("latentgnn", "DEF")
# PyTorch passes gradients on to a list of tensors, but not to one with gaps; `present` says where these are.
_LAYER = "Tensor x, Tensor? mask, Tensor? offsets, Tensor[] tensors, bool[] present"
_library.define(f"forward({_LAYER}, {SCHEMA}) -> (Tensor, Tensor, Tensor)")
_library.define(
    f"backward(Tensor grad, {_LAYER}, Tensor sums, Tensor weights, bool needs_x, bool[] needs, {SCHEMA}) -> Tensor[]"
)


class BatchStatistics:
    """What the norms of a layer in training took from the batch, in the layout of the products that they follow.

    Args:
        reduce: of the reductions.
        assigns: of the assignments of each way.
        conv: of the graph convolutions.
        expand: of the expansion.
    """

    def __init__(self, record: Record) -> None:
        self.reduce = record.raw_statistics
        self.assigns = record.assigned_statistics or []
        self.conv = record.convolved_statistics
        self.expand = record.expanded_statistics


def has_values(tensor: Tensor) -> bool:
    """Whether a tensor has numbers: those on the meta device and in FakeTensorMode have only a shape."""
    return not (tensor.is_meta or isinstance(tensor, FakeTensor))


def run(
    x_BNC: Tensor, mask_BN: Tensor | None, offsets: Tensor | None, tensors: Sequence[Tensor | None], plan: Plan
) -> tuple[Tensor, BatchStatistics | None]:
    """The layer's output, (B, N, C), and with batch norm in training what the norms took from the batch.

    Args:
        x_BNC: input.
        mask_BN: nodes that take part.
        offsets: (S + 1,), where each sample begins among the nodes of a single row, and the end.
        tensors: as `latentgnn.core.parameters.Parts.of` takes them.
        plan: of the layer.
    """
    if torch.compiler.is_compiling() or is_in_torch_dispatch_mode() or not has_values(x_BNC):
        given = [tensor for tensor in tensors if tensor is not None]
        present = [tensor is not None for tensor in tensors]
        return torch.ops.latentgnn.forward(x_BNC, mask_BN, offsets, given, present, *plan.arguments())[0], None
    bounds = _bounds(offsets, x_BNC)
    needs_grad = torch.is_grad_enabled() and any(
        tensor is not None and tensor.requires_grad for tensor in (x_BNC, *tensors)
    )
    if not needs_grad:
        out_BNC, state = passes.forward(x_BNC, mask_BN, bounds, tensors, plan, keep=False)
        return out_BNC, BatchStatistics(state.records[0]) if plan.batch_statistics else None
    found: list[BatchStatistics] = []
    out_BNC = _Core.apply(plan, found, mask_BN, bounds, x_BNC, *tensors)
    return out_BNC, found[0] if found else None


class _Core(torch.autograd.Function):
    """`latentgnn.core.passes` as one node of autograd."""

    @staticmethod
    def forward(
        ctx: Any,
        plan: Plan,
        found: list[BatchStatistics],
        mask_BN: Tensor | None,
        bounds: Sequence[int] | None,
        x_BNC: Tensor,
        *tensors: Tensor | None,
    ) -> Tensor:
        out_BNC, state = passes.forward(x_BNC, mask_BN, bounds, tensors, plan, keep=True)
        if plan.batch_statistics:
            found.append(BatchStatistics(state.records[0]))
        # Saved, so that saved-tensor hooks see them, and an operation in place between the passes raises.
        held, ctx.structure = pytree.tree_flatten([vars(record) for record in state.records])
        ctx.save_for_backward(x_BNC, mask_BN, state.sums, state.weights, *tensors, *held)
        ctx.plan, ctx.bounds, ctx.count = plan, bounds, len(tensors)
        return out_BNC

    @staticmethod
    def backward(ctx: Any, grad_BNC: Tensor) -> tuple[Any, ...]:
        x_BNC, mask_BN, sums, weights, *rest = ctx.saved_tensors
        tensors, held = rest[: ctx.count], rest[ctx.count :]
        records = [Record(**fields) for fields in pytree.tree_unflatten(held, ctx.structure)]
        needs_x, *needs = ctx.needs_input_grad[4:]
        # Who calls for gradients inside autocast still gets them in the types of the forward pass.
        with torch.no_grad(), torch.autocast(x_BNC.device.type, enabled=False):
            grad_x_BNC, grads = passes.backward(
                grad_BNC,
                x_BNC,
                mask_BN,
                ctx.bounds,
                tensors,
                passes.State(sums, weights, records),
                ctx.plan,
                needs_x=needs_x,
                needs=needs,
            )
        if torch.is_grad_enabled():
            # With create_graph=True: the gradients are right, but may not be differentiated again.
            known = [grad for grad in (grad_x_BNC, *grads) if grad is not None]
            anchors = [tensor for tensor in (grad_BNC, x_BNC, *tensors) if tensor is not None]
            refused = iter(_Refuse.apply(len(anchors), *anchors, *known)) if known else iter(())
            grad_x_BNC, *grads = [None if grad is None else next(refused) for grad in (grad_x_BNC, *grads)]
        return None, None, None, None, grad_x_BNC, *grads


class _Refuse(torch.autograd.Function):
    """Gradients as they are; differentiating them is an error."""

    @staticmethod
    def forward(ctx: Any, anchors: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(grad.view_as(grad) for grad in tensors[anchors:])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        raise RuntimeError(_SECOND)


def check_offsets(offsets: Sequence[int], points: int) -> None:
    """Refuse offsets that leave points out."""
    if offsets[0] != 0 or offsets[-1] != points or any(last < first for first, last in pairwise(offsets)):
        shown = list(offsets) if len(offsets) <= 8 else [*offsets[:4], "...", *offsets[-3:]]
        raise ValueError(f"offsets must rise from 0 to the number of points, {points}; got {shown}")


def _bounds(offsets: Tensor | None, x_BNC: Tensor) -> list[int] | None:
    if offsets is None:
        return None
    bounds = offsets.tolist()
    # The layer checks them too, and adds a leading 0, but cannot where a compiler traces it.
    check_offsets(bounds, x_BNC.shape[1])
    return bounds


def _with_gaps(given: Sequence[Any], present: Sequence[bool]) -> list[Any]:
    """Each of `given` where `present` says so, ``None`` elsewhere."""
    values = iter(given)
    return [next(values) if there else None for there in present]


def _forward(
    x: Tensor, mask: Tensor | None, offsets: Tensor | None, given: Sequence[Tensor], present: Sequence[bool], *plan: Any
) -> tuple[Tensor, Tensor, Tensor]:
    tensors = _with_gaps(given, present)
    out, state = passes.forward(x, mask, _bounds(offsets, x), tensors, Plan.of(*plan), keep=False)
    return out, state.sums, state.weights


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
    with torch.autocast(x.device.type, enabled=False):
        grad_x, grads = passes.backward(
            grad,
            x,
            mask,
            _bounds(offsets, x),
            tensors,
            passes.State(sums, weights, []),
            Plan.of(*plan),
            needs_x=needs_x,
            needs=wanted,
        )
    # Outputs of an operator must not share memory.
    return [grad for grad in (grad_x, *(None if grad is None else grad.clone() for grad in grads)) if grad is not None]


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
    found = [empty_like_layout(x, x.shape[-1])] if needs_x else []
    return found + [torch.empty_like(tensor) for tensor, need in zip(given, needs, strict=True) if need]


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    x, mask, offsets, given, ctx.present, *ctx.plan = inputs
    _, sums, weights = output
    ctx.mark_non_differentiable(sums, weights)
    ctx.save_for_backward(x, mask, offsets, sums, weights, *given)


def _differentiate(ctx: Any, grad: Tensor, _sums: None, _weights: None) -> tuple[Any, ...]:
    x, mask, offsets, sums, weights, *given = ctx.saved_tensors
    needs_x, needs = ctx.needs_input_grad[0], list(ctx.needs_input_grad[3])
    found = iter(
        torch.ops.latentgnn.backward(
            grad, x, mask, offsets, given, ctx.present, sums, weights, needs_x, needs, *ctx.plan
        )
    )
    grad_x = next(found) if needs_x else None
    return grad_x, None, None, [next(found) if need else None for need in needs], None, *[None] * len(ctx.plan)


def _no_second_derivative(ctx: Any, *grads: Any) -> Any:
    raise RuntimeError(_SECOND)


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
