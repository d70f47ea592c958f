"""The layer forward: gather over all blocks, mix, scatter over all blocks.

Axes: B batch, N nodes, C channels, S samples, G groups, D latents of all kernels in a group, r channels of a group.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import torch
from torch import Tensor

from latentgnn import kernels
from latentgnn.core.expand import expand
from latentgnn.core.gather import gather_assignments, sums, values
from latentgnn.core.graphs import of_way
from latentgnn.core.layouts import empty_like_layout, side_by_side
from latentgnn.core.nodes import Block, blocks, nodes_per_block
from latentgnn.core.parameters import Matrices
from latentgnn.core.plan import Plan
from latentgnn.core.recorded import Folding, Mixing
from latentgnn.core.records import Record
from latentgnn.core.scatter import features
from latentgnn.functional import cast, wide


@dataclass
class State:
    """What the backward pass starts from, beside input and parameters.

    Args:
        sums: of values by assignments, (S, G, D, r).
        weights: what they are divided by, (S, G, D): sums of squared assignments, or of assignments.
        records: of each block, where they are held.
        folding: with autograd's record, where all is held.
        mixing: likewise.
    """

    sums: Tensor
    weights: Tensor
    records: list[Record]
    folding: Folding | None = None
    mixing: Mixing | None = None


def blocks_of(x_BNC: Tensor, offsets: Sequence[int] | None, matrices: Matrices, plan: Plan) -> list[Block]:
    if plan.norm == "batch":
        return blocks(x_BNC, offsets, None)
    reduced, latents = matrices.reduces[0].shape[0], plan.groups * sum(plan.latents)
    numbers = 3 * reduced + 2 * latents + (x_BNC.shape[2] if plan.norm in ("layer", "rms") else 0)
    most = nodes_per_block(x_BNC.device, numbers)
    if plan.norm == "group":
        # Samples are not cut: the statistics are over all nodes of one.
        largest = x_BNC.shape[1] if offsets is None else max(last - first for first, last in pairwise(offsets))
        most = max(most, largest)
    return blocks(x_BNC, offsets, most)


def _empty_state(
    x_BNC: Tensor, offsets: Sequence[int] | None, matrices: Matrices, plan: Plan, *, sums_follow: bool
) -> State:
    if sums_follow and not (plan.symmetric and plan.node_scale == "published"):
        nothing = x_BNC.new_empty(0)
        return State(nothing, nothing, [])
    samples = x_BNC.shape[0] if offsets is None else len(offsets) - 1
    shape = (samples, plan.groups, sum(plan.latents), matrices.reduces[0].shape[0] // plan.groups)
    dtype = wide(plan.compute)
    return State(x_BNC.new_zeros(shape, dtype=dtype), x_BNC.new_zeros(shape[:-1], dtype=dtype), [])


def input_of(x_BNC: Tensor, block: Block, valid_sT1: Tensor | None, plan: Plan) -> Tensor:
    """A block of the input, or of the output's gradient, in the type and layout of the products.

    There are zeros where nodes take no part: NaN too may be there.
    """
    x_sTC = cast(block.of(x_BNC), plan.compute)
    x_sTC = x_sTC.contiguous() if plan.in_rows else x_sTC
    return x_sTC if valid_sT1 is None else torch.where(valid_sT1, x_sTC, 0)


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
        mask_BN: nodes that take part; the others come back unchanged.
        offsets: where each sample begins among the nodes of a single row, and the end; ``None`` if rows are samples.
        tensors: as `Parts.of` takes them.
        plan: of the layer.
        keep: a backward pass will follow.

    Returns:
        (B, N, C) in the input's type and order of strides; the state, whose records hold what ``plan`` says.
    """
    records = keep and plan.holds
    if records:
        needs = [tensor is not None and tensor.requires_grad for tensor in tensors]
        folding = Folding.of(tensors, needs, plan)
    else:
        folding = Folding.without_record(tensors, plan)
    matrices, norm_vectors = folding.matrices, folding.vectors
    if kernels.why_not_kernels(matrices, plan, keep=keep) is None:
        return _forward_by_kernels(x_BNC, mask_BN, offsets, matrices, plan)
    todo = blocks_of(x_BNC, offsets, matrices, plan)
    # The output may be new memory from a call that adds the input to it.
    alone = len(todo) == 1 and todo[0].whole and plan.residual and x_BNC.dtype == plan.compute
    alone = alone and (x_BNC.shape[0] == 1 or plan.in_rows)
    out_BNC = None if alone else empty_like_layout(x_BNC, x_BNC.shape[-1])
    state = _empty_state(x_BNC, offsets, matrices, plan, sums_follow=len(todo) == 1)
    waiting = []
    for block in todo:
        valid_sT1, record = block.valid(mask_BN), Record()
        memory_sTC = out_BNC if block.whole else None
        x_sTC = side_by_side(input_of(x_BNC, block, valid_sT1, plan), memory_sTC)
        values(block, x_sTC, matrices, norm_vectors, plan, record)
        gather_assignments(block, valid_sT1, matrices, norm_vectors, plan, record)
        sums_SGDr, weights_SGD = sums(block, record, plan)
        if len(todo) == 1:
            state.sums, state.weights = sums_SGDr, state.weights if weights_SGD is None else weights_SGD
        else:
            state.sums[block.samples].add_(sums_SGDr)
            if weights_SGD is not None:
                state.weights[block.samples].add_(weights_SGD)
        waiting.append(record if (keep and plan.holds) or len(todo) == 1 else _for_scatter(record, plan))
    mixing = Mixing.of(state.sums, state.weights, matrices.convs, plan, records=records)
    if records:
        state.folding, state.mixing = folding, mixing
    for block in reversed(todo):  # what was read last may still be in a cache
        valid_sT1, record = block.valid(mask_BN), waiting.pop()
        features(block, valid_sT1, mixing.multiplied, matrices, norm_vectors, plan, record)
        out_sTC = None if out_BNC is None else block.of(out_BNC)
        written_sTC = expand(block, block.of(x_BNC), valid_sT1, matrices, norm_vectors, plan, record, out_sTC)
        out_BNC = written_sTC if out_BNC is None else out_BNC
        if keep or plan.norm == "batch":
            state.records.append(_held(record, plan))
    state.records.reverse()
    assert out_BNC is not None
    return out_BNC, state


