"""Which nodes take part in a layer, and which sample each belongs to, for the plain path.

Axes: B batch, N nodes, S samples (B, or the scenes of packed points), F features.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor


@dataclass(frozen=True)
class Nodes:
    """Which nodes take part, and which sample each belongs to.

    Args:
        mask_BN: nodes that take part; ``None`` for all.
        offsets: where each sample begins among the nodes of a single row, and the end; ``None`` if rows are samples.
        group: the name of the process group whose processes hold the nodes; empty where this one holds all.
        member_SN: instead of the offsets where these are not known in advance, which nodes of a single row belong to
            each sample; what is done for each sample is then done for all nodes, S times as often as needed.
    """

    mask_BN: Tensor | None = None
    offsets: Sequence[int] | None = None
    group: str = ""
    member_SN: Tensor | None = None

    @property
    def are_packed(self) -> bool:
        """Whether several samples share a row."""
        return self.offsets is not None or self.member_SN is not None

    def split(self, x_BNF: Tensor) -> list[Tensor]:
        """Parts whose rows are samples: all at once, or one for each scene; nodes are in the second dimension."""
        if self.member_SN is not None:
            return [torch.where(_like(self.member_SN, x_BNF), x_BNF, 0)]
        if self.offsets is None:
            return [x_BNF]
        return [x_BNF[:, first:last] for first, last in pairwise(self.offsets)]

    def joined(self, parts: Sequence[Tensor]) -> Tensor:
        """The rows that `split` took apart."""
        if self.member_SN is not None:
            return torch.where(_like(self.member_SN, parts[0]), parts[0], 0).sum(0, keepdim=True)
        return parts[0] if len(parts) == 1 else torch.cat(list(parts), 1)


def members(offsets: Tensor, nodes: int) -> Tensor:
    """Which of the nodes belong to each sample, (S, N), from offsets (S + 1,)."""
    index_N = torch.arange(nodes, device=offsets.device)
    return (offsets[:-1, None] <= index_N) & (index_N < offsets[1:, None])


def _like(member_SN: Tensor, x_BNF: Tensor) -> Tensor:
    return member_SN.view(*member_SN.shape, *[1] * (x_BNF.dim() - 2))
