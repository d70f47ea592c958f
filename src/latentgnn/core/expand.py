"""The last step of scatter, out = x + norm(U f): forward, and its backward beside it.

An affine norm is folded into U. Batch norm in training may take its statistics from the moments of f. Otherwise batch
and group norm are computed for some channels at a time, so that these are still in a cache for the norm, the sum with x
and the gradients; they are held only if everything is.

Axes: s rows of the input, T nodes, C channels, F features of all kernels (K * R); c channels of a part.
"""

import torch
from torch import Tensor

from latentgnn.by_size import moments_pay
from latentgnn.core.accumulate import NUMBERS_AT_ONCE, add_projection
from latentgnn.core.layouts import cat, empty_like_layout, laid_out_like, lie_together, nodes_innermost, not_a_view
from latentgnn.core.moments import Moments, expansion, moments
from latentgnn.core.nodes import Block
from latentgnn.core.parameters import Matrices, Vectors
from latentgnn.core.plan import Plan
from latentgnn.core.products import contract_all, project, project_back, sum_of_nodes
from latentgnn.core.records import Gradients, Record, add, add_pair
from latentgnn.core.statistics import GroupNorm, Norm
from latentgnn.numerics import to_dtype, wide

# A product of fewer channels is not worth its call.
_LEAST_CHANNELS = 64


def expand(
    block: Block,
    x_sTC: Tensor,
    valid_sT1: Tensor | None,
    matrices: Matrices,
    vectors: Vectors | None,
    plan: Plan,
    record: Record,
    out_sTC: Tensor | None,
) -> Tensor:
    """The output of a block, written to ``out`` if given."""
    assert record.feature is not None
    base_sTC = x_sTC if plan.residual else None
    if vectors is None:
        scale_C, shift_C = matrices.expand_scale, matrices.expand_shift
        out_sTC = add_projection(base_sTC, record.feature, matrices.expand, scale_C, shift_C, out_sTC)
    elif _takes_moments(x_sTC, record.feature, plan):
        of_features, _ = moments(record.feature)
        matrix_CF, shift_C, statistics = expansion(matrices.expand, of_features, *vectors.expand, plan.eps[-1])
        record.expanded_statistics = [statistics]
        out_sTC = add_projection(base_sTC, record.feature, matrix_CF, None, shift_C, out_sTC)
    else:
        record.expanded, record.expanded_statistics = [], []
        todo = _channel_parts(x_sTC, plan)
        if out_sTC is None and len(todo) > 1:
            out_sTC = empty_like_layout(x_sTC, x_sTC.shape[2])
        for part, norm in todo:
            expanded_sTc = project(record.feature, matrices.expand if len(todo) == 1 else matrices.expand[part])
            vectors_c = vectors.expand if len(todo) == 1 else _of_part(vectors, part)
            y_sTc, statistics = norm.normalize(expanded_sTc, *vectors_c, block, keep=plan.holds)
            y_sTc = laid_out_like(y_sTc, x_sTC)
            record.expanded_statistics.append(statistics)
            if plan.holds:
                record.expanded.append(expanded_sTc)
            if out_sTC is None and len(y_sTc) > 1 and nodes_innermost(y_sTc) and lie_together(y_sTc):
                # The samples of an output lie one after the other.
                out_sTC = empty_like_layout(x_sTC, x_sTC.shape[2])
            if out_sTC is None:
                assert base_sTC is not None
                out_sTC = not_a_view(y_sTc.add_(base_sTC))
            elif base_sTC is None:
                out_sTC[..., part].copy_(y_sTc)
            else:
                torch.add(base_sTC[..., part], y_sTc, out=out_sTC[..., part])
    assert out_sTC is not None
    if valid_sT1 is not None:
        out_sTC.copy_(torch.where(valid_sT1, out_sTC, x_sTC))
    return out_sTC


def expand_backward(
    block: Block,
    grad_sTC: Tensor,
    matrices: Matrices,
    vectors: Vectors | None,
    gradients: Gradients,
    plan: Plan,
    record: Record,
    *,
    needs_expand: bool,
) -> Tensor:
    """The gradient of the features, (s, T, F), from that of a block's output; adds to those of U and its norm."""
    assert record.feature is not None
    if vectors is not None:
        if _takes_moments(grad_sTC, record.feature, plan):
            return _through_moments(grad_sTC, matrices, vectors, gradients, plan, record)
        return _through_parts(block, grad_sTC, matrices, vectors, gradients, plan, record)
    if needs_expand:
        gradients.expand = add(gradients.expand, contract_all(grad_sTC, record.feature))
    if matrices.expand_shift is not None:
        gradients.expand_shift = add(gradients.expand_shift, sum_of_nodes(grad_sTC, wide(plan.compute)))
    matrix_CF, scale_C = matrices.expand, matrices.expand_scale
    if scale_C is not None and grad_sTC.shape[0] * grad_sTC.shape[1] < record.feature.shape[-1]:
        grad_sTC = to_dtype(grad_sTC * scale_C, plan.compute)
    elif scale_C is not None:
        matrix_CF = matrix_CF * scale_C.unsqueeze(1)
    return project_back(grad_sTC, to_dtype(matrix_CF, plan.compute))


