"""Gather over all blocks of nodes: forward, and its backward beside it.

It ends with sums over nodes, `Gathered`. Whoever has other nodes of the same samples adds theirs there.

Axes: B batch, N nodes, C channels, S samples, G groups, D latents of all kernels in a group, r channels of a group.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from latentgnn.core.accumulate import add_project_back
from latentgnn.core.gather import gather_assignments, gather_backward, sums, values
from latentgnn.core.graphs import of_way
from latentgnn.core.inputs import Input, in_products
from latentgnn.core.layouts import side_by_side
from latentgnn.core.nodes import Block
from latentgnn.core.parameters import Matrices, Vectors
from latentgnn.core.plan import Plan
from latentgnn.core.products import contract_all
from latentgnn.core.records import Gradients, Record
from latentgnn.functional import cast, wide


@dataclass
class Gathered:
    """What gather leaves.

    Args:
        sums: of values by assignments, (S, G, D, r).
        weights: what they are divided by, (S, G, D): sums of squared assignments, or of assignments.
        waiting: what scatter needs of each block.
    """

    sums: Tensor
    weights: Tensor
    waiting: list[Record]

    @classmethod
    def nothing(cls, given: Input, matrices: Matrices, plan: Plan) -> "Gathered":
        """Of no nodes."""
        shape = (given.samples, plan.groups, sum(plan.latents), matrices.reduces[0].shape[0] // plan.groups)
        dtype = wide(plan.compute)
        return cls(given.x_BNC.new_zeros(shape, dtype=dtype), given.x_BNC.new_zeros(shape[:-1], dtype=dtype), [])

    def add(self, block: Block, sums_SGDr: Tensor, weights_SGD: Tensor | None) -> None:
        """Add those of a block."""
        self.sums[block.samples].add_(sums_SGDr)
        if weights_SGD is not None:
            self.weights[block.samples].add_(weights_SGD)


def gather_nodes(
    given: Input, matrices: Matrices, vectors: Vectors | None, plan: Plan, *, holds: bool, memory_BNC: Tensor | None
) -> Gathered:
    """The latents' sums over all nodes.

    Args:
        given: the nodes.
        matrices: of the layer.
        vectors: of norms with statistics.
        plan: of the layer.
        holds: all that is computed waits, and not only what scatter needs.
        memory_BNC: like the input, free until scatter writes the output to it.
    """
    alone, found = len(given.todo) == 1, None
    for block in given.todo:
        valid_sT1, record = block.valid(given.mask_BN), Record()
        memory_sTC = memory_BNC if block.whole else None
        x_sTC = side_by_side(in_products(given.x_BNC, block, valid_sT1, matrices, plan), memory_sTC)
        values(block, x_sTC, matrices, vectors, plan, record)
        gather_assignments(block, valid_sT1, matrices, vectors, plan, record)
        sums_SGDr, weights_SGD = sums(block, record, plan)
        if alone:
            weights_SGD = sums_SGDr.new_zeros(sums_SGDr.shape[:-1]) if weights_SGD is None else weights_SGD
            return Gathered(sums_SGDr, weights_SGD, [record])
        found = found or Gathered.nothing(given, matrices, plan)
        found.add(block, sums_SGDr, weights_SGD)
        found.waiting.append(record if holds else _for_scatter(record, plan))
    assert found is not None
    return found


def _for_scatter(record: Record, plan: Plan) -> Record:
    """What waits for scatter where little is to be held: the values, or in a symmetric layer the assignments."""
    if plan.symmetric:
        return Record(scatter_assign=record.scatter_assign, assign_scales=record.assign_scales)
    assert record.unit is not None
    return Record(unit=of_way(record.unit, 1, plan).clone())


def gather_nodes_backward(
    grad_BNC: Tensor,
    grads_scatter: list[Tensor],
    grad_sums_SGDr: Tensor,
    grad_weights_SGD: Tensor,
    given: Input,
    records: list[Record],
    matrices: Matrices,
    vectors: Vectors | None,
    gradients: Gradients,
    plan: Plan,
    *,
    needs_reduce: bool,
    needs_x: bool,
    memory_sTC: Tensor | None,
    grad_x_BNC: Tensor | None,
) -> Tensor | None:
    """From the gradients of the latents' sums and of what scatter began with to that of the input.

    Args:
        grad_BNC: of the output, which a residual layer's input has a part in.
        grads_scatter: from `scatter_nodes_backward`; it is empty afterwards.
        grad_sums_SGDr: of the sums over all nodes.
        grad_weights_SGD: of what they are divided by.
        given: the nodes.
        records: of each block; they are let go of.
        matrices: of the layer.
        vectors: of norms with statistics.
        gradients: added to.
        plan: of the layer.
        needs_reduce: whether gradients of the reductions, or of what they were folded from, are wanted.
        needs_x: whether that of the input is.
        memory_sTC: free memory like the input, if that is one block.
        grad_x_BNC: what to write to; ``None`` makes new memory.
    """
    grads_scatter.reverse()
    for block, record in zip(given.todo, records, strict=True):
        valid_sT1 = block.valid(given.mask_BN)
        grad_sTR = gather_backward(
            block,
            valid_sT1,
            grads_scatter.pop(),
            grad_sums_SGDr,
            grad_weights_SGD,
            matrices,
            vectors,
            gradients,
            plan,
            record,
        )
        if needs_reduce:
            x_sTC = side_by_side(in_products(given.x_BNC, block, valid_sT1, matrices, plan), memory_sTC)
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
    return grad_x_BNC


def _release(record: Record) -> None:
    """Let go of a block's tensors."""
    for name in vars(record):
        setattr(record, name, None)
