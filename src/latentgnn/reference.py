"""The layer as published, step by step and without regard to cost: for tests, docs and benchmarks.

Axes: B batch, C channels, N nodes, R reduced channels, D latents; nodes last, as in the published code.
"""

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from latentgnn.layer import LatentGNN
from latentgnn.norms import is_frozen
from latentgnn.points import PackedLatentGNN
from latentgnn.projections import Projection

EPS = 1e-12


def _norm(norm: nn.Module, y_BCN: Tensor) -> Tensor:
    if isinstance(norm, nn.LayerNorm | nn.RMSNorm):
        return cast(Tensor, norm(y_BCN.mT)).mT
    if is_frozen(norm) and norm.__class__.__name__.endswith("2d"):
        return cast(Tensor, norm(y_BCN.unsqueeze(-1))).squeeze(-1)
    return cast(Tensor, norm(y_BCN))


def _project(projection: Projection, x_BCN: Tensor, groups: int = 1) -> Tensor:
    return _norm(projection.norm, F.conv1d(x_BCN, projection.weight.unsqueeze(-1), groups=groups))


def _grouped(y_BCN: Tensor, groups: int) -> Tensor:
    """Reshape (B, G * C, N) to (B * G, C, N)."""
    return y_BCN.unflatten(1, (groups, -1)).flatten(0, 1)


def _ungrouped(y_ECN: Tensor, groups: int) -> Tensor:
    return y_ECN.unflatten(0, (-1, groups)).flatten(1, 2)


def _nodes_last(layer: LatentGNN, x: Tensor) -> Tensor:
    """The input as (B, C, N)."""
    if not isinstance(layer, PackedLatentGNN):
        return x.flatten(2)
    if x.dim() != 3:
        raise ValueError(
            f"for a PackedLatentGNN the reference takes tokens (B, N, C), got {tuple(x.shape)}; pass the points of "
            "each scene as x[None]"
        )
    return x.mT


def _as_input(layer: LatentGNN, y_BCN: Tensor, x: Tensor) -> Tensor:
    """Undo `_nodes_last`."""
    return y_BCN.mT if isinstance(layer, PackedLatentGNN) else y_BCN.unflatten(2, x.shape[2:])


def _steps(layer: LatentGNN, x_BCN: Tensor) -> list[tuple[Tensor, Tensor, Tensor, Tensor]]:
    """P, A, Q (with groups in the batch dimension) and O (B, R, N) of every kernel."""
    config = layer.config
    groups = config.num_groups
    v_ERN = F.normalize(_grouped(_project(layer.gather_reduce, x_BCN), groups), dim=1, eps=EPS)
    l_ERN = v_ERN
    if layer.scatter_reduce is not None:
        l_ERN = F.normalize(_grouped(_project(layer.scatter_reduce, x_BCN), groups), dim=1, eps=EPS)

    steps = []
    for kernel in layer.kernel_list:
        p_EDN = _grouped(F.relu(_project(kernel.gather_assign, _ungrouped(v_ERN, groups), groups)), groups)
        if kernel.scatter_assign is None:
            p_EDN = q_EDN = F.normalize(p_EDN, dim=1, eps=EPS)
        else:
            q_EDN = _grouped(F.relu(_project(kernel.scatter_assign, _ungrouped(l_ERN, groups), groups)), groups)
            q_EDN = F.normalize(q_EDN, dim=1, eps=EPS)
        if config.node_scale == "mean":
            p_EDN = p_EDN / p_EDN.sum(2, keepdim=True).clamp_min(EPS)
        elif not config.symmetric:
            p_EDN = F.normalize(p_EDN, dim=2, eps=EPS)
        z_EDR = p_EDN @ v_ERN.mT
        unit_EDR = F.normalize(z_EDR, dim=2, eps=EPS)
        a_EDD = torch.softmax(unit_EDR @ unit_EDR.mT, dim=2)
        o_BRN = _ungrouped((a_EDD @ z_EDR).mT @ q_EDN, groups)
        if kernel.graph_conv is not None:
            o_BRN = F.relu(_project(kernel.graph_conv, o_BRN, groups))
        steps.append((p_EDN, a_EDD, q_EDN, o_BRN))
    return steps


def forward(layer: LatentGNN, x: Tensor) -> Tensor:
    """Return the output of `layer` for `x`, (B, C, *spatial), by the published equations; updates running statistics.

    A `PackedLatentGNN` takes tokens (B, N, C).

    Raises:
        ValueError: packed points (T, C), which the published layer does not know.

    Example:
        >>> layer = LatentGNN(16, num_latents=4, gamma_init=1.0, dtype=torch.float64)
        >>> x = torch.randn(2, 16, 5, 6, dtype=torch.float64)
        >>> torch.allclose(forward(layer, x), layer(x))
        True
    """
    x_BCN = _nodes_last(layer, x)
    context_BFN = torch.cat([o_BRN for *_, o_BRN in _steps(layer, x_BCN)], 1)
    y_BCN = _project(layer.expand, context_BFN)
    if layer.config.residual:
        y_BCN = x_BCN + layer.gamma * y_BCN
    return _as_input(layer, y_BCN, x)


def dense_affinity(layer: LatentGNN, x: Tensor) -> Tensor:
    """Return the N x N affinity of each kernel and group of `layer`, Q^T A P: (B, kernels, groups, N, N).

    Row n contains the weights with which node n takes in the values V of all nodes.
    """
    batch = x.shape[0]
    affinities = [q_EDN.mT @ a_EDD @ p_EDN for p_EDN, a_EDD, q_EDN, _ in _steps(layer, _nodes_last(layer, x))]
    return torch.stack([affinity.unflatten(0, (batch, -1)) for affinity in affinities], 1)


def dense_forward(layer: LatentGNN, x: Tensor) -> Tensor:
    """Return the output of `layer` through `dense_affinity`: O(N^2), for layers without batch norm in training mode."""
    groups = layer.config.num_groups
    x_BCN = _nodes_last(layer, x)
    v_ERN = F.normalize(_grouped(_project(layer.gather_reduce, x_BCN), groups), dim=1, eps=EPS)
    contexts = []
    for kernel, affinity_BGNN in zip(layer.kernel_list, dense_affinity(layer, x).unbind(1), strict=True):
        o_BRN = _ungrouped(v_ERN @ affinity_BGNN.flatten(0, 1).mT, groups)
        contexts.append(o_BRN if kernel.graph_conv is None else F.relu(_project(kernel.graph_conv, o_BRN, groups)))
    y_BCN = _project(layer.expand, torch.cat(contexts, 1))
    if layer.config.residual:
        y_BCN = x_BCN + layer.gamma * y_BCN
    return _as_input(layer, y_BCN, x)
