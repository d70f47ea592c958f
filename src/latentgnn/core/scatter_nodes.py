"""Scatter over all blocks of nodes: forward, and its backward beside it.

The backward pass ends with a sum over nodes, the gradient of the matrices from assignments to features; sums over other
nodes of the same samples can be added to it.

Axes: B batch, N nodes, C channels, S samples, G groups, r channels of a group, D_k latents of a kernel in a group.
"""

from collections.abc import Sequence
from dataclasses import replace

from torch import Tensor

from latentgnn.core.expand import expand
from latentgnn.core.gather import gather_assignments, values
from latentgnn.core.inputs import Input, in_products
from latentgnn.core.layouts import side_by_side
from latentgnn.core.parameters import Matrices, Vectors
from latentgnn.core.plan import Plan
from latentgnn.core.records import Gradients, Record
from latentgnn.core.scatter import features, scatter_backward


def scatter_nodes(
    given: Input,
    waiting: list[Record],
    to_features: Sequence[Tensor],
    matrices: Matrices,
    vectors: Vectors | None,
    plan: Plan,
    *,
    keep: bool,
    out_BNC: Tensor | None,
) -> tuple[Tensor, list[Record]]:
    """The output, and what is held of each block for the backward pass.

    Args:
        given: the nodes.
        waiting: one record per block, from `gather_nodes`; emptied here.
        to_features: one matrix per kernel, (S, G, r, D_k), in the dtype of the products.
        matrices: the layer's matrices.
        vectors: weights and biases of norms with statistics.
        plan: the layer's plan.
        keep: a backward pass will follow.
        out_BNC: where to write; ``None`` allocates memory.
    """
    records: list[Record] = []
    for block in reversed(given.todo):  # what was read last may still be in a cache
        valid_sT1, record, x_sTC = block.valid(given.mask_BN), waiting.pop(), block.of(given.x_BNC)
        features(block, valid_sT1, to_features, matrices, vectors, plan, record)
        out_sTC = None if out_BNC is None else block.of(out_BNC)
        written_sTC = expand(block, x_sTC, valid_sT1, matrices, vectors, plan, record, out_sTC)
        out_BNC = written_sTC if out_BNC is None else out_BNC
        if keep or plan.norm == "batch":
            records.append(_held(record, plan))
    records.reverse()
    assert out_BNC is not None
    return out_BNC, records


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


def scatter_nodes_backward(
    grad_BNC: Tensor,
    given: Input,
    records: Sequence[Record],
    to_features: Sequence[Tensor],
    matrices: Matrices,
    vectors: Vectors | None,
    gradients: Gradients,
    plan: Plan,
    *,
    needs_expand: bool,
    memory_sTC: Tensor | None,
) -> list[Tensor]:
    """The gradient that `scatter_backward` returns for each block, from the gradient of the output.

    Args:
        grad_BNC: of the output.
        given: the nodes.
        records: one per block; what is missing in one is recomputed.
        to_features: one matrix per kernel, (S, G, r, D_k), in the dtype of the products.
        matrices: the layer's matrices.
        vectors: weights and biases of norms with statistics.
        gradients: the gradients to add to; ``gradients.features`` is complete afterwards.
        plan: the layer's plan.
        needs_expand: whether gradients of the expansion, or of what it was folded from, are wanted.
        memory_sTC: scratch memory like the input, if that is one block.
    """
    grads = []
    for block, record in zip(given.todo, records, strict=True):
        valid_sT1 = block.valid(given.mask_BN)
        if record.feature is None:
            raw = record.raw is None
            x_sTC = in_products(given.x_BNC, block, valid_sT1, matrices, plan) if raw else block.of(given.x_BNC)
            values(block, x_sTC, matrices, vectors, plan, record)
            gather_assignments(block, valid_sT1, matrices, vectors, plan, record)
            features(block, valid_sT1, to_features, matrices, vectors, plan, record)
        grad_sTC = side_by_side(in_products(grad_BNC, block, valid_sT1, matrices, plan), memory_sTC)
        grads.append(
            scatter_backward(
                block, grad_sTC, to_features, matrices, vectors, gradients, plan, record, needs_expand=needs_expand
            )
        )
        record.feature = record.convolved = None
        if not plan.symmetric:
            record.scatter_assign = None
    return grads
