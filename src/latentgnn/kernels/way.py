"""The inputs that gather's and scatter's kernels have in common, in the order of their arguments."""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from latentgnn.kernels.common import EPS2, projections_in, sums_in
from latentgnn.kernels.rows import Rows
from latentgnn.kernels.sizes import Sizes
from latentgnn.kernels.weights import Projected


@dataclass(frozen=True)
class Way:
    """The inputs of gather or of scatter: reduced channels of all nodes, and what turns them into assignments.

    Args:
        raw_BNR: W x of the way's reduction, any strides.
        up: what that is multiplied by, (1,); ``None`` for 1.
        rows: the nodes.
        reduce: the reduction's norm.
        assign: Psi, (D, R) in the dtype of the products, and its norm.
    """

    raw_BNR: Tensor
    up: Tensor | None
    rows: Rows
    reduce: Projected
    assign: Projected

    @property
    def latents(self) -> int:
        """D."""
        return self.assign.matrix.shape[0]

    @property
    def width(self) -> int:
        """R."""
        return self.assign.matrix.shape[1]

    @cached_property
    def sizes(self) -> Sizes:
        """What a program holds."""
        return Sizes.of(self.width)

    @property
    def blocks(self) -> int:
        """Into how many the latents are cut."""
        return -(-self.latents // self.sizes.latents)

    @property
    def tensors(self) -> tuple[Tensor | None, ...]:
        """The kernels' first arguments."""
        rows = self.rows
        return self.raw_BNR, self.up, rows.valid, rows.bounds, *self.reduce.norm, self.assign.matrix, *self.assign.norm

    @property
    def eps(self) -> tuple[float, float]:
        """Of the two norms."""
        return self.reduce.eps, self.assign.eps

    @property
    def shape(self) -> tuple[int, int]:
        """R and D, in the order of the kernels' arguments."""
        return self.width, self.latents

    @property
    def options(self) -> dict[str, Any]:
        """What the kernels are compiled for, and how."""
        return {"EPS2": EPS2, "PROJECTIONS": projections_in(), "SUMS": sums_in(), **self.sizes.options()}

    def splits(self, blocks: int = 1) -> tuple[int, int]:
        """Into how many parts a sample's nodes are cut, and how many nodes a part has.

        Args:
            blocks: programs for each part.
        """
        return self.rows.splits(self.raw_BNR.device, blocks, self.sizes.nodes)

    def new(self, *shape: int) -> Tensor:
        """New float32 memory."""
        return self.raw_BNR.new_empty(shape, dtype=torch.float32)
