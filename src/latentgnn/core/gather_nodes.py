"""Gather over all blocks of nodes: forward, and its backward beside it.

It ends with sums over nodes, `Gathered`; sums over other nodes of the same samples can be added to them.

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
from latentgnn.numerics import to_dtype, wide


@dataclass
class Gathered:
    """The result of gather.

    Args:
        sums: of values by assignments, (S, G, D, r).
        weights: their divisors, (S, G, D): sums of squared assignments, or of assignments.
        waiting: what scatter needs from each block.
    """

    sums: Tensor
    weights: Tensor
    waiting: list[Record]

    @classmethod
    def nothing(cls, given: Input, matrices: Matrices, plan: Plan) -> "Gathered":
        """Zero sums, before any block is added."""
        shape = (given.samples, plan.groups, sum(plan.latents), matrices.reduces[0].shape[0] // plan.groups)
        dtype = wide(plan.compute)
        return cls(given.x_BNC.new_zeros(shape, dtype=dtype), given.x_BNC.new_zeros(shape[:-1], dtype=dtype), [])

    def add(self, block: Block, sums_SGDr: Tensor, weights_SGD: Tensor | None) -> None:
        """Add the sums of a block."""
        self.sums[block.samples].add_(sums_SGDr)
        if weights_SGD is not None:
            self.weights[block.samples].add_(weights_SGD)


def gather_nodes(
    given: Input, matrices: Matrices, vectors: Vectors | None, plan: Plan, *, holds: bool, memory_BNC: Tensor | None
) -> Gathered:
    """The latents' sums over all nodes.

    Args:
        given: the nodes.
        matrices: the layer's matrices.
        vectors: weights and biases of norms with statistics.
        plan: the layer's plan.
        holds: keep everything that a block computed, not only what scatter needs.
        memory_BNC: scratch memory like the input, free until scatter writes the output to it.
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
    """The little that scatter needs if nothing else is held: L, or in a symmetric layer the assignments."""
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
    """The gradient of the input, from those of the latents' sums and of scatter's inputs.

    Args:
        grad_BNC: gradient of the output; in a residual layer, also part of the input's gradient.
        grads_scatter: from `scatter_nodes_backward`; emptied here.
        grad_sums_SGDr: of the sums over all nodes.
        grad_weights_SGD: gradient of their divisors.
        given: the nodes.
        records: one per block; cleared here.
        matrices: the layer's matrices.
        vectors: weights and biases of norms with statistics.
        gradients: the gradients to add to.
        plan: the layer's plan.
        needs_reduce: whether gradients of the reductions, or of what they were folded from, are wanted.
        needs_x: whether that of the input is.
        memory_sTC: scratch memory like the input, if that is one block.
        grad_x_BNC: where to write; ``None`` allocates memory.
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
                grad_sTR = to_dtype(grad_sTR * matrices.reduce_scale, plan.compute)
            reduces = [to_dtype(matrix, plan.compute) for matrix in matrices.reduces]
            written_sTC = add_project_back(base_sTC if plan.residual else None, grad_sTR, reduces, out_sTC)
            if valid_sT1 is not None and not plan.residual:
                written_sTC.copy_(torch.where(valid_sT1, written_sTC, base_sTC))
            grad_x_BNC = written_sTC if grad_x_BNC is None else grad_x_BNC
        _release(record)
    return grad_x_BNC


def _release(record: Record) -> None:
    """Free a block's tensors."""
    for name in vars(record):
        setattr(record, name, None)
