"""The layer backward: scatter over all blocks, mix, gather over all blocks.

What a block computed in the forward pass is held or recomputed: from the input and the latents' sums, or with batch
norm in training from the inputs of the norms.

Axes: B batch, N nodes, C channels, S samples, G groups, R reduced channels, D latents of all kernels in a group, r
channels of a group.
"""

from collections.abc import Sequence
from dataclasses import replace

from torch import Tensor

from latentgnn.core.folding import Folding, Mixing
from latentgnn.core.gather_nodes import gather_nodes_backward
from latentgnn.core.inputs import Input
from latentgnn.core.layouts import empty_like_layout, nodes_innermost
from latentgnn.core.over_ranks import over_ranks, share_of_rank
from latentgnn.core.passes import State, backward_by_kernels
from latentgnn.core.plan import Plan
from latentgnn.core.records import Gradients, Record
from latentgnn.core.scatter_nodes import scatter_nodes_backward
from latentgnn.numerics import to_dtype, wide


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
        x_BNC: as `forward` had it, like the arguments below.
        mask_BN: nodes that take part.
        offsets: of the samples.
        tensors: parameters and statistics.
        state: from `forward`.
        plan: the layer's plan.
        needs_x: whether the input needs a gradient.
        needs: whether each of the tensors does.
    """
    if state.by_triton:
        return backward_by_kernels(
            grad_BNC, x_BNC, mask_BN, offsets, tensors, state, plan, needs_x=needs_x, needs=needs
        )
    folding = state.folding or Folding.of(tensors, needs, plan)
    matrices, vectors = folding.matrices.for_nodes(x_BNC.shape[0] * x_BNC.shape[1], plan), folding.vectors
    mixing = state.mixing or Mixing.of(state.sums, state.weights, matrices.convs, plan, records=True)
    given, gradients = Input.of(x_BNC, mask_BN, offsets, matrices, plan), Gradients.nothing(mixing.to_features, plan)
    records = [replace(record) for record in state.records] or [Record() for _ in given.todo]
    whole = given.is_one_block
    # As in the forward pass: the call that adds the base may allocate the result.
    alone = x_BNC.shape[0] == 1 or not nodes_innermost(x_BNC)
    alone = alone and whole and plan.residual and grad_BNC.stride() == x_BNC.stride()
    grad_x_BNC = None if alone or not needs_x else empty_like_layout(x_BNC, x_BNC.shape[-1])
    memory_sTC = grad_x_BNC if whole else None
    grads_scatter = scatter_nodes_backward(
        grad_BNC,
        given,
        records,
        mixing.multiplied,
        matrices,
        vectors,
        gradients,
        plan,
        needs_expand=any(needs[-6:]),
        memory_sTC=memory_sTC,
    )
    assert gradients.features is not None
    # Sums over this process's nodes, added up; the backward pass of mixing needs nothing else.
    features = over_ranks([to_dtype(grad, wide(plan.compute)) for grad in gradients.features], plan)
    grad_sums, grad_weights, grad_convs = mixing.gradients(features)
    grad_x_BNC = gather_nodes_backward(
        grad_BNC,
        grads_scatter,
        grad_sums,
        grad_weights,
        given,
        records,
        matrices,
        vectors,
        gradients,
        plan,
        needs_reduce=any(needs[: 5 * plan.ways]),
        needs_x=needs_x,
        memory_sTC=memory_sTC,
        grad_x_BNC=grad_x_BNC,
    )
    return grad_x_BNC, folding.gradients(gradients, share_of_rank(grad_convs, plan))
