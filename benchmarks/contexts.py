"""Other global-context layers to compare with; all take (B, C, *spatial)."""

from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from latentgnn import LatentGNN, functional, numerics
from latentgnn.errors import require
from latentgnn.projections import Projection


class AllNodes(nn.Module):
    """`scaled_dot_product_attention` over all nodes, as wide inside as the layer.

    Args:
        channels: C.
        reduction: C over the channels inside.
    """

    def __init__(self, channels: int, reduction: int) -> None:
        super().__init__()
        width = channels // reduction
        self.query, self.key, self.value = (nn.Linear(channels, width, bias=False) for _ in range(3))
        self.out = nn.Linear(width, channels, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        nodes = x.flatten(2).mT
        mixed = F.scaled_dot_product_attention(self.query(nodes), self.key(nodes), self.value(nodes))
        return x + self.out(mixed).mT.unflatten(2, x.shape[2:])


class LearnedQueries(nn.Module):
    """Gather and scatter as two calls of `scaled_dot_product_attention` with learned latent queries, as in FLARE.

    Args:
        channels: C.
        latents: number of queries.
        reduction: C over the channels inside.
    """

    def __init__(self, channels: int, latents: int, reduction: int) -> None:
        super().__init__()
        width = channels // reduction
        self.queries = nn.Parameter(torch.randn(latents, width))
        self.key, self.value = (nn.Linear(channels, width, bias=False) for _ in range(2))
        self.out = nn.Linear(width, channels, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        nodes = x.flatten(2).mT
        key, queries = self.key(nodes), self.queries.expand(x.shape[0], -1, -1)
        latents = F.scaled_dot_product_attention(queries, key, self.value(nodes))
        mixed = F.scaled_dot_product_attention(key, queries, latents)
        return x + self.out(mixed).mT.unflatten(2, x.shape[2:])


class SliceAttention(nn.Module):
    """Transolver's Physics-Attention: nodes are shared out among slices, slices attend to each other, nodes take back.

    Equations 1 to 5 of Wu et al., "Transolver: A Fast Transformer Solver for PDEs on General Geometries" (ICML 2024),
    for an irregular mesh, so that nothing in it knows a grid::

        w_i = softmax(project(x_i) / t)           how much of node i each slice takes, t learned a head
        z_j = sum_i w_ij x_i / sum_i w_ij         a slice is a weighted mean of its nodes
        z'  = softmax(q k^T / sqrt(c)) v          of q, k, v linear in z
        x_i = x_i + out(sum_j w_ij z'_j)

    Args:
        channels: C.
        slices: of a head.
        heads: number of heads that share the channels.
    """

    def __init__(self, channels: int, slices: int, heads: int) -> None:
        super().__init__()
        self.heads, width = heads, channels // heads
        self.norm = nn.LayerNorm(channels)
        self.chooser, self.values = nn.Linear(channels, channels), nn.Linear(channels, channels)
        self.project = nn.Linear(width, slices)
        self.temperature = nn.Parameter(torch.full((heads, 1, 1), 0.5))
        self.query, self.key, self.value = (nn.Linear(width, width, bias=False) for _ in range(3))
        self.out = nn.Linear(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        nodes = self.norm(x.flatten(2).mT)
        chooser, values = (
            made(nodes).unflatten(-1, (self.heads, -1)).transpose(1, 2) for made in (self.chooser, self.values)
        )
        weights = torch.softmax(self.project(chooser) / self.temperature, -1)  # (B, heads, N, slices)
        slices = weights.mT @ values / weights.sum(2)[..., None]
        mixed = F.scaled_dot_product_attention(self.query(slices), self.key(slices), self.value(slices))
        back = (weights @ mixed).transpose(1, 2).flatten(2)
        return x + self.out(back).mT.unflatten(2, x.shape[2:])


class NonLocal(nn.Module):
    """timm's non-local block, for any number of spatial dimensions.

    Args:
        channels: C.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        require("timm", extra="detection")
        from timm.layers.non_local_attn import NonLocalAttn

        self.block = NonLocalAttn(channels, rd_ratio=0.5, rd_divisor=1)  # type: ignore[no-untyped-call]
        # It starts as an identity, for which there would be nothing to check.
        nn.init.ones_(self.block.norm.weight)

    def forward(self, x: Tensor) -> Tensor:
        return cast(Tensor, self.block(x.flatten(2).unsqueeze(-1))).view_as(x)


class GlobalContext(nn.Module):
    """timm's block of GCNet: one vector for the whole map, from attention, that is added to every node.

    Args:
        channels: C.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        require("timm", extra="detection")
        from timm.layers.global_context import GlobalContext as Block

        self.block = Block(channels, fuse_add=True, fuse_scale=False, rd_ratio=1, rd_divisor=1)

    def forward(self, x: Tensor) -> Tensor:
        return cast(Tensor, self.block(x))


class Convolutions(nn.Sequential):
    """Additional 3 x 3 convolutions instead of context: the control for more parameters and operations.

    Args:
        channels: C.
        count: how many.
    """

    def __init__(self, channels: int, count: int) -> None:
        super().__init__(*(nn.Sequential(nn.Conv2d(channels, channels, 3, padding=1), nn.GELU()) for _ in range(count)))


class Unmixed(LatentGNN):
    """The layer without mixing, A = 1, to see what mixing brings.

    For one kernel in one group, two assignments and no graph convolution; options as `LatentGNN` has them.
    """

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        (kernel,) = self.kernel_list
        nodes = x.flatten(2)
        way = [(self.gather_reduce, kernel.gather_assign), (self.scatter_reduce, kernel.scatter_assign)]
        values = [numerics.l2(_projected(reduce, nodes).mT, -1) for reduce, _ in way]
        gathers, scatters = (
            torch.relu(_projected(assign, value.mT)).mT for (_, assign), value in zip(way, values, strict=True)
        )
        scale = functional.latent_scale(gathers, node_scale=self.config.node_scale)
        latents = functional.gather(values[0], gathers, scale)
        context = functional.scatter(latents, numerics.l2(scatters, -1))
        return x + self.gamma * _projected(self.expand, context.mT).view_as(x)


class FixedAssignments(LatentGNN):
    """The layer with assignment matrices and norms fixed at their initial values, to see what learning them brings.

    The values, which the assignments are computed from, are still trained, unless the reductions are fixed too.

    Args:
        channels: C.
        reductions: fix the reductions and their norms too.
        **options: as `LatentGNN` has them.
    """

    def __init__(self, channels: int, *, reductions: bool = False, **options: Any) -> None:
        super().__init__(channels, **options)
        layer = self.arrangement()
        fixed = [part for way in layer.assigns for part in way] + (list(layer.reduces) if reductions else [])
        for part in fixed:
            part.requires_grad_(False)


def _projected(projection: Projection | None, x_BCN: Tensor) -> Tensor:
    assert projection is not None
    return cast(Tensor, projection.norm(projection.weight @ x_BCN))
