"""Latent to visible, Q = l2(relu(norm(Psi L))), f = Y^T Q or relu(norm(G Y^T Q)), out = x + norm(U f): both directions.

Axes: s rows of the input, T nodes, C channels, S samples, G groups, r channels of a group, D latents of all kernels in
a group, F features of all kernels (K * R).
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from latentgnn.core.assign import assignments, assignments_backward
from latentgnn.core.graphs import cat, graphs_of, of_kernel, of_samples, product, to_graphs, to_nodes
from latentgnn.core.lengths import assign_unit_backward, rectifier_backward_, to_unit_length_
from latentgnn.core.moments import Moments, expansion, moments, moments_pay
from latentgnn.core.nodes import Block
from latentgnn.core.parameters import Matrices, Plan, Vectors
from latentgnn.core.products import (
    add_projection,
    add_scaled_projection,
    contract,
    contract_all,
    project,
    project_back,
    sum_of_nodes,
)
from latentgnn.core.records import Gradients, Record, add, add_pair
from latentgnn.functional import cast, wide


def features(
    block: Block,
    valid_sT1: Tensor | None,
    to_features: Sequence[Tensor],
    matrices: Matrices,
    vectors: Vectors | None,
    plan: Plan,
    record: Record,
) -> None:
    """What the output of a block is expanded from.

    Args:
        block: the block.
        valid_sT1: which of its nodes take part.
        to_features: of each kernel, (S, G, r, D_k), in the type of the products.
        matrices: of the layer.
        vectors: of norms with statistics.
        plan: of the layer.
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
        record.feature = plan.conv_norm.again(record.convolved, *vectors.conv, record.convolved_statistics).relu_()
        return
    parts = []
    for kernel, matrix_SGrD in zip(plan.kernels, to_features, strict=True):
        each = zip(
            block.each_sample(of_kernel(record.scatter_assign, kernel, plan), 2),
            of_samples(matrix_SGrD[block.samples], block),
            strict=True,
        )
        parts.append(to_nodes(cat([product(assign, matrix) for assign, matrix in each], 2)))
    feature_sTF = cat(parts, 2)
    if plan.graph_conv:
        if vectors is not None:
            record.convolved = feature_sTF
            feature_sTF, record.convolved_statistics = plan.conv_norm.normalize(feature_sTF, *vectors.conv, block)
        elif matrices.conv_shifts[0] is not None:
            shifts = [shift for shift in matrices.conv_shifts if shift is not None]
            feature_sTF.add_(cast(shifts[0] if len(shifts) == 1 else torch.cat(shifts), feature_sTF.dtype))
        feature_sTF.relu_()
    record.feature = feature_sTF


def expand(
    block: Block,
    x_sTC: Tensor,
    valid_sT1: Tensor | None,
    matrices: Matrices,
    vectors: Vectors | None,
    plan: Plan,
    record: Record,
    out_sTC: Tensor,
) -> None:
    """Write the output of a block."""
    assert record.feature is not None
    base_sTC = x_sTC if plan.residual else None
    if vectors is None:
        scale_C, shift_C = matrices.expand_scale, matrices.expand_shift
        add_scaled_projection(base_sTC, record.feature, matrices.expand, scale_C, shift_C, out_sTC)
    elif _takes_moments(x_sTC, record.feature, plan):
        of_features, _ = moments(record.feature)
        matrix_CF, shift_C, record.expanded_statistics = expansion(
            matrices.expand, of_features, *vectors.expand, plan.eps[-1]
        )
        add_projection(base_sTC, record.feature, matrix_CF, shift_C, out_sTC)
    else:
        record.expanded = project(record.feature, matrices.expand)
        y_sTC, record.expanded_statistics = plan.norm_at(-1).normalize(record.expanded, *vectors.expand, block)
        if base_sTC is None:
            out_sTC.copy_(y_sTC)
        else:
            torch.add(base_sTC, y_sTC, out=out_sTC)
    if valid_sT1 is not None:
        out_sTC.copy_(torch.where(valid_sT1, out_sTC, x_sTC))


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
    """From the gradient of a block's output to that of L, (s, G, T, r); adds to those of what the core multiplies by.

    In a symmetric layer it ends at Q, (s, G, T, D), which is P too.
    """
    assert record.feature is not None
    assert record.scatter_assign is not None
    assert record.assign_scales is not None
    assert gradients.features is not None
    feature_sTF = record.feature
    if vectors is None:
        if needs_expand:
            gradients.expand = add(gradients.expand, contract_all(grad_sTC, feature_sTF))
        if matrices.expand_shift is not None:
            gradients.expand_shift = add(gradients.expand_shift, sum_of_nodes(grad_sTC, wide(plan.compute)))
        matrix_CF, scale_C = matrices.expand, matrices.expand_scale
        if scale_C is not None and grad_sTC.shape[0] * grad_sTC.shape[1] < feature_sTF.shape[-1]:
            grad_sTC = cast(grad_sTC * scale_C, plan.compute)
        elif scale_C is not None:
            matrix_CF = matrix_CF * scale_C.unsqueeze(1)
    else:
        grad_sTC, matrix_CF, grad_moments = _statistics_backward(
            block, grad_sTC, matrices, vectors, gradients, plan, record
        )
    grad_sTF = project_back(grad_sTC, cast(matrix_CF, plan.compute))
    if vectors is not None and grad_moments is not None:
        grad_mean_F, grad_covariance_FF, centred_sTF = grad_moments
        count = feature_sTF.shape[0] * feature_sTF.shape[1]
        grad_sTF.add_(project(centred_sTF, grad_covariance_FF * (2 / count))).add_(grad_mean_F / count)
    if plan.graph_conv:
        rectifier_backward_(grad_sTF, feature_sTF)
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
    width = feature_sTF.shape[-1] // len(plan.latents)
    for index, (kernel, matrix_SGrD) in enumerate(zip(plan.kernels, to_features, strict=True)):
        grad_sGTr = to_graphs(grad_sTF[..., index * width : (index + 1) * width], plan.groups)
        assign_sGTk = of_kernel(record.scatter_assign, kernel, plan)
        outers, products = [], []
        for grad, assign, matrix in zip(
            block.each_sample(grad_sGTr, 2),
            block.each_sample(assign_sGTk, 2),
            of_samples(matrix_SGrD[block.samples], block),
            strict=True,
        ):
            outers.append(contract(graphs_of(grad), graphs_of(assign)).unflatten(0, (-1, plan.groups)))
            products.append(product(grad, matrix.mT))
        gradients.features[index][block.samples].add_(outers[0] if len(outers) == 1 else torch.cat(outers))
        grads.append(cat(products, 2))
    grad_sGTD = cat(grads, 3)
    if plan.symmetric:
        return grad_sGTD
    grad_sGTD = assign_unit_backward(grad_sGTD, record.scatter_assign, record.assign_scales, plan)
    rectifier_backward_(grad_sGTD, record.scatter_assign)
    return assignments_backward(1, block, grad_sGTD, matrices, vectors, gradients, plan, record)


