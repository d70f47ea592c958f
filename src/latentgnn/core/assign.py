"""Assignments of gather and of scatter, relu(norm(Psi V)): forward, and its backward beside it.

Axes: s rows of the input, T nodes, C channels, G groups, H = ways * G (gather's groups before scatter's), r channels
of a group, D latents of all kernels in a group.
"""

from torch import Tensor

from latentgnn.core.batch_norm import batch_norm_again
from latentgnn.core.graphs import graphs_of, of_way, to_graphs, to_nodes
from latentgnn.core.nodes import Block
from latentgnn.core.parameters import Matrices, Vectors
from latentgnn.core.plan import Plan
from latentgnn.core.products import contract, contract_all, project, project_back, project_each, sum_of_nodes
from latentgnn.core.records import Gradients, Record, add, add_pair
from latentgnn.numerics import to_dtype, wide


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
        y_sTF = batch_norm_again(raw_sTF, *vectors.assigns[way], record.assigned_statistics[way])
        return to_graphs(y_sTF, plan.groups).relu_()
    matrix_GDr, shift_F = to_dtype(matrices.assigns[way], plan.compute), matrices.assign_shifts[way]
    shift_F = None if shift_F is None else to_dtype(shift_F, plan.compute)
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
    y_sTF, statistics = plan.assign_norm(way).normalize(raw_sTF, *vectors.assigns[way], block)
    record.assigned = [*(record.assigned or []), raw_sTF]
    record.assigned_statistics = [*(record.assigned_statistics or []), statistics]
    return to_graphs(y_sTF, plan.groups).relu_()


def assignments_backward(
    way: int,
    block: Block,
    grad_sGTD: Tensor,
    matrices: Matrices,
    vectors: Vectors | None,
    gradients: Gradients,
    plan: Plan,
    record: Record,
) -> Tensor:
    """The gradient of V, (s, G, T, r), from that of norm(Psi V); adds to the gradients of Psi and its norm."""
    assert record.unit is not None
    assert gradients.assigns is not None
    assert gradients.assign_vectors is not None
    value_sGTr = of_way(record.unit, way, plan)
    samples = value_sGTr.shape[0]
    if vectors is not None:
        assert record.assigned is not None
        assert record.assigned_statistics is not None
        weight_F, statistics = vectors.assigns[way][0], record.assigned_statistics[way]
        grad_sTF, *pair = plan.assign_norm(way).backward(
            to_nodes(grad_sGTD), record.assigned[way], weight_F, statistics, block
        )
        gradients.assign_vectors[way] = add_pair(gradients.assign_vectors[way], pair)
        grad_sGTD = to_graphs(grad_sTF, plan.groups)
    else:
        shift = sum_of_nodes(to_nodes(grad_sGTD), wide(plan.compute))
        gradients.assign_vectors[way] = add_pair(gradients.assign_vectors[way], (None, shift))
    if plan.groups == 1:
        outer_GDr = contract_all(grad_sGTD.squeeze(1), value_sGTr.squeeze(1)).unsqueeze(0)
        gradients.assigns[way] = add(gradients.assigns[way], outer_GDr)
        return project_back(grad_sGTD.squeeze(1), to_dtype(matrices.assigns[way][0], plan.compute)).unsqueeze(1)
    outer_EDr = contract(graphs_of(grad_sGTD), graphs_of(value_sGTr))
    gradients.assigns[way] = add(gradients.assigns[way], outer_EDr.unflatten(0, (samples, -1)).sum(0))
    matrix_ErD = matrices.assigns[way].mT.to(plan.compute).repeat(samples, 1, 1)
    return project_each(graphs_of(grad_sGTD), matrix_ErD).unflatten(0, (samples, -1))
