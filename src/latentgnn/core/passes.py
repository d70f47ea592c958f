"""The layer forward and backward: gather over all blocks, mix, scatter over all blocks.

Backward it goes the other way round. What a block computed on the way is held, or computed again; with norms that are
affine maps it is then all computed again from the input and the latents' sums, with batch norm in training from what
each norm was applied to.

Axes: B batch, N nodes, C channels, S samples, G groups, D latents of all kernels in a group, r channels of a group.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from latentgnn import kernels
from latentgnn.core.gather import Gradients, Record, gather_assignments, gather_backward, of_way, sums, values
from latentgnn.core.mix import scatter_matrices
from latentgnn.core.nodes import Block, blocks, empty_like_layout, nodes_per_block
from latentgnn.core.parameters import Matrices, Parts, Plan, Vectors, fold, vectors
from latentgnn.core.products import add_project_back, contract_all
from latentgnn.core.scatter import expand, features, scatter_backward
from latentgnn.functional import wide


@dataclass
class State:
    """What the backward pass starts from, beside input and parameters.

    Args:
        sums: of values by assignments, (S, G, D, r).
        weights: what they are divided by, (S, G, D): sums of squared assignments, or of assignments.
        records: of each block, where they are held.
    """

    sums: Tensor
    weights: Tensor
    records: list[Record]


def _blocks(x_BNC: Tensor, offsets: Sequence[int] | None, parts: Parts, plan: Plan) -> list[Block]:
    if plan.batch_statistics:
        return blocks(x_BNC, offsets, None)
    reduced, latents = parts.reduces[0].matrix.shape[0], plan.groups * sum(plan.latents)
    return blocks(x_BNC, offsets, nodes_per_block(x_BNC.device, 3 * reduced + 2 * latents))


def _empty_state(x_BNC: Tensor, offsets: Sequence[int] | None, parts: Parts, plan: Plan) -> State:
    samples = x_BNC.shape[0] if offsets is None else len(offsets) - 1
    shape = (samples, plan.groups, sum(plan.latents), parts.reduces[0].matrix.shape[0] // plan.groups)
    dtype = wide(plan.compute)
    return State(x_BNC.new_zeros(shape, dtype=dtype), x_BNC.new_zeros(shape[:-1], dtype=dtype), [])


def _input(x_BNC: Tensor, block: Block, valid_sT1: Tensor | None, plan: Plan) -> Tensor:
    """A block of the input in the type of the products, with zeros where nodes take no part: NaN too may be there."""
    x_sTC = block.of(x_BNC).to(plan.compute)
    return x_sTC if valid_sT1 is None else torch.where(valid_sT1, x_sTC, 0)


def _features_of(state: State, matrices: Matrices, plan: Plan) -> list[Tensor]:
    return [
        matrix_SGrD.to(plan.compute)
        for matrix_SGrD in scatter_matrices(state.sums, state.weights, matrices.convs, plan)
    ]


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
    parts = Parts.of(tensors, plan)
    matrices, norm_vectors = fold(parts, plan), vectors(parts, plan) if plan.batch_statistics else None
    if kernels.why_not_kernels(matrices, plan, keep=keep) is None:
        return _forward_by_kernels(x_BNC, mask_BN, offsets, parts, matrices, plan)
    state = _empty_state(x_BNC, offsets, parts, plan)
    out_BNC = empty_like_layout(x_BNC, x_BNC.shape[-1])
    todo = _blocks(x_BNC, offsets, parts, plan)
    waiting = []
    for block in todo:
        valid_sT1, record = block.valid(mask_BN), Record()
        values(_input(x_BNC, block, valid_sT1, plan), matrices, norm_vectors, plan, record)
        gather_assignments(block, valid_sT1, matrices, norm_vectors, plan, record)
        sums_SGDr, weights_SGD = sums(block, record, plan)
        if len(todo) == 1:
            state.sums, state.weights = sums_SGDr, state.weights if weights_SGD is None else weights_SGD
        else:
            state.sums[block.samples].add_(sums_SGDr)
            if weights_SGD is not None:
                state.weights[block.samples].add_(weights_SGD)
        waiting.append(record if (keep and plan.holds) or len(todo) == 1 else _for_scatter(record, plan))
    to_features = _features_of(state, matrices, plan)
    for block in reversed(todo):  # what was read last may still be in a cache
        valid_sT1, record = block.valid(mask_BN), waiting.pop()
        features(block, valid_sT1, to_features, matrices, norm_vectors, plan, record)
        out_sTC, x_sTC = block.of(out_BNC), block.of(x_BNC)
        expand(block, x_sTC, valid_sT1, matrices, norm_vectors, plan, record, out_sTC)
        if keep or plan.batch_statistics:
            state.records.append(_held(record, plan))
    state.records.reverse()
    return out_BNC, state


def _forward_by_kernels(
    x_BNC: Tensor,
    mask_BN: Tensor | None,
    offsets: Sequence[int] | None,
    parts: Parts,
    matrices: Matrices,
    plan: Plan,
) -> tuple[Tensor, State]:
    """`forward` by Triton kernels; nothing is held but the sums."""
    kernels.require_triton()
    from latentgnn.kernels.steps import Steps

    steps, state = Steps(matrices, plan), _empty_state(x_BNC, offsets, parts, plan)
    out_BNC = empty_like_layout(x_BNC, x_BNC.shape[-1])
    todo = _blocks(x_BNC, offsets, parts, plan)
    waiting = []
    for block in todo:
        valid_sT1 = block.valid(mask_BN)
        sums_SGDr, weights_SGD, u_sTR = steps.gather(block, _input(x_BNC, block, valid_sT1, plan), valid_sT1)
        state.sums[block.samples].add_(sums_SGDr)
        state.weights[block.samples].add_(weights_SGD)
        waiting.append(u_sTR if len(todo) == 1 else u_sTR.clone())
    to_features = _features_of(state, matrices, plan)
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
    return Record(
        raw=record.raw,
        raw_statistics=record.raw_statistics,
        assigned=record.assigned,
        assigned_statistics=record.assigned_statistics,
        convolved=record.convolved,
        convolved_statistics=record.convolved_statistics,
        expanded_statistics=record.expanded_statistics,
    )


def backward(
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
    """Gradients of the input, and of the tensors; ``None`` for what needs none.

    Args:
        grad_BNC: of the output.
        x_BNC: as `forward` had it, like all that follow.
        mask_BN: nodes that take part.
        offsets: of the samples.
        tensors: parameters and statistics.
        state: from `forward`.
        plan: of the layer.
        needs_x: whether the input needs a gradient.
        needs: whether each of the tensors does.
    """
    # The folding, with autograd's record of it: small tensors, whose gradients are autograd's at the end.
    leaves = [
        None if tensor is None else tensor.detach().requires_grad_(need)
        for tensor, need in zip(tensors, needs, strict=True)
    ]
    with torch.enable_grad():
        parts = Parts.of(leaves, plan)
        folded, folded_vectors = fold(parts, plan), vectors(parts, plan) if plan.batch_statistics else None
        convs = [conv.detach().requires_grad_() for conv in folded.convs]
        sums, weights = state.sums.detach().requires_grad_(), state.weights.detach().requires_grad_()
        to_features = scatter_matrices(sums, weights, convs, plan)
    matrices = _detached(folded)
    norm_vectors = None if folded_vectors is None else _detached(folded_vectors)
    multiplied = [matrix_SGrD.detach().to(plan.compute) for matrix_SGrD in to_features]
    gradients = Gradients(
        assigns=[None] * plan.ways,
        assign_vectors=[(None, None)] * plan.ways,
        features=[torch.zeros_like(matrix_SGrD, memory_format=torch.contiguous_format) for matrix_SGrD in to_features],
    )
    ways = 5 * plan.ways
    todo = _blocks(x_BNC, offsets, Parts.of(tensors, plan), plan)
    records = [replace(record) for record in state.records] or [Record() for _ in todo]
    grads_scatter = []
    for block, record in zip(todo, records, strict=True):
        valid_sT1 = block.valid(mask_BN)
        if record.feature is None:
            if record.raw is None:
                values(_input(x_BNC, block, valid_sT1, plan), matrices, norm_vectors, plan, record)
            else:
                values(block.of(x_BNC), matrices, norm_vectors, plan, record)
            gather_assignments(block, valid_sT1, matrices, norm_vectors, plan, record)
            features(block, valid_sT1, multiplied, matrices, norm_vectors, plan, record)
        grad_sTC = block.of(grad_BNC).to(plan.compute)
        if valid_sT1 is not None:
            grad_sTC = torch.where(valid_sT1, grad_sTC, 0)
        grads_scatter.append(
            scatter_backward(
                block, grad_sTC, multiplied, matrices, norm_vectors, gradients, plan, record,
                needs_expand=any(needs[-6:]),
            )
        )
        record.feature = record.expanded = record.convolved = None
        if not plan.symmetric:
            record.scatter_assign = None
    assert gradients.features is not None
    wanted = [sums, weights, *convs]
    grad_sums, grad_weights, *grad_convs = _gradients(to_features, wanted, gradients.features)
    grad_sums = torch.zeros_like(sums) if grad_sums is None else grad_sums
    grad_weights = torch.zeros_like(weights) if grad_weights is None else grad_weights

    grad_x_BNC = empty_like_layout(x_BNC, x_BNC.shape[-1]) if needs_x else None
    grads_scatter.reverse()
    for block, record in zip(todo, records, strict=True):
        valid_sT1 = block.valid(mask_BN)
        grad_sTR = gather_backward(
            block, valid_sT1, grads_scatter.pop(), grad_sums, grad_weights, matrices, norm_vectors, gradients, plan,
            record,
        )
        if any(needs[:ways]):
            product_RC = contract_all(grad_sTR, _input(x_BNC, block, valid_sT1, plan))
            gradients.reduce = product_RC if gradients.reduce is None else gradients.reduce.add_(product_RC)
        if grad_x_BNC is not None:
            base_sTC, out_sTC = block.of(grad_BNC), block.of(grad_x_BNC)
            if matrices.reduce_scale is not None:
                grad_sTR = (grad_sTR * matrices.reduce_scale).to(plan.compute)
            reduces = [matrix.to(plan.compute) for matrix in matrices.reduces]
            add_project_back(base_sTC if plan.residual else None, grad_sTR, reduces, out_sTC)
            if valid_sT1 is not None and not plan.residual:
                out_sTC.copy_(torch.where(valid_sT1, out_sTC, base_sTC))
        _release(record)
    outputs, found = _folded_gradients(folded, folded_vectors, grad_convs, gradients, plan)
    wanted = [leaf for leaf in leaves if leaf is not None and leaf.requires_grad]
    grads = iter(_gradients(outputs, wanted, found))
    return grad_x_BNC, [
        None if leaf is None or not leaf.requires_grad else _as_given(next(grads), leaf) for leaf in leaves
    ]


def _detached(tensors: Matrices | Vectors):  # type: ignore[no-untyped-def]
    return torch.utils._pytree.tree_map(lambda tensor: None if tensor is None else tensor.detach(), tensors)


def _folded_gradients(
    folded: Matrices,
    folded_vectors: Vectors | None,
    grad_convs: Sequence[Tensor | None],
    gradients: Gradients,
    plan: Plan,
) -> tuple[list[Tensor], list[Tensor]]:
    """What the core multiplied by, as autograd recorded it, and its gradients."""
    pairs: list[tuple[Tensor | None, Tensor | None]] = []
    if gradients.reduce is not None:
        pairs += _unscaled(gradients.reduce, folded.reduces, folded.reduce_scale)
    if gradients.expand is not None:
        pairs += _unscaled(gradients.expand, [folded.expand], folded.expand_scale)
    assert gradients.assigns is not None
    assert gradients.assign_vectors is not None
    pairs += zip(folded.assigns, gradients.assigns, strict=True)
    pairs += zip(folded.convs, grad_convs, strict=True)
    if folded_vectors is None:
        pairs.append((folded.reduce_shift, gradients.reduce_vectors[1]))
        pairs += zip(folded.assign_shifts, (shift for _, shift in gradients.assign_vectors), strict=True)
        pairs.append((folded.expand_shift, gradients.expand_shift))
        shift_F = gradients.conv_vectors[1]
        if shift_F is not None:
            pairs += zip(folded.conv_shifts, shift_F.chunk(len(folded.conv_shifts)), strict=True)
    else:
        pairs += zip(folded_vectors.reduce, gradients.reduce_vectors, strict=True)
        for vector_pair, grad_pair in zip(folded_vectors.assigns, gradients.assign_vectors, strict=True):
            pairs += zip(vector_pair, grad_pair, strict=True)
        pairs += zip(folded_vectors.conv, gradients.conv_vectors, strict=True)
        pairs += zip(folded_vectors.expand, gradients.expand_vectors, strict=True)
    known = [(output, grad) for output, grad in pairs if output is not None and grad is not None]
    return [output for output, _ in known], [grad for _, grad in known]


def _unscaled(
    grad_RC: Tensor, matrices: Sequence[Tensor], scale_R: Tensor | None
) -> list[tuple[Tensor, Tensor | None]]:
    """From the gradient of matrices below one another, times a scale, to those of the matrices and of the scale.

    By hand, and in place, for they are the largest of what is learnt.
    """
    grads = grad_RC.split([matrix.shape[0] for matrix in matrices])
    if scale_R is None:
        return list(zip(matrices, grads, strict=True))
    pairs: list[tuple[Tensor, Tensor | None]] = []
    if scale_R.requires_grad:
        sums = [(grad * matrix.detach()).sum(1) for grad, matrix in zip(grads, matrices, strict=True)]
        pairs.append((scale_R, sums[0] if len(sums) == 1 else torch.cat(sums)))
    grad_RC.mul_(scale_R.detach().unsqueeze(1))
    return [*pairs, *zip(matrices, grads, strict=True)]


def _gradients(
    outputs: Sequence[Tensor], inputs: Sequence[Tensor], grads: Sequence[Tensor]
) -> Sequence[Tensor | None]:
    recorded = [
        (output, grad.to(output.dtype)) for output, grad in zip(outputs, grads, strict=True) if output.requires_grad
    ]
    if not recorded or not inputs:
        return [None] * len(inputs)
    outputs, grads = zip(*recorded, strict=True)
    return torch.autograd.grad(outputs, inputs, grads, allow_unused=True)


def _as_given(grad: Tensor | None, leaf: Tensor) -> Tensor:
    return torch.zeros_like(leaf) if grad is None else grad.to(leaf.dtype)


def _release(record: Record) -> None:
    """Let go of a block's tensors."""
    for name in vars(record):
        setattr(record, name, None)
