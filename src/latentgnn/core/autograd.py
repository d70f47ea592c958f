"""The core as one autograd function, or as a PyTorch operator under a compiler or a dispatch mode.

Axes: B batch, N nodes, C channels, S samples.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from latentgnn.core import passes
from latentgnn.core.backward import backward
from latentgnn.core.nodes import bounds_of
from latentgnn.core.operators import NO_BATCHED_GRADIENTS, NO_SECOND_DERIVATIVES
from latentgnn.core.plan import Plan
from latentgnn.core.records import Record
from latentgnn.modes import has_values


class BatchStatistics:
    """The batch statistics that a layer's norms took, in the layout of the products before them.

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
        self.expand = record.expanded_statistics or []


def run(
    x_BNC: Tensor, mask_BN: Tensor | None, offsets: Tensor | None, tensors: Sequence[Tensor | None], plan: Plan
) -> tuple[Tensor, BatchStatistics | None]:
    """The layer's output, (B, N, C), and with batch norm in training the batch statistics.

    Args:
        x_BNC: input.
        mask_BN: nodes that take part.
        offsets: (S + 1,), boundaries of the samples in a single row of packed nodes.
        tensors: as `latentgnn.core.parameters.Parts.of` takes them.
        plan: the layer's plan.
    """
    if torch.compiler.is_compiling() or is_in_torch_dispatch_mode() or not has_values(x_BNC):
        given = [tensor for tensor in tensors if tensor is not None]
        present = [tensor is not None for tensor in tensors]
        return torch.ops.latentgnn.forward(x_BNC, mask_BN, offsets, given, present, *plan.arguments())[0], None
    bounds = bounds_of(offsets, x_BNC)
    needs_grad = torch.is_grad_enabled() and any(
        tensor is not None and tensor.requires_grad for tensor in (x_BNC, *tensors)
    )
    if not needs_grad:
        out_BNC, state = passes.forward(x_BNC, mask_BN, bounds, tensors, plan, keep=False)
        return out_BNC, BatchStatistics(state.records[0]) if plan.norm == "batch" else None
    statistics: list[BatchStatistics] = []
    out_BNC = _Core.apply(plan, statistics, mask_BN, bounds, x_BNC, *tensors)
    return out_BNC, statistics[0] if statistics else None


class _Core(torch.autograd.Function):
    """`latentgnn.core` as one node of autograd."""

    @staticmethod
    def forward(
        ctx: Any,
        plan: Plan,
        statistics: list[BatchStatistics],
        mask_BN: Tensor | None,
        bounds: Sequence[int] | None,
        x_BNC: Tensor,
        *tensors: Tensor | None,
    ) -> Tensor:
        out_BNC, state = passes.forward(x_BNC, mask_BN, bounds, tensors, plan, keep=True)
        if plan.norm == "batch":
            statistics.append(BatchStatistics(state.records[0]))
        # Saved through autograd, so that saved-tensor hooks see them and in-place changes between the passes raise.
        held: list[Tensor] = []
        ctx.structure = [record.stored(held) for record in state.records]
        ctx.save_for_backward(x_BNC, mask_BN, state.sums, state.weights, *tensors, *held)
        ctx.plan, ctx.bounds, ctx.count = plan, bounds, len(tensors)
        ctx.folding, ctx.mixing, ctx.by_triton = state.folding, state.mixing, state.by_triton
        return out_BNC

    @staticmethod
    def backward(ctx: Any, grad_BNC: Tensor) -> tuple[Any, ...]:
        if torch._C._functorch.is_legacy_batchedtensor(grad_BNC):
            raise RuntimeError(NO_BATCHED_GRADIENTS)
        x_BNC, mask_BN, sums, weights, *rest = ctx.saved_tensors
        tensors, held = rest[: ctx.count], rest[ctx.count :]
        records = [Record.restored(places, held) for places in ctx.structure]
        needs_x, *needs = ctx.needs_input_grad[4:]
        state = passes.State(sums, weights, records, ctx.folding, ctx.mixing, ctx.by_triton)
        # They hold the folded matrices. Should the graph be retained for one more backward pass, it folds again.
        ctx.folding = ctx.mixing = None
        # A backward pass inside autocast still uses the forward pass's dtypes.
        with torch.no_grad(), torch.autocast(x_BNC.device.type, enabled=False):
            grad_x_BNC, grads = backward(
                grad_BNC,
                x_BNC,
                mask_BN,
                ctx.bounds,
                tensors,
                state,
                ctx.plan,
                needs_x=needs_x,
                needs=needs,
            )
        if torch.is_grad_enabled():
            # With create_graph=True, the gradients are right but cannot be differentiated again.
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
        raise RuntimeError(NO_SECOND_DERIVATIVES)