def _forward_by_kernels(
    x_BNC: Tensor,
    mask_BN: Tensor | None,
    offsets: Sequence[int] | None,
    matrices: Matrices,
    plan: Plan,
) -> tuple[Tensor, State]:
    """`forward` by Triton kernels; nothing is held but the sums."""
    kernels.require_triton()
    from latentgnn.kernels.steps import Steps

    steps, state = Steps(matrices, plan), _empty_state(x_BNC, offsets, matrices, plan, sums_follow=False)
    out_BNC = empty_like_layout(x_BNC, x_BNC.shape[-1])
    todo = blocks_of(x_BNC, offsets, matrices, plan)
    waiting = []
    for block in todo:
        valid_sT1 = block.valid(mask_BN)
        sums_SGDr, weights_SGD, u_sTR = steps.gather(block, input_of(x_BNC, block, valid_sT1, plan), valid_sT1)
        state.sums[block.samples].add_(sums_SGDr)
        state.weights[block.samples].add_(weights_SGD)
        waiting.append(u_sTR if len(todo) == 1 else u_sTR.clone())
    to_features = Mixing.of(state.sums, state.weights, matrices.convs, plan, records=False).multiplied
    for block in reversed(todo):
        valid_sT1, out_sTC = block.valid(mask_BN), block.of(out_BNC)
        record = Record(feature=steps.scatter(block, waiting.pop(), valid_sT1, to_features, out_sTC))
        expand(block, block.of(x_BNC), valid_sT1, matrices, None, plan, record, out_sTC)
    return out_BNC, state


def _for_scatter(record: Record, plan: Plan) -> Record:
    """What waits for scatter where little is to be held: the values, or in a symmetric layer the assignments."""
    if plan.symmetric:
        return Record(scatter_assign=record.scatter_assign, assign_scales=record.assign_scales)
    assert record.unit is not None
    return Record(unit=of_way(record.unit, 1, plan).clone())


def _held(record: Record, plan: Plan) -> Record:
    if plan.holds:
        return replace(record, raw=None if record.raw_statistics is None else record.raw)
    if plan.norm != "batch":
        return Record(expanded_statistics=record.expanded_statistics)
    return Record(
        raw=record.raw,
        raw_statistics=record.raw_statistics,
        assigned=record.assigned,
        assigned_statistics=record.assigned_statistics,
        convolved=record.convolved,
        convolved_statistics=record.convolved_statistics,
        expanded_statistics=record.expanded_statistics,
    )
