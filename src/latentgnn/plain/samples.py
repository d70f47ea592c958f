"""Which nodes take part in a layer, and which sample each belongs to, for the plain path.

Axes: B batch, N nodes, S samples (B, or the scenes of packed points), F features.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from latentgnn.core.layouts import cat
from latentgnn.modes import is_exporting


@dataclass(frozen=True)
class Nodes:
    """Which nodes take part, and which sample each belongs to.

    Args:
        mask_BN: nodes that take part; ``None`` for all.
        offsets: boundaries of the samples in a single row of packed nodes; ``None`` if each row is a sample.
        group: name of the process group that shares the nodes; empty if this process holds all of them.
        member_SN: replaces the offsets if their values are not known in advance: which nodes of the row belong to each
            sample. Every step then runs on all nodes for each sample, S times the work needed.
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
        """Split a tensor, with nodes in dimension 1, into parts whose rows are samples: one part, or one per scene."""
        if self.member_SN is not None:
            return [torch.where(_like(self.member_SN, x_BNF), x_BNF, 0)]
        if self.offsets is None:
            return [x_BNF]
        return [x_BNF[:, first:last] for first, last in pairwise(self.offsets)]

    def joined(self, parts: Sequence[Tensor]) -> Tensor:
        """Undo `split`."""
        if self.member_SN is not None:
            return torch.where(_like(self.member_SN, parts[0]), parts[0], 0).sum(0, keepdim=True)
        return cat(parts, 1)


def outside_unchanged(out_BNC: Tensor, x_BNC: Tensor, mask_BN: Tensor | None) -> Tensor:
    """The output where nodes take part, the input elsewhere, in the input's memory layout."""
    if mask_BN is None:
        return out_BNC
    # The input first: of tensors in several layouts, the first one's is that of the result.
    if not is_exporting() and x_BNC.stride(-1) != 1:
        return torch.where(~mask_BN.unsqueeze(1), x_BNC.mT, out_BNC.mT).mT
    return torch.where(~mask_BN.unsqueeze(-1), x_BNC, out_BNC)


def members(offsets: Tensor, nodes: int) -> Tensor:
    """Which of the nodes belong to each sample, (S, N), from offsets (S + 1,)."""
    index_N = torch.arange(nodes, device=offsets.device)
    return (offsets[:-1, None] <= index_N) & (index_N < offsets[1:, None])


def _like(member_SN: Tensor, x_BNF: Tensor) -> Tensor:
    return member_SN.view(*member_SN.shape, *[1] * (x_BNF.dim() - 2))
