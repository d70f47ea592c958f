"""The layer by the fastest path that its norms allow.

Norms that are affine maps (frozen or evaluation batch norm, none) are folded into the matrices, and the nodes are
taken in tiles (`latentgnn.tiles`), with nothing kept but the input. The others need statistics of what is before
them, and the layer is composed of PyTorch operations (`latentgnn.composed`); so it is in exported programs, which
must run where this library is not installed.
"""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from latentgnn.composed import Nodes
from latentgnn.composed import latent_gnn as composed_latent_gnn
from latentgnn.functional import wide
from latentgnn.norms import fold
from latentgnn.operators import tiled
from latentgnn.tiles import Plan, Weights

if TYPE_CHECKING:
    from latentgnn.layers import LatentGNN, Projection


def latent_gnn(
    layer: "LatentGNN", x_BNC: Tensor, mask_BN: Tensor | None, offsets: Tensor | None, compute: torch.dtype
) -> Tensor:
    """The layer's output for nodes in the last dimension but one.

    Args:
        layer: the parameters.
        x_BNC: input; a transposed view is as good as a contiguous tensor.
        mask_BN: nodes that take part; the others come back unchanged.
        offsets: (S + 1,), where each sample begins among the nodes of a single row, and the end; ``None`` if rows are
            samples.
        compute: type of the products over nodes; what is summed over nodes and every norm is at least float32.

    Returns:
        (B, N, C) in the input's type and order of strides.
    """
    weights = None if torch.compiler.is_exporting() else folded(layer, wide(compute))
    if weights is None:
        return composed_latent_gnn(layer, x_BNC, Nodes(mask_BN, None if offsets is None else offsets.tolist()), compute)
    config = layer.config
    plan = Plan(
        groups=config.num_groups,
        latents=config.latents,
        symmetric=config.symmetric,
        graph_conv=config.graph_conv,
        residual=config.residual,
        node_scale=config.node_scale,
        compute=compute,
    )
    return tiled(x_BNC, mask_BN, offsets, weights, plan)


def folded(layer: "LatentGNN", dtype: torch.dtype) -> Weights | None:
    """The layer's matrices with its norms and gamma in them, ``None`` where a norm needs statistics."""
    groups, kernels = layer.config.num_groups, layer.kernel_list
    affines = {id(projection): _affine(projection, dtype) for projection in layer.projections}
    known = {key: affine for key, affine in affines.items() if affine is not None}
    if len(known) < len(affines):
        return None

    def of_groups(projection: "Projection | None") -> Tensor:
        return known[id(projection)].unflatten(0, (groups, -1))

    reduces = [part for part in (layer.gather_reduce, layer.scatter_reduce) if part is not None]
    gather_assign = torch.cat([of_groups(kernel.gather_assign) for kernel in kernels], 1)
    symmetric = layer.config.symmetric
    expand = known[id(layer.expand)]
    return Weights(
        reduce=torch.cat([known[id(part)] for part in reduces]),
        gather_assign=gather_assign,
        scatter_assign=gather_assign
        if symmetric
        else torch.cat([of_groups(kernel.scatter_assign) for kernel in kernels], 1),
        graph_conv=torch.stack([of_groups(kernel.graph_conv) for kernel in kernels])
        if layer.config.graph_conv
        else None,
        expand=expand * layer.gamma.to(dtype) if layer.config.residual else expand,
    )


def _affine(projection: "Projection", dtype: torch.dtype) -> Tensor | None:
    """A matrix and its shift, (out, in + 1), with the norm folded in."""
    folded = fold([projection.norm], projection.weight.to(dtype))
    if folded is None:
        return None
    weight_FC, shift_F = folded
    shift_F = weight_FC.new_zeros(weight_FC.shape[0]) if shift_F is None else shift_F.to(weight_FC.dtype)
    return torch.cat([weight_FC, shift_F.unsqueeze(1)], 1)
