"""The layer by the fastest path that its norms allow.

Norms that are affine maps (frozen or evaluation batch norm, none) are folded into the matrices, and the nodes are
taken in tiles (`latentgnn.tiles`), with nothing kept but the input. The others need statistics of what is before
them, and the layer is composed of PyTorch operations (`latentgnn.composed`); so it is in exported programs, which
must run where this library is not installed.
"""

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from latentgnn.composed import Nodes
from latentgnn.composed import latent_gnn as composed_latent_gnn
from latentgnn.folding import Projected
from latentgnn.functional import wide
from latentgnn.norms import affine
from latentgnn.operators import tiled
from latentgnn.tiles import Plan

if TYPE_CHECKING:
    from latentgnn.layers import LatentGNN


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
    projected = None if torch.compiler.is_exporting() else projections(layer, wide(compute))
    if projected is None:
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
    return tiled(x_BNC, mask_BN, offsets, projected, plan)


def projections(layer: "LatentGNN", dtype: torch.dtype) -> list[Projected] | None:
    """The layer's matrices with their norms and gamma as scales and shifts, ``None`` where a norm needs statistics."""
    kernels = layer.kernel_list
    parts = [layer.gather_reduce, layer.scatter_reduce]
    parts += [kernel.gather_assign for kernel in kernels] + [kernel.scatter_assign for kernel in kernels]
    parts += [*(kernel.graph_conv for kernel in kernels), layer.expand]
    found = []
    for part in parts:
        if part is None:
            continue
        known = as_affine(part.norm, part.weight, dtype)
        if known is None:
            return None
        found.append(Projected(part.weight, *known))
    if layer.config.residual:
        expand, gamma = found[-1], layer.gamma.to(dtype)
        found[-1] = expand._replace(scale=expand.scale * gamma, shift=expand.shift * gamma)
    return found


def as_affine(norm: nn.Module, weight_FC: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor] | None:
    """Scale and shift of a norm after a matrix, or ``None``."""
    if isinstance(norm, nn.Identity):
        return weight_FC.new_ones(weight_FC.shape[0], dtype=dtype), weight_FC.new_zeros(weight_FC.shape[0], dtype=dtype)
    known = affine(norm)
    return None if known is None else (known[0].to(dtype), known[1].to(dtype))
