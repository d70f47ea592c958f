"""Products over the nodes of samples: of each node with a matrix, and sums over nodes.

Axes: s rows of the input, T nodes, M = s * T; E graphs (samples by groups); C, F, K, O channels.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from latentgnn.core.layouts import columns, from_columns, lie_together, nodes_innermost, sample_parts
from latentgnn.core.routines import outer, takes_onednn
from latentgnn.numerics import sum_in_range, to_dtype, wide


def _by_samples(x_sTC: Tensor) -> bool:
    """Whether to multiply samples that are not side by side as a batch, instead of copying them together."""
    return x_sTC.device.type != "cpu" and not lie_together(x_sTC)


def project(x_sTC: Tensor, matrix_OC: Tensor, shift_O: Tensor | None = None) -> Tensor:
    """x W^T + shift, (s, T, O), in the memory layout of ``x``."""
    samples, nodes, channels = x_sTC.shape
    if not nodes_innermost(x_sTC):
        return outer(x_sTC.reshape(-1, channels), matrix_OC, shift_O).view(samples, nodes, matrix_OC.shape[0])
    if _by_samples(x_sTC):
        y_sTO = torch.bmm(matrix_OC.expand(samples, -1, -1), x_sTC.mT).mT
        return y_sTO if shift_O is None else y_sTO.add_(shift_O)
    if shift_O is not None and samples == 1 and not takes_onednn(matrix_OC, nodes):
        return torch.addmm(shift_O.unsqueeze(1), matrix_OC, x_sTC[0].mT).mT.unsqueeze(0)
    if samples == 1:
        y_OM = outer(matrix_OC, x_sTC[0])
    elif len(parts := list(sample_parts(x_sTC))) == 1:
        y_OM = outer(matrix_OC, columns(x_sTC).mT)
    else:
        y_OM = x_sTC.new_empty(matrix_OC.shape[0], samples * nodes)
        for part in parts:
            columns_CM = columns(x_sTC[part])
            y_OM.narrow(1, part.start * nodes, columns_CM.shape[1]).copy_(outer(matrix_OC, columns_CM.mT))
    if shift_O is not None:
        y_OM.add_(shift_O.unsqueeze(1))
    return from_columns(y_OM, samples)


def project_back(grad_sTO: Tensor, matrix_OC: Tensor) -> Tensor:
    """g W, the gradient of x where `project` gave x W^T: (s, T, C), with nodes innermost where they are in ``grad``."""
    return project(grad_sTO, matrix_OC.mT)


def project_all(x_sTC: Tensor, matrices_RC: Sequence[Tensor], shift_R: Tensor | None = None) -> Tensor:
    """x W^T + shift for stacked matrices, (s, T, rows of all)."""
    if len(matrices_RC) == 1:
        return project(x_sTC, matrices_RC[0], shift_R)
    samples, nodes, channels = x_sTC.shape
    if samples * nodes >= channels // 2:
        return project(x_sTC, torch.cat(list(matrices_RC)), shift_R)
    # With few nodes, joining the matrices would take longer than it saves.
    if shift_R is not None:
        return project_all(x_sTC, matrices_RC).add_(shift_R)
    if not nodes_innermost(x_sTC):
        return torch.cat([project(x_sTC, matrix_RC) for matrix_RC in matrices_RC], -1)
    if _by_samples(x_sTC):
        return torch.cat([project(x_sTC, matrix_RC).mT for matrix_RC in matrices_RC], 1).mT
    columns_MC = columns(x_sTC).mT
    return from_columns(torch.cat([outer(matrix_RC, columns_MC) for matrix_RC in matrices_RC]), samples)


def project_each(x_ETK: Tensor, matrix_EOK: Tensor) -> Tensor:
    """x W^T with a matrix for each graph, (E, T, O), in the memory layout of ``x``."""
    graphs, nodes, _ = x_ETK.shape
    if graphs == 1:
        return project(x_ETK, matrix_EOK[0])
    if not nodes_innermost(x_ETK):
        return torch.bmm(x_ETK, matrix_EOK.mT)
    if x_ETK.device.type != "cpu":
        return torch.bmm(matrix_EOK, x_ETK.mT).mT
    y_EOT = x_ETK.new_empty(matrix_EOK.shape[1], graphs, nodes).transpose(0, 1)
    return torch.bmm(matrix_EOK, x_ETK.mT, out=y_EOT).mT


def contract(left_ETF: Tensor, right_ETK: Tensor) -> Tensor:
    """left^T right, the sum over the nodes of each graph, (E, F, K), in the wide dtype."""
    if left_ETF.dtype == torch.float16:
        return sum_in_range(left_ETF, right_ETK)
    if left_ETF.shape[0] == 1:
        return contract_all(left_ETF, right_ETK).unsqueeze(0)
    return to_dtype(torch.bmm(left_ETF.mT, right_ETK), wide(left_ETF.dtype))


def contract_all(left_sTF: Tensor, right_sTK: Tensor) -> Tensor:
    """left^T right, the sum over the nodes of all rows, (F, K), in the wide dtype."""
    if left_sTF.dtype == torch.float16:
        return contract(left_sTF, right_sTK).sum(0)
    dtype = wide(left_sTF.dtype)
    if _by_samples(left_sTF) or _by_samples(right_sTK):
        return to_dtype(torch.bmm(left_sTF.mT, right_sTK), dtype).sum(0)
    if lie_together(left_sTF) and lie_together(right_sTK):
        return to_dtype(outer(columns(left_sTF), columns(right_sTK)), dtype)
    total_FK: Tensor | None = None
    apart = right_sTK if lie_together(left_sTF) else left_sTF
    for part in sample_parts(apart):
        product_FK = to_dtype(outer(columns(left_sTF[part]), columns(right_sTK[part])), dtype)
        total_FK = product_FK if total_FK is None else total_FK.add_(product_FK)
    assert total_FK is not None
    return total_FK


def sum_of_nodes(x_sTF: Tensor, dtype: torch.dtype) -> Tensor:
    """Sum over rows and nodes, (F,)."""
    if nodes_innermost(x_sTF):
        return x_sTF.sum(1, dtype=dtype).sum(0)
    return x_sTF.sum((0, 1), dtype=dtype)
