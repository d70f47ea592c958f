"""Visible to latent, V = l2(norm(W x)), P = relu(norm(Psi V)), Z = sum of P V^T: forward, and its backward beside it.

Axes: s rows of the input, T nodes, C channels, G groups, H = ways * G (gather's groups before scatter's), r channels
of a group, D latents of all kernels in a group.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from latentgnn.core.nodes import Block, nodes_innermost
from latentgnn.core.parameters import Matrices, Plan, Vectors
from latentgnn.core.products import contract, contract_all, project, project_all, project_back, project_each
from latentgnn.core.statistics import Statistics, normalize, normalize_again, normalize_backward
from latentgnn.functional import EPS, cast, length, reciprocal, wide


@dataclass
class Record:
    """What a block has computed; what its backward pass needs, or will compute again.

    Args:
        raw: W x of every way before a norm with batch statistics, (s, T, ways * R).
        raw_statistics: that the norm took.
        unit: V, and after it L, of unit length, (s, H, T, r); L alone where the rest was let go.
        scale: what they were multiplied by, (s, H, T, 1).
        assigned: Psi V of each way before a norm with batch statistics, (s, T, G * D).
        assigned_statistics: that the norms took.
        gather_assign: P, (s, G, T, D); if symmetric of unit length over each kernel's latents.
        scatter_assign: Q, likewise, of unit length.
        assign_scales: what each kernel's part of Q was multiplied by, (s, G, T, 1).
        convolved: G O of all kernels before a norm with batch statistics, (s, T, K * R).
        convolved_statistics: that the norm took.
        feature: what the output is expanded from, (s, T, F).
        expanded: f U^T before a norm with batch statistics, (s, T, C), where these come from itself.
        expanded_statistics: that the norm took.
    """

    raw: Tensor | None = None
    raw_statistics: Statistics | None = None
    unit: Tensor | None = None
    scale: Tensor | None = None
    assigned: list[Tensor] | None = None
    assigned_statistics: list[Statistics] | None = None
    gather_assign: Tensor | None = None
    scatter_assign: Tensor | None = None
    assign_scales: list[Tensor] | None = None
    convolved: Tensor | None = None
    convolved_statistics: Statistics | None = None
    feature: Tensor | None = None
    expanded: Tensor | None = None
    expanded_statistics: Statistics | None = None


def to_graphs(x_sTF: Tensor, groups: int) -> Tensor:
    """A view (s, T, G * r) as (s, G, T, r): a group is one more graph."""
    if groups == 1:
        return x_sTF.unsqueeze(1)
    return x_sTF.unflatten(-1, (groups, -1)).transpose(1, 2)


def to_nodes(x_sGTr: Tensor) -> Tensor:
    """(s, G, T, r) as (s, T, G * r), with nodes innermost where they are."""
    if x_sGTr.shape[1] == 1:
        return x_sGTr.squeeze(1)
    if nodes_innermost(x_sGTr[0]):
        return x_sGTr.mT.flatten(1, 2).mT
    return x_sGTr.transpose(1, 2).flatten(2)


def graphs_of(x_sGTr: Tensor) -> Tensor:
    """(s, G, T, r) as (s * G, T, r), with nodes innermost where they are."""
    if nodes_innermost(x_sGTr[0]):
        return x_sGTr.mT.flatten(0, 1).mT
    return x_sGTr.flatten(0, 1)


def inverse_length(x: Tensor) -> Tensor:
    """1 / length of each row, and 0 for what has none: (..., 1) in the wide type."""
    if x.stride(-1) == 1:
        return reciprocal(length(x, -1))
    # Several times as fast on a CPU as `vector_norm` over what lies far apart.
    x = cast(x, wide(x.dtype))
    return torch.threshold((x * x).sum(-1, keepdim=True), EPS**2, math.inf).rsqrt_()


def unit_backward(grad: Tensor, unit: Tensor, scale: Tensor) -> Tensor:
    """From the gradient of rows of unit length to that of what they were, in the wide type."""
    grad, unit = cast(grad, scale.dtype), cast(unit, scale.dtype)
    along = (grad * unit).sum(-1, keepdim=True)
    return torch.addcmul(grad, unit, along, value=-1).mul_(scale)


def rectifier_backward_(grad: Tensor, value: Tensor) -> Tensor:
    """Zero the gradient in place where a ReLU gave zero."""
    return torch.ops.aten.threshold_backward.grad_input(grad, value, 0, grad_input=grad)


def values(x_sTC: Tensor, matrices: Matrices, vectors: Vectors | None, plan: Plan, record: Record) -> None:
    """V and L of a block: one product with both reductions, and unit length."""
    u_sTR, shift_R, down = record.raw, matrices.reduce_shift, None
    if u_sTR is None:
        weights: Sequence[Tensor] = matrices.reduces
        if plan.compute == torch.float16:
            # Rows longer than 1 may take a sum over channels out of float16's range; unit length comes next anyway.
            lengths = [torch.linalg.vector_norm(weight_RC, dim=1).amax() for weight_RC in weights]
            down = torch.stack(lengths).amax().clamp_min(1).reciprocal()
            weights = [weight_RC * down for weight_RC in weights]
            shift_R = None if shift_R is None else shift_R * down
        u_sTR = project_all(x_sTC, [cast(weight_RC, plan.compute) for weight_RC in weights])
    if vectors is not None:
        weight_R, bias_R = vectors.reduce
        if record.raw_statistics is None:
            record.raw = u_sTR
            u_sTR, record.raw_statistics = normalize(u_sTR, weight_R, bias_R, plan.eps[0])
        else:
            u_sTR = normalize_again(u_sTR, weight_R, bias_R, record.raw_statistics)
    else:
        u_sTR = _scaled_and_shifted(u_sTR, matrices.reduce_scale, shift_R)
    unit_sHTr = to_graphs(u_sTR, plan.ways * plan.groups)
    record.scale = inverse_length(unit_sHTr)
    if unit_sHTr.dtype == plan.compute:
        record.unit = unit_sHTr.mul_(record.scale)
    else:
        record.unit = (unit_sHTr * record.scale).to(plan.compute)
    if down is not None:
        record.scale = record.scale * down


def _scaled_and_shifted(u_sTR: Tensor, scale_R: Tensor | None, shift_R: Tensor | None) -> Tensor:
    if scale_R is None:
        return u_sTR
    assert shift_R is not None
    if u_sTR.dtype == scale_R.dtype:
        return torch.addcmul(shift_R, u_sTR, scale_R, out=u_sTR)
    return torch.addcmul(shift_R, u_sTR.to(scale_R.dtype), scale_R)


def of_way(x_sH: Tensor, way: int, plan: Plan) -> Tensor:
    """Gather's (0) or scatter's (1) part of a tensor over all graphs of a block."""
    if plan.symmetric or x_sH.shape[1] == plan.groups:
        return x_sH
    return x_sH[:, way * plan.groups : (way + 1) * plan.groups]


def assignments(
    way: int, block: Block, matrices: Matrices, vectors: Vectors | None, plan: Plan, record: Record
) -> Tensor:
    """relu(norm(Psi V)), (s, G, T, D)."""
    assert record.unit is not None
    value_sGTr = of_way(record.unit, way, plan)
    samples = value_sGTr.shape[0]
    if vectors is not None and record.assigned is not None and way < len(record.assigned):
        raw_sTF = record.assigned[way]
        assert record.assigned_statistics is not None
        y_sTF = normalize_again(raw_sTF, *vectors.assigns[way], record.assigned_statistics[way])
        return to_graphs(y_sTF, plan.groups).relu_()
    matrix_GDr, shift_F = cast(matrices.assigns[way], plan.compute), matrices.assign_shifts[way]
    shift_F = None if shift_F is None else cast(shift_F, plan.compute)
    if plan.groups == 1:
        y_sGTD = project(value_sGTr.squeeze(1), matrix_GDr[0], shift_F).unsqueeze(1)
    else:
        matrix_EDr = matrix_GDr if samples == 1 else matrix_GDr.repeat(samples, 1, 1)
        y_sGTD = project_each(graphs_of(value_sGTr), matrix_EDr).unflatten(0, (samples, -1))
        if shift_F is not None:
            y_sGTD.add_(shift_F.view(plan.groups, 1, -1))
    if vectors is None:
        return y_sGTD.relu_()
    raw_sTF = to_nodes(y_sGTD)
    y_sTF, statistics = normalize(raw_sTF, *vectors.assigns[way], plan.eps[plan.ways + way * len(plan.latents)])
    record.assigned = [*(record.assigned or []), raw_sTF]
    record.assigned_statistics = [*(record.assigned_statistics or []), statistics]
    return to_graphs(y_sTF, plan.groups).relu_()


def gather_assignments(
    block: Block, valid_sT1: Tensor | None, matrices: Matrices, vectors: Vectors | None, plan: Plan, record: Record
) -> None:
    """P of a block; if symmetric it is Q too."""
    assign_sGTD = assignments(0, block, matrices, vectors, plan, record)
    if valid_sT1 is not None:
        assign_sGTD.mul_(valid_sT1.unsqueeze(1))
    record.gather_assign = assign_sGTD
    if plan.symmetric:
        record.assign_scales = to_unit_length_(assign_sGTD, plan)
        record.scatter_assign = assign_sGTD


def to_unit_length_(assign_sGTD: Tensor, plan: Plan) -> list[Tensor]:
    """Divide each kernel's assignments by their length over its latents, in place; what they were multiplied by."""
    scales = []
    for kernel in plan.kernels:
        part = of_kernel(assign_sGTD, kernel, plan)
        scales.append(inverse_length(part))
        part.mul_(scales[-1])
    return scales


