"""Latent to visible, Q = l2(relu(norm(Psi L))), f = Y^T Q or relu(norm(G Y^T Q)): forward, and its backward beside it.

Axes: s rows of the input, T nodes, C channels, S samples, G groups, r channels of a group, D latents of all kernels in
a group, F features of all kernels (K * R).
"""

from collections.abc import Sequence

from torch import Tensor

from latentgnn.core.assign import assignments, assignments_backward
from latentgnn.core.batch_norm import batch_norm_again
from latentgnn.core.expand import expand_backward
from latentgnn.core.graphs import graphs_of, of_kernel, of_samples, product, split_graphs, to_graphs, to_nodes
from latentgnn.core.layouts import cat, cat_nodes
from latentgnn.core.lengths import assign_unit_backward, rectifier_backward_, to_unit_length_
from latentgnn.core.nodes import Block
from latentgnn.core.parameters import Matrices, Vectors
from latentgnn.core.plan import Plan
from latentgnn.core.products import contract, sum_of_nodes
from latentgnn.core.records import Gradients, Record, add_pair
from latentgnn.numerics import to_dtype, wide


def features(
    block: Block,
    valid_sT1: Tensor | None,
    to_features: Sequence[Tensor],
    matrices: Matrices,
    vectors: Vectors | None,
    plan: Plan,
    record: Record,
) -> None:
    """The features of a block, which its output is expanded from.

    Args:
        block: the block.
        valid_sT1: which of its nodes take part.
        to_features: one matrix per kernel, (S, G, r, D_k), in the dtype of the products.
        matrices: the layer's matrices.
        vectors: weights and biases of norms with statistics.
        plan: the layer's plan.
        record: of the block.
    """
    if record.scatter_assign is None:
        assign_sGTD = assignments(1, block, matrices, vectors, plan, record)
        if valid_sT1 is not None:
            assign_sGTD.mul_(valid_sT1.unsqueeze(1))
        record.assign_scales = to_unit_length_(assign_sGTD, plan)
        record.scatter_assign = assign_sGTD
    if vectors is not None and record.convolved is not None:
        assert record.convolved_statistics is not None
        record.feature = batch_norm_again(record.convolved, *vectors.conv, record.convolved_statistics).relu_()
        return
    parts = []
    for kernel, matrix_SGrD in zip(plan.kernels, to_features, strict=True):
        each = zip(
            block.each_sample(of_kernel(record.scatter_assign, kernel, plan), 2),
            of_samples(matrix_SGrD, block),
            strict=True,
        )
        parts.append(to_nodes(cat_nodes([product(assign, matrix) for assign, matrix in each], 2)))
    feature_sTF = cat_nodes(parts, 2)
    if plan.graph_conv:
        if vectors is not None:
            record.convolved = feature_sTF
            feature_sTF, record.convolved_statistics = plan.conv_norm.normalize(feature_sTF, *vectors.conv, block)
        elif matrices.conv_shifts[0] is not None:
            shifts = [shift for shift in matrices.conv_shifts if shift is not None]
            feature_sTF.add_(to_dtype(cat(shifts), feature_sTF.dtype))
        feature_sTF.relu_()
    record.feature = feature_sTF


def scatter_backward(
    block: Block,
    grad_sTC: Tensor,
    to_features: Sequence[Tensor],
    matrices: Matrices,
    vectors: Vectors | None,
    gradients: Gradients,
    plan: Plan,
    record: Record,
    *,
    needs_expand: bool,
) -> Tensor:
    """The gradient of L, (s, G, T, r), from that of a block's output; adds to the gradients of the matrices.

    In a symmetric layer, it returns the gradient of Q, (s, G, T, D), instead.
    """
    assert record.feature is not None
    assert record.scatter_assign is not None
    assert record.assign_scales is not None
    assert gradients.features is not None
    grad_sTF = expand_backward(block, grad_sTC, matrices, vectors, gradients, plan, record, needs_expand=needs_expand)
    if plan.graph_conv:
        rectifier_backward_(grad_sTF, record.feature)
        if vectors is not None:
            assert record.convolved is not None
            assert record.convolved_statistics is not None
            grad_sTF, *pair = plan.conv_norm.backward(
                grad_sTF, record.convolved, vectors.conv[0], record.convolved_statistics, block
            )
            gradients.conv_vectors = add_pair(gradients.conv_vectors, pair)
        elif matrices.conv_shifts[0] is not None:
            shift = sum_of_nodes(grad_sTF, wide(plan.compute))
            gradients.conv_vectors = add_pair(gradients.conv_vectors, (None, shift))
    grads = []
    width = grad_sTF.shape[-1] // len(plan.latents)
    for index, (kernel, matrix_SGrD) in enumerate(zip(plan.kernels, to_features, strict=True)):
        own_sTR = grad_sTF if width == grad_sTF.shape[-1] else grad_sTF[..., index * width : (index + 1) * width]
        grad_sGTr = to_graphs(own_sTR, plan.groups)
        assign_sGTk = of_kernel(record.scatter_assign, kernel, plan)
        outers, products = [], []
        for grad, assign, matrix in zip(
            block.each_sample(grad_sGTr, 2),
            block.each_sample(assign_sGTk, 2),
            of_samples(matrix_SGrD, block),
            strict=True,
        ):
            outers.append(split_graphs(contract(graphs_of(grad), graphs_of(assign)), plan))
            products.append(product(grad, matrix.mT))
        outer_sGrD = cat(outers)
        if block.whole:
            gradients.features[index] = outer_sGrD
        else:
            gradients.features[index][block.samples].add_(outer_sGrD)
        grads.append(cat_nodes(products, 2))
    grad_sGTD = cat_nodes(grads, 3)
    if plan.symmetric:
        return grad_sGTD
    grad_sGTD = assign_unit_backward(grad_sGTD, record.scatter_assign, record.assign_scales, plan)
    rectifier_backward_(grad_sGTD, record.scatter_assign)
    return assignments_backward(1, block, grad_sGTD, matrices, vectors, gradients, plan, record)