def _takes_moments(x_sTC: Tensor, feature_sTF: Tensor, plan: Plan) -> bool:
    nodes, channels = x_sTC.shape[0] * x_sTC.shape[1], x_sTC.shape[2]
    return plan.norm == "batch" and moments_pay(nodes, feature_sTF.shape[2], channels)


def _channel_parts(x_sTC: Tensor, plan: Plan) -> list[tuple[slice, Norm]]:
    """The channels to expand at a time, each with its norm."""
    norm, channels = plan.norm_of(-1), x_sTC.shape[2]
    if plan.norm not in ("batch", "group"):
        return [(slice(0, channels), norm)]
    groups = norm.groups if isinstance(norm, GroupNorm) else channels
    width = max(NUMBERS_AT_ONCE // (x_sTC.shape[0] * x_sTC.shape[1]), _LEAST_CHANNELS)
    pieces = -(-channels // width)
    together = max(-(-groups // pieces), 1)
    parts: list[tuple[slice, Norm]] = []
    for first in range(0, groups, together):
        count = min(together, groups - first)
        part = slice(first * channels // groups, (first + count) * channels // groups)
        parts.append((part, GroupNorm(norm.eps, count) if isinstance(norm, GroupNorm) else norm))
    return parts


def _of_part(vectors: Vectors, part: slice) -> tuple[Tensor | None, Tensor | None]:
    weight_C, bias_C = vectors.expand
    return None if weight_C is None else weight_C[part], None if bias_C is None else bias_C[part]


def _through_parts(
    block: Block,
    grad_sTC: Tensor,
    matrices: Matrices,
    vectors: Vectors,
    gradients: Gradients,
    plan: Plan,
    record: Record,
) -> Tensor:
    assert record.feature is not None
    assert record.expanded_statistics is not None
    grad_sTF: Tensor | None = None
    outers: list[Tensor] = []
    pairs: list[tuple[Tensor | None, Tensor | None]] = []
    for index, (part, norm) in enumerate(_channel_parts(grad_sTC, plan)):
        matrix_cF, weight_c = matrices.expand[part], _of_part(vectors, part)[0]
        expanded_sTc = record.expanded[index] if record.expanded else project(record.feature, matrix_cF)
        grad_sTc, *pair = norm.backward(
            grad_sTC[..., part], expanded_sTc, weight_c, record.expanded_statistics[index], block
        )
        outers.append(contract_all(grad_sTc, record.feature))
        pairs.append((pair[0], pair[1]))
        product_sTF = project_back(grad_sTc, matrix_cF)
        grad_sTF = product_sTF if grad_sTF is None else grad_sTF.add_(product_sTF)
    assert grad_sTF is not None
    gradients.expand = add(gradients.expand, cat(outers))
    columns = ([vector for vector in column if vector is not None] for column in zip(*pairs, strict=True))
    gradients.expand_vectors = add_pair(
        gradients.expand_vectors, [torch.cat(column) if column else None for column in columns]
    )
    return grad_sTF


def _through_moments(
    grad_sTC: Tensor, matrices: Matrices, vectors: Vectors, gradients: Gradients, plan: Plan, record: Record
) -> Tensor:
    assert record.feature is not None
    weight_C, bias_C = vectors.expand
    of_features, centred_sTF = moments(record.feature)
    norm = [None if vector is None else vector.detach().requires_grad_() for vector in (weight_C, bias_C)]
    matrix_CF = matrices.expand.detach().requires_grad_()
    leaves = Moments(*(tensor.detach().requires_grad_() for tensor in of_features))
    with torch.enable_grad():
        scaled_CF, shift_C, _ = expansion(matrix_CF, leaves, norm[0], norm[1], plan.eps[-1])
    outer_CF = contract_all(grad_sTC, record.feature)
    given = [outer_CF, sum_of_nodes(grad_sTC, outer_CF.dtype)]
    known = [vector for vector in norm if vector is not None]
    gradients.expand, grad_mean_F, grad_covariance_FF, *of_vectors = torch.autograd.grad(
        [scaled_CF, shift_C], [matrix_CF, *leaves, *known], given
    )
    grads = iter(of_vectors)
    gradients.expand_vectors = (
        None if norm[0] is None else next(grads),
        None if norm[1] is None else next(grads),
    )
    symmetric_FF = (grad_covariance_FF + grad_covariance_FF.mT) / 2
    count = grad_sTC.shape[0] * grad_sTC.shape[1]
    grad_sTF = project_back(grad_sTC, scaled_CF.detach())
    return grad_sTF.add_(project(centred_sTF, symmetric_FF * (2 / count))).add_(grad_mean_F / count)
