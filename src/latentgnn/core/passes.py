"""The layer forward: gather over all blocks, mix, scatter over all blocks.

Axes: B batch, N nodes, C channels, S samples, G groups, D latents of all kernels in a group, r channels of a group.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from latentgnn import kernels
from latentgnn.core.folding import Folding, Mixing
from latentgnn.core.gather_nodes import gather_nodes
from latentgnn.core.inputs import Input
from latentgnn.core.layouts import empty_like_layout, is_plain, nodes_innermost
from latentgnn.core.over_ranks import over_ranks
from latentgnn.core.plan import Plan
from latentgnn.core.records import Record
from latentgnn.core.scatter_nodes import scatter_nodes
from latentgnn.numerics import l2


@dataclass
class State:
    """What the backward pass needs besides input and parameters.

    Args:
        sums: of values by assignments, (S, G, D, r).
        weights: their divisors, (S, G, D): sums of squared assignments, or of assignments.
        records: one per block, if held.
        folding: with autograd's graph, if everything is held.
        mixing: the same.
        by_triton: Triton kernels computed it; ``sums`` are the latents Z then, already divided by the weights.
    """

    sums: Tensor
    weights: Tensor
    records: list[Record]
    folding: Folding | None = None
    mixing: Mixing | None = None
    by_triton: bool = False


def forward(
    x_BNC: Tensor,
    mask_BN: Tensor | None,
    offsets: Sequence[int] | None,
    tensors: Sequence[Tensor | None],
    plan: Plan,
    *,
    keep: bool,
) -> tuple[Tensor, State]:
    """The layer's output, and what its backward pass starts from.

    Args:
        x_BNC: input; a transposed view is as good as a contiguous tensor.
        mask_BN: nodes that take part; the others are returned unchanged.
        offsets: boundaries of the samples in a single row of packed nodes; ``None`` if each row is a sample.
        tensors: as `Parts.of` takes them.
        plan: the layer's plan.
        keep: a backward pass will follow.

    Returns:
        (B, N, C) in the input's type and order of strides; the state, whose records hold what ``plan`` says.
    """
    if why_not_kernels(x_BNC, tensors, plan) is None:
        return _forward_by_kernels(x_BNC, mask_BN, offsets, tensors, plan, keep=keep)
    holds = keep and plan.holds
    if holds:
        needs = [tensor is not None and tensor.requires_grad for tensor in tensors]
        folding = Folding.of(tensors, needs, plan)
    else:
        folding = Folding.without_record(tensors, plan)
    matrices, vectors = folding.matrices, folding.vectors
    given = Input.of(x_BNC, mask_BN, offsets, matrices, plan)
    matrices = matrices.for_nodes(x_BNC.shape[0] * x_BNC.shape[1], plan)
    # One call may add the input and allocate the output.
    alone = given.is_one_block and plan.residual and x_BNC.dtype == plan.compute
    alone = alone and (x_BNC.shape[0] == 1 or plan.in_rows or not nodes_innermost(x_BNC))
    out_BNC = None if alone else empty_like_layout(x_BNC, x_BNC.shape[-1])
    gathered = gather_nodes(given, matrices, vectors, plan, holds=holds, memory_BNC=out_BNC)
    sums, weights = over_ranks([gathered.sums, gathered.weights], plan)
    mixing = Mixing.of(sums, weights, matrices.convs, plan, records=holds)
    out_BNC, records = scatter_nodes(
        given, gathered.waiting, mixing.multiplied, matrices, vectors, plan, keep=keep, out_BNC=out_BNC
    )
    state = State(sums, weights, records)
    if holds:
        state.folding, state.mixing = folding, mixing
    return out_BNC, state


def why_not_kernels(x_BNC: Tensor, tensors: Sequence[Tensor | None], plan: Plan) -> str | None:
    """Why `latentgnn.kernels` do not run for an input; ``None`` where they do.

    Args:
        x_BNC: input.
        tensors: as `forward` takes them.
        plan: the layer's plan.
    """
    matrix = tensors[0]
    assert matrix is not None
    if not all(is_plain(tensor) for tensor in (x_BNC, *tensors) if tensor is not None):
        return "tensors are of a kind that Triton does not know"
    width = matrix.shape[0] // plan.groups
    why_not = kernels.why_not_layer(
        x_BNC.device,
        plan.compute,
        latents=plan.latents,
        width=width,
        groups=plan.groups,
        symmetric=plan.symmetric,
        norm=plan.norm,
        shared=bool(plan.group),
    )
    return why_not or kernels.why_not_device(x_BNC.device, plan.compute, width)


def _forward_by_kernels(
    x_BNC: Tensor,
    mask_BN: Tensor | None,
    offsets: Sequence[int] | None,
    tensors: Sequence[Tensor | None],
    plan: Plan,
    *,
    keep: bool,
) -> tuple[Tensor, State]:
    """`forward` by Triton kernels."""
    from latentgnn.kernels import passes

    out_BNC, saved = passes.forward(x_BNC, mask_BN, offsets, tensors, plan)
    records = []
    if keep and plan.holds:
        records = [Record(raw=saved.raw, unit=saved.unit, to_feature=saved.to_feature, feature=saved.feature)]
    return out_BNC, State(saved.latent.unsqueeze(1), saved.weights.unsqueeze(1), records, by_triton=True)


def backward_by_kernels(
    grad_BNC: Tensor,
    x_BNC: Tensor,
    mask_BN: Tensor | None,
    offsets: Sequence[int] | None,
    tensors: Sequence[Tensor | None],
    state: State,
    plan: Plan,
    *,
    needs_x: bool,
    needs: Sequence[bool],
) -> tuple[Tensor | None, list[Tensor | None]]:
    """`latentgnn.core.backward.backward` by Triton kernels."""
    from latentgnn.kernels import passes

    record, latent_SDR = state.records[0] if state.records else Record(), state.sums.squeeze(1)
    unit_SDR = l2(latent_SDR, -1) if record.unit is None else record.unit
    saved = passes.Saved(latent_SDR, unit_SDR, state.weights.squeeze(1), record.to_feature, record.raw, record.feature)
    return passes.backward(grad_BNC, x_BNC, mask_BN, offsets, tensors, saved, plan, needs_x=needs_x, needs=needs)
