"""Visible to latent, V = l2(norm(W x)), P = relu(norm(Psi V)), Z = sum of P V^T: forward, and its backward beside it.

Axes: s rows of the input, T nodes, C channels, G groups, H = ways * G (gather's groups before scatter's), r channels
of a group, D latents of all kernels in a group.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from latentgnn.core.assign import assignments, assignments_backward
from latentgnn.core.batch_norm import batch_norm_again
from latentgnn.core.graphs import graphs_of, of_samples, of_way, product, split_graphs, to_graphs, to_nodes
from latentgnn.core.layouts import cat, cat_nodes, nodes_innermost
from latentgnn.core.lengths import (
    assign_unit_backward,
    rectifier_backward_,
    to_unit_length_,
    unit_backward,
)
from latentgnn.core.nodes import Block
from latentgnn.core.parameters import Matrices, Vectors
from latentgnn.core.plan import Plan
from latentgnn.core.products import contract, project_all, sum_of_nodes
from latentgnn.core.records import Gradients, Record, add_pair
from latentgnn.core.scaling import scaled_
from latentgnn.numerics import inverse_length, row_bound, to_dtype, wide


def values(
    block: Block, x_sTC: Tensor, matrices: Matrices, vectors: Vectors | None, plan: Plan, record: Record
) -> None:
    """V and L of a block, or one of them: one product with the given reductions, scaled to unit length."""
    u_sTR, shift_R, down, ways = record.raw, matrices.reduce_shift, None, len(matrices.reduces)
    if u_sTR is None:
        weights: Sequence[Tensor] = matrices.reduces
        if plan.compute == torch.float16:
            # Unit length removes the factor again.
            down = row_bound(weights).reciprocal()
            weights = [weight_RC * down for weight_RC in weights]
            shift_R = None if shift_R is None else shift_R * down
        weights = [to_dtype(weight_RC, plan.compute) for weight_RC in weights]
        # If the scale is in the matrices already, the shift is added by the product.
        u_sTR = project_all(x_sTC, weights, shift_R if matrices.reduce_scale is None else None)
    if vectors is not None:
        weight_R, bias_R = vectors.reduce
        if record.raw_statistics is None:
            # Made contiguous here, and not in the input, because there are usually fewer channels.
            record.raw = u_sTR = u_sTR.contiguous() if plan.in_rows else u_sTR
            u_sTR, record.raw_statistics = plan.norm_of(0, ways).normalize(u_sTR, weight_R, bias_R, block)
        else:
            u_sTR = batch_norm_again(u_sTR, weight_R, bias_R, record.raw_statistics)
    elif matrices.reduce_scale is not None:
        u_sTR = scaled_(to_dtype(u_sTR, matrices.reduce_scale.dtype), matrices.reduce_scale, shift_R)
    unit_sHTr = to_graphs(u_sTR, ways * plan.groups)
    record.scale = inverse_length(unit_sHTr, -1)
    if unit_sHTr.dtype == plan.compute:
        record.unit = torch.mul(unit_sHTr, record.scale, out=_memory_of_ways(unit_sHTr, plan))
    else:
        record.unit = (unit_sHTr * record.scale).to(plan.compute)
    if down is not None:
        record.scale = record.scale * down


def _memory_of_ways(unit_sHTr: Tensor, plan: Plan) -> Tensor:
    """Where to write V and L: in place, or in new memory if channels are innermost.

    In that layout V and L are interleaved, and each product with one of them would need a copy.
    """
    samples, parts, nodes, channels = unit_sHTr.shape
    if parts == 1 or plan.groups > 1 or nodes_innermost(unit_sHTr):
        return unit_sHTr
    return unit_sHTr.new_empty(parts, samples, nodes, channels).transpose(0, 1)


def gather_assignments(
    block: Block, valid_sT1: Tensor | None, matrices: Matrices, vectors: Vectors | None, plan: Plan, record: Record
) -> None:
    """P of a block; in a symmetric layer it is also Q."""
    assign_sGTD = assignments(0, block, matrices, vectors, plan, record)
    if valid_sT1 is not None:
        assign_sGTD.mul_(valid_sT1.unsqueeze(1))
    record.gather_assign = assign_sGTD
    if plan.symmetric:
        record.assign_scales = to_unit_length_(assign_sGTD, plan)
        record.scatter_assign = assign_sGTD


def sums(block: Block, record: Record, plan: Plan) -> tuple[Tensor, Tensor | None]:
    """A block's sums of values by assignments, (S, G, D, r), and their divisors, (S, G, D)."""
    assert record.unit is not None
    assert record.gather_assign is not None
    values_sGTr = block.each_sample(of_way(record.unit, 0, plan), 2)
    assigns_sGTD = block.each_sample(record.gather_assign, 2)
    parts = [
        split_graphs(contract(graphs_of(assign), graphs_of(value)), plan)
        for assign, value in zip(assigns_sGTD, values_sGTr, strict=True)
    ]
    if plan.symmetric and plan.node_scale == "published":
        return cat(parts), None
    dtype = wide(plan.compute)
    if plan.node_scale == "mean":
        return cat(parts), cat([assign.sum(2, dtype=dtype) for assign in assigns_sGTD])
    return cat(parts), cat([_column_squares(assign, dtype) for assign in assigns_sGTD])


