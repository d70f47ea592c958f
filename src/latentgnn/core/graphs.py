"""Tensors over the nodes of a block, viewed as graphs: one graph for each sample and group.

Axes: s rows of the input, T nodes, C channels, G groups, H = ways * G (gather's groups before scatter's), r channels
of a group, D latents of all kernels in a group.
"""

from torch import Tensor

from latentgnn.core.layouts import nodes_innermost
from latentgnn.core.nodes import Block
from latentgnn.core.plan import Plan
from latentgnn.core.products import project_each


def to_graphs(x_sTF: Tensor, groups: int) -> Tensor:
    """View (s, T, G * r) as (s, G, T, r)."""
    if groups == 1:
        return x_sTF.unsqueeze(1)
    samples, nodes, channels = x_sTF.shape
    return x_sTF.view(samples, nodes, groups, channels // groups).transpose(1, 2)


def to_nodes(x_sGTr: Tensor) -> Tensor:
    """(s, G, T, r) as (s, T, G * r), in the same memory layout."""
    if x_sGTr.shape[1] == 1:
        return x_sGTr.squeeze(1)
    if nodes_innermost(x_sGTr):
        return x_sGTr.mT.flatten(1, 2).mT
    return x_sGTr.transpose(1, 2).flatten(2)


def graphs_of(x_sGTr: Tensor) -> Tensor:
    """(s, G, T, r) as (s * G, T, r), in the same memory layout."""
    if x_sGTr.shape[1] == 1:
        return x_sGTr.squeeze(1)
    if nodes_innermost(x_sGTr):
        return x_sGTr.mT.flatten(0, 1).mT
    return x_sGTr.flatten(0, 1)


def split_graphs(x_E: Tensor, plan: Plan) -> Tensor:
    """A tensor over graphs (s * G, ...) as (s, G, ...)."""
    return x_E.unsqueeze(1) if plan.groups == 1 else x_E.unflatten(0, (-1, plan.groups))


def of_way(x_sH: Tensor, way: int, plan: Plan) -> Tensor:
    """Gather's (0) or scatter's (1) part of a tensor over all graphs of a block."""
    if plan.symmetric or x_sH.shape[1] == plan.groups:
        return x_sH
    return x_sH[:, way * plan.groups : (way + 1) * plan.groups]


def of_kernel(assign_sGTD: Tensor, kernel: slice, plan: Plan) -> Tensor:
    return assign_sGTD if len(plan.latents) == 1 else assign_sGTD[..., kernel]


def of_samples(matrix_S: Tensor, block: Block) -> list[Tensor]:
    """A block's part of a tensor over all samples, split as `Block.each_sample` splits nodes."""
    own_S = matrix_S if block.whole else matrix_S[block.samples]
    several = block.bounds is not None and len(block.bounds) > 2
    return list(own_S.split(1)) if several else [own_S]


def product(x_sGTK: Tensor, matrix_sGOK: Tensor) -> Tensor:
    """x W^T with a matrix for each graph, (s, G, T, O)."""
    samples, groups = x_sGTK.shape[:2]
    if groups == 1:
        return project_each(x_sGTK.squeeze(1), matrix_sGOK.squeeze(1)).unsqueeze(1)
    y_ETO = project_each(graphs_of(x_sGTK), matrix_sGOK.flatten(0, 1))
    return y_ETO.unflatten(0, (samples, groups))