def _takes_moments(x_sTC: Tensor, feature_sTF: Tensor, plan: Plan) -> bool:
    nodes, channels = x_sTC.shape[0] * x_sTC.shape[1], x_sTC.shape[2]
    return plan.norm == "batch" and moments_pay(nodes, feature_sTF.shape[2], channels)


def _statistics_backward(
    block: Block,
    grad_sTC: Tensor,
    matrices: Matrices,
    vectors: Vectors,
    gradients: Gradients,
    plan: Plan,
    record: Record,
) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor, Tensor] | None]:
    """Through the output's norm with statistics.

    Returns:
        What to multiply by what to come to the features' gradient, and what is to be added to it: the gradients of
        the features' mean and covariance, and the features less their mean.
    """
    assert record.feature is not None
    assert record.expanded_statistics is not None
    weight_C, bias_C = vectors.expand
    if record.expanded is not None or not _takes_moments(grad_sTC, record.feature, plan):
        expanded_sTC = record.expanded if record.expanded is not None else project(record.feature, matrices.expand)
        grad_sTC, *pair = plan.norm_at(-1).backward(grad_sTC, expanded_sTC, weight_C, record.expanded_statistics, block)
        gradients.expand = add(gradients.expand, contract_all(grad_sTC, record.feature))
        gradients.expand_vectors = add_pair(gradients.expand_vectors, pair)
        return grad_sTC, matrices.expand, None
    of_features, centred_sTF = moments(record.feature)
    norm = [None if vector is None else vector.detach().requires_grad_() for vector in (weight_C, bias_C)]
    matrix_CF = matrices.expand.detach().requires_grad_()
    leaves = Moments(*(tensor.detach().requires_grad_() for tensor in of_features))
    with torch.enable_grad():
        scaled_CF, shift_C, _ = expansion(matrix_CF, leaves, norm[0], norm[1], plan.eps[-1])
    outer_CF = contract_all(grad_sTC, record.feature)
    given = [outer_CF, sum_of_nodes(grad_sTC, outer_CF.dtype)]
    known = [vector for vector in norm if vector is not None]
    gradients.expand, grad_mean_F, grad_covariance_FF, *found = torch.autograd.grad(
        [scaled_CF, shift_C], [matrix_CF, *leaves, *known], given
    )
    vectors_found = iter(found)
    gradients.expand_vectors = (
        None if norm[0] is None else next(vectors_found),
        None if norm[1] is None else next(vectors_found),
    )
    symmetric_FF = (grad_covariance_FF + grad_covariance_FF.mT) / 2
    return grad_sTC, scaled_CF.detach(), (grad_mean_F, symmetric_FF, centred_sTF)