def _column_squares(x_sGTD: Tensor, dtype: torch.dtype) -> Tensor:
    """Sums of squares over nodes, (s, G, D)."""
    if nodes_innermost(x_sGTD):
        return torch.linalg.vector_norm(x_sGTD, dim=2, dtype=dtype).square_()
    x_sGTD = x_sGTD.to(dtype)
    return (x_sGTD * x_sGTD).sum(2)


def gather_backward(
    block: Block,
    valid_sT1: Tensor | None,
    grad_scatter_sGTr: Tensor | None,
    grad_sums_SGDr: Tensor,
    grad_weights_SGD: Tensor,
    matrices: Matrices,
    vectors: Vectors | None,
    gradients: Gradients,
    plan: Plan,
    record: Record,
) -> Tensor:
    """The gradient of W x, (s, T, ways * R), from those of the latents' sums and of scatter's L.

    With affine norms, it is the gradient of W x after its scale.

    Args:
        block: the block.
        valid_sT1: which of its nodes take part.
        grad_scatter_sGTr: gradient of L if asymmetric; gradient of Q, (s, G, T, D), if symmetric.
        grad_sums_SGDr: gradient of the sums.
        grad_weights_SGD: gradient of their divisors.
        matrices: the layer's matrices.
        vectors: weights and biases of norms with statistics.
        gradients: the gradients to add to.
        plan: the layer's plan.
        record: of the block.
    """
    assert record.unit is not None
    assert record.scale is not None
    assert record.gather_assign is not None
    value_sGTr, assign_sGTD = of_way(record.unit, 0, plan), record.gather_assign
    pairs = zip(block.each_sample(value_sGTr, 2), of_samples(grad_sums_SGDr, block), strict=True)
    grad_assign = cat_nodes([product(value, to_dtype(grad, plan.compute)) for value, grad in pairs], 2)
    if plan.node_scale == "mean":
        pairs = zip(block.each_sample(grad_assign, 2), of_samples(grad_weights_SGD, block), strict=True)
        for part, grad in pairs:
            part.add_(to_dtype(grad, plan.compute).unsqueeze(2))
    elif not plan.symmetric:
        for part, assign, grad in zip(
            block.each_sample(grad_assign, 2),
            block.each_sample(assign_sGTD, 2),
            of_samples(grad_weights_SGD, block),
            strict=True,
        ):
            part.addcmul_(assign, to_dtype(grad, plan.compute).unsqueeze(2), value=2)
    if plan.symmetric:
        assert record.assign_scales is not None
        assert grad_scatter_sGTr is not None
        # Q is P: add both gradients, then go back through the unit length.
        grad_assign = grad_assign.to(wide(plan.compute)).add_(grad_scatter_sGTr)
        grad_assign = assign_unit_backward(grad_assign, assign_sGTD, record.assign_scales, plan)
    rectifier_backward_(grad_assign, assign_sGTD)
    grad_value_sGTr = assignments_backward(0, block, grad_assign, matrices, vectors, gradients, plan, record)
    pairs = zip(block.each_sample(assign_sGTD, 2), of_samples(grad_sums_SGDr, block), strict=True)
    grad_value_sGTr = grad_value_sGTr.add_(
        cat_nodes([product(assign, to_dtype(grad.mT, plan.compute)) for assign, grad in pairs], 2)
    )
    grads = [grad_value_sGTr]
    if not plan.symmetric:
        assert grad_scatter_sGTr is not None
        grads.append(grad_scatter_sGTr)
    grad_sHTr = cat_nodes(grads, 1)
    grad_sHTr = unit_backward(grad_sHTr, record.unit, record.scale)
    if valid_sT1 is not None:
        grad_sHTr.mul_(valid_sT1.unsqueeze(1))
    grad_sTR = to_nodes(grad_sHTr)
    if vectors is None:
        if matrices.reduce_shift is not None:
            shift_R = sum_of_nodes(grad_sTR, grad_sTR.dtype)
            gradients.reduce_vectors = add_pair(gradients.reduce_vectors, (None, shift_R))
        return to_dtype(grad_sTR, plan.compute)
    assert record.raw is not None
    assert record.raw_statistics is not None
    grad_sTR, *pair = plan.norm_of(0, plan.ways).backward(
        grad_sTR, record.raw, vectors.reduce[0], record.raw_statistics, block
    )
    gradients.reduce_vectors = add_pair(gradients.reduce_vectors, pair)
    return grad_sTR
