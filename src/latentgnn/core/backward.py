"""The layer backward: scatter over all blocks, mix, gather over all blocks.

What a block computed on the way is held, or computed again: all of it from the input and the latents' sums; with batch
norm in training from what each norm was applied to.

Axes: B batch, N nodes, C channels, S samples, G groups, R reduced channels, D latents of all kernels in a group, r
channels of a group.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from latentgnn.core.accumulate import add_project_back
from latentgnn.core.gather import gather_assignments, gather_backward, values
from latentgnn.core.layouts import empty_like_layout, side_by_side
from latentgnn.core.parameters import Matrices, Vectors
from latentgnn.core.passes import State, blocks_of, input_of
from latentgnn.core.plan import Plan
from latentgnn.core.products import contract_all
from latentgnn.core.recorded import Folding, Mixing, gradients_of
from latentgnn.core.records import Gradients, Record
from latentgnn.core.scatter import features, scatter_backward
from latentgnn.functional import cast


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
    folding = state.folding or Folding.of(tensors, needs, plan)
    matrices, norm_vectors = folding.matrices, folding.vectors
    mixing = state.mixing or Mixing.of(state.sums, state.weights, matrices.convs, plan, records=True)
    gradients = Gradients(
        assigns=[None] * plan.ways,
        assign_vectors=[(None, None)] * plan.ways,
        features=[
            torch.zeros_like(matrix_SGrD, memory_format=torch.contiguous_format) for matrix_SGrD in mixing.to_features
        ],
    )
    ways = 5 * plan.ways
    todo = blocks_of(x_BNC, offsets, matrices, plan)
    records = [replace(record) for record in state.records] or [Record() for _ in todo]
    whole = len(todo) == 1 and todo[0].whole
    alone = x_BNC.shape[0] == 1 and whole and plan.residual and grad_BNC.stride() == x_BNC.stride()
    grad_x_BNC = None if alone or not needs_x else empty_like_layout(x_BNC, x_BNC.shape[-1])
    memory_sTC = grad_x_BNC if whole else None
    grads_scatter = []
    for block, record in zip(todo, records, strict=True):
        valid_sT1 = block.valid(mask_BN)
        if record.feature is None:
            if record.raw is None:
                values(block, input_of(x_BNC, block, valid_sT1, plan), matrices, norm_vectors, plan, record)
            else:
                values(block, block.of(x_BNC), matrices, norm_vectors, plan, record)
            gather_assignments(block, valid_sT1, matrices, norm_vectors, plan, record)
            features(block, valid_sT1, mixing.multiplied, matrices, norm_vectors, plan, record)
        grad_sTC = side_by_side(input_of(grad_BNC, block, valid_sT1, plan), memory_sTC)
        grads_scatter.append(
            scatter_backward(
                block,
                grad_sTC,
                mixing.multiplied,
                matrices,
                norm_vectors,
                gradients,
                plan,
                record,
                needs_expand=any(needs[-6:]),
            )
        )
        record.feature = record.convolved = None
        if not plan.symmetric:
            record.scatter_assign = None
    assert gradients.features is not None
    wanted = [mixing.sums, mixing.weights, *mixing.convs]
    grad_sums, grad_weights, *grad_convs = gradients_of(mixing.to_features, wanted, gradients.features)
    grad_sums = torch.zeros_like(mixing.sums) if grad_sums is None else grad_sums
    grad_weights = torch.zeros_like(mixing.weights) if grad_weights is None else grad_weights

    grads_scatter.reverse()
    for block, record in zip(todo, records, strict=True):
        valid_sT1 = block.valid(mask_BN)
        grad_sTR = gather_backward(
            block,
            valid_sT1,
            grads_scatter.pop(),
            grad_sums,
            grad_weights,
            matrices,
            norm_vectors,
            gradients,
            plan,
            record,
        )
        if any(needs[:ways]):
            x_sTC = side_by_side(input_of(x_BNC, block, valid_sT1, plan), memory_sTC)
            product_RC = contract_all(grad_sTR, x_sTC)
            gradients.reduce = product_RC if gradients.reduce is None else gradients.reduce.add_(product_RC)
        if needs_x:
            base_sTC, out_sTC = block.of(grad_BNC), None if grad_x_BNC is None else block.of(grad_x_BNC)
            if matrices.reduce_scale is not None:
                grad_sTR = cast(grad_sTR * matrices.reduce_scale, plan.compute)
            reduces = [cast(matrix, plan.compute) for matrix in matrices.reduces]
            written_sTC = add_project_back(base_sTC if plan.residual else None, grad_sTR, reduces, out_sTC)
            if valid_sT1 is not None and not plan.residual:
                written_sTC.copy_(torch.where(valid_sT1, written_sTC, base_sTC))
            grad_x_BNC = written_sTC if grad_x_BNC is None else grad_x_BNC
        _release(record)
    outputs, grads_of_outputs = _folded_gradients(folding.folded, folding.folded_vectors, grad_convs, gradients)
    leaves = folding.leaves
    wanted = [leaf for leaf in leaves if leaf is not None and leaf.requires_grad]
    grads = iter(gradients_of(outputs, wanted, grads_of_outputs))
    return grad_x_BNC, [
        None if leaf is None or not leaf.requires_grad else _as_given(next(grads), leaf) for leaf in leaves
    ]


def _folded_gradients(
    folded: Matrices,
    folded_vectors: Vectors | None,
    grad_convs: Sequence[Tensor | None],
    gradients: Gradients,
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
        sums = [torch.linalg.vecdot(grad, matrix.detach()) for grad, matrix in zip(grads, matrices, strict=True)]
        pairs.append((scale_R, sums[0] if len(sums) == 1 else torch.cat(sums)))
    grad_RC.mul_(scale_R.detach().unsqueeze(1))
    return [*pairs, *zip(matrices, grads, strict=True)]


def _as_given(grad: Tensor | None, leaf: Tensor) -> Tensor:
    return torch.zeros_like(leaf) if grad is None else cast(grad, leaf.dtype)


def _release(record: Record) -> None:
    """Let go of a block's tensors."""
    for name in vars(record):
        setattr(record, name, None)