def of_kernel(assign_sGTD: Tensor, kernel: slice, plan: Plan) -> Tensor:
    return assign_sGTD if len(plan.latents) == 1 else assign_sGTD[..., kernel]


def sums(block: Block, record: Record, plan: Plan) -> tuple[Tensor, Tensor | None]:
    """A block's sums of values by assignments, (S, G, D, r), and what they will be divided by, (S, G, D)."""
    assert record.unit is not None
    assert record.gather_assign is not None
    values_sGTr = block.each_sample(of_way(record.unit, 0, plan), 2)
    assigns_sGTD = block.each_sample(record.gather_assign, 2)
    parts = [
        contract(graphs_of(assign), graphs_of(value)).unflatten(0, (-1, plan.groups))
        for assign, value in zip(assigns_sGTD, values_sGTr, strict=True)
    ]
    if plan.symmetric and plan.node_scale == "published":
        return _together(parts), None
    dtype = wide(plan.compute)
    if plan.node_scale == "mean":
        return _together(parts), _together([assign.sum(2, dtype=dtype) for assign in assigns_sGTD])
    return _together(parts), _together([_column_squares(assign, dtype) for assign in assigns_sGTD])


def _together(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _column_squares(x_sGTD: Tensor, dtype: torch.dtype) -> Tensor:
    """Sums of squares over nodes, (s, G, D)."""
    if nodes_innermost(x_sGTD[0]):
        return torch.linalg.vector_norm(x_sGTD, dim=2, dtype=dtype).square_()
    x_sGTD = x_sGTD.to(dtype)
    return (x_sGTD * x_sGTD).sum(2)


@dataclass
class Gradients:
    """Of what the core multiplies by, added up over blocks, in the wide type.

    Args:
        reduce: (ways * R, C), of the reductions times their scale.
        reduce_vectors: of scale and shift folded in, of which only the shift's is here, (None, shift); of a batch
            norm's weight and bias.
        assigns: (G, D, r) of each way.
        assign_vectors: likewise, of each way.
        features: of each kernel's matrix from assignments to features, (S, G, D_k, r).
        conv_vectors: of the graph convolution's norm, (K * R,).
        expand: (C, F), of the expansion times its scale.
        expand_shift: (C,).
        expand_vectors: of the weight and the bias of the output's batch norm, gamma in them.
    """

    reduce: Tensor | None = None
    reduce_vectors: tuple[Tensor | None, Tensor | None] = (None, None)
    assigns: list[Tensor | None] | None = None
    assign_vectors: list[tuple[Tensor | None, Tensor | None]] | None = None
    features: list[Tensor] | None = None
    conv_vectors: tuple[Tensor | None, Tensor | None] = (None, None)
    expand: Tensor | None = None
    expand_shift: Tensor | None = None
    expand_vectors: tuple[Tensor | None, Tensor | None] = (None, None)


def add(total: Tensor | None, part: Tensor) -> Tensor:
    """total + part, where the first part starts the total."""
    return part if total is None else total.add_(part)


def sum_of_nodes(grad_sTF: Tensor, dtype: torch.dtype) -> Tensor:
    """Sum over rows and nodes, (F,)."""
    if nodes_innermost(grad_sTF):
        return grad_sTF.sum(1, dtype=dtype).sum(0)
    return grad_sTF.sum((0, 1), dtype=dtype)


def assignments_backward(
    way: int,
    grad_sGTD: Tensor,
    matrices: Matrices,
    vectors: Vectors | None,
    gradients: Gradients,
    plan: Plan,
    record: Record,
) -> Tensor:
    """From the gradient of Psi V after its norm to that of V, (s, G, T, r); adds to those of Psi and its norm."""
    assert record.unit is not None
    assert gradients.assigns is not None
    assert gradients.assign_vectors is not None
    value_sGTr = of_way(record.unit, way, plan)
    samples = value_sGTr.shape[0]
    vector = gradients.assign_vectors[way]
    if vectors is not None:
        assert record.assigned is not None
        assert record.assigned_statistics is not None
        eps = plan.eps[plan.ways + way * len(plan.latents)]
        weight_F, statistics = vectors.assigns[way][0], record.assigned_statistics[way]
        grad_sTF, *vector_pair = normalize_backward(
            to_nodes(grad_sGTD), record.assigned[way], weight_F, statistics, eps
        )
        gradients.assign_vectors[way] = (vector_pair[0], vector_pair[1])
        grad_sGTD = to_graphs(grad_sTF, plan.groups)
    else:
        shift = sum_of_nodes(to_nodes(grad_sGTD), wide(plan.compute))
        gradients.assign_vectors[way] = (None, add(vector[1], shift))
    if plan.groups == 1:
        outer_GDr = contract_all(grad_sGTD.squeeze(1), value_sGTr.squeeze(1)).unsqueeze(0)
        gradients.assigns[way] = add(gradients.assigns[way], outer_GDr)
        return project_back(grad_sGTD.squeeze(1), cast(matrices.assigns[way][0], plan.compute)).unsqueeze(1)
    outer_EDr = contract(graphs_of(grad_sGTD), graphs_of(value_sGTr))
    gradients.assigns[way] = add(gradients.assigns[way], outer_EDr.unflatten(0, (samples, -1)).sum(0))
    matrix_ErD = matrices.assigns[way].mT.to(plan.compute).repeat(samples, 1, 1)
    return project_each(graphs_of(grad_sGTD), matrix_ErD).unflatten(0, (samples, -1))


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
    """From the gradients of the latents' sums, and of scatter's L, to that of W x, (s, T, ways * R).

    With norms that are affine maps, it is the gradient of W x times its scale.

    Args:
        block: the block.
        valid_sT1: which of its nodes take part.
        grad_scatter_sGTr: of L if asymmetric; of relu(norm(Psi V)) before its unit length, (s, G, T, D), if symmetric.
        grad_sums_SGDr: of the sums.
        grad_weights_SGD: of what they are divided by.
        matrices: of the layer.
        vectors: of norms with batch statistics.
        gradients: added to.
        plan: of the layer.
        record: of the block.
    """
    assert record.unit is not None
    assert record.scale is not None
    assert record.gather_assign is not None
    value_sGTr, assign_sGTD = of_way(record.unit, 0, plan), record.gather_assign
    grad_sums_SGDr, grad_weights_SGD = grad_sums_SGDr[block.samples], grad_weights_SGD[block.samples]
    pairs = zip(block.each_sample(value_sGTr, 2), _of_samples(grad_sums_SGDr, block), strict=True)
    grad_assign = _joined_nodes([_product(value, cast(grad, plan.compute)) for value, grad in pairs])
    if plan.node_scale == "mean":
        ones = [grad.unsqueeze(2) for grad in _of_samples(grad_weights_SGD, block)]
        parts = zip(block.each_sample(grad_assign, 2), ones, strict=True)
        for part, one in parts:
            part.add_(one.to(plan.compute))
    elif not plan.symmetric:
        doubled = (2 * grad_weights_SGD).to(plan.compute).unsqueeze(2)
        for part, assign, double in zip(
            block.each_sample(grad_assign, 2),
            block.each_sample(assign_sGTD, 2),
            _of_samples(doubled, block),
            strict=True,
        ):
            part.addcmul_(assign, double)
    if plan.symmetric:
        assert record.assign_scales is not None
        assert grad_scatter_sGTr is not None
        # Q is P: the gradients of both meet before the unit length.
        grad_assign = grad_assign.to(wide(plan.compute)).add_(grad_scatter_sGTr)
        grad_assign = assign_unit_backward(grad_assign, assign_sGTD, record.assign_scales, plan)
    rectifier_backward_(grad_assign, assign_sGTD)
    grad_value_sGTr = assignments_backward(0, grad_assign, matrices, vectors, gradients, plan, record)
    pairs = zip(block.each_sample(assign_sGTD, 2), _of_samples(grad_sums_SGDr, block), strict=True)
    grad_value_sGTr = grad_value_sGTr.add_(
        _joined_nodes([_product(assign, cast(grad.mT, plan.compute)) for assign, grad in pairs])
    )
    grads = [grad_value_sGTr]
    if not plan.symmetric:
        assert grad_scatter_sGTr is not None
        grads.append(grad_scatter_sGTr)
    grad_sHTr = grads[0] if plan.symmetric else _stacked(grads)
    grad_sHTr = unit_backward(grad_sHTr, record.unit, record.scale)
    if valid_sT1 is not None:
        grad_sHTr.mul_(valid_sT1.unsqueeze(1))
    grad_sTR = to_nodes(grad_sHTr)
    if vectors is None:
        if matrices.reduce_shift is not None:
            shift_R = sum_of_nodes(grad_sTR, grad_sTR.dtype)
            gradients.reduce_vectors = (None, add(gradients.reduce_vectors[1], shift_R))
        return cast(grad_sTR, plan.compute)
    assert record.raw is not None
    assert record.raw_statistics is not None
    grad_sTR, *vector_pair = normalize_backward(
        grad_sTR, record.raw, vectors.reduce[0], record.raw_statistics, plan.eps[0]
    )
    gradients.reduce_vectors = (vector_pair[0], vector_pair[1])
    return grad_sTR


def assign_unit_backward(grad_sGTD: Tensor, assign_sGTD: Tensor, scales: list[Tensor], plan: Plan) -> Tensor:
    """From the gradient of assignments of unit length to that of what they were, in the type of the products."""
    parts = [
        cast(unit_backward(grad_sGTD[..., kernel], assign_sGTD[..., kernel], scale), plan.compute)
        for kernel, scale in zip(plan.kernels, scales, strict=True)
    ]
    if len(parts) == 1:
        return parts[0]
    if nodes_innermost(grad_sGTD[0]):
        return torch.cat([part.mT for part in parts], 2).mT
    return torch.cat(parts, -1)


def _of_samples(matrix_S: Tensor, block: Block) -> list[Tensor]:
    """A tensor over a block's samples, cut to go with `Block.each_sample`."""
    several = block.bounds is not None and len(block.bounds) > 2
    return list(matrix_S.split(1)) if several else [matrix_S]


def _product(x_sGTK: Tensor, matrix_sGOK: Tensor) -> Tensor:
    """x W^T with a matrix for each graph, (s, G, T, O)."""
    samples = x_sGTK.shape[0]
    return project_each(graphs_of(x_sGTK), matrix_sGOK.flatten(0, 1)).unflatten(0, (samples, -1))


def _joined_nodes(parts: list[Tensor]) -> Tensor:
    """Parts of consecutive nodes as one, (s, G, T, r), with nodes innermost where they are."""
    if len(parts) == 1:
        return parts[0]
    if nodes_innermost(parts[0][0]):
        return torch.cat([part.mT for part in parts], -1).mT
    return torch.cat(parts, 2)


def _stacked(parts: list[Tensor]) -> Tensor:
    """Graphs of both ways as one, (s, H, T, r), with nodes innermost where they are."""
    if nodes_innermost(parts[0][0]):
        return torch.cat([part.mT for part in parts], 1).mT
    return torch.cat(parts, 1)
