"""Other layers of global context, which the layer is measured beside; all take (B, C, *spatial)."""

from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from latentgnn.errors import require


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
    """Gather and scatter by two `scaled_dot_product_attention` with learned latent queries, as FLARE does.

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
        # It starts as an identity, which would leave nothing to check.
        nn.init.ones_(self.block.norm.weight)

    def forward(self, x: Tensor) -> Tensor:
        return cast(Tensor, self.block(x.flatten(2).unsqueeze(-1))).view_as(x)
