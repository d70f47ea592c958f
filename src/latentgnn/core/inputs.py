"""A layer's input, cut into blocks.

Axes: B batch, N nodes, C channels, S samples; in a block s rows, T nodes.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from latentgnn.core.nodes import Block, blocks, nodes_per_block
from latentgnn.core.parameters import Matrices
from latentgnn.core.plan import Plan
from latentgnn.numerics import to_dtype


@dataclass(frozen=True)
class Input:
    """The nodes that a layer is given.

    Args:
        x_BNC: input; a transposed view is as good as a contiguous tensor.
        mask_BN: nodes that take part; the others are returned unchanged.
        todo: the blocks to compute.
    """

    x_BNC: Tensor
    mask_BN: Tensor | None
    todo: Sequence[Block]

    @classmethod
    def of(
        cls, x_BNC: Tensor, mask_BN: Tensor | None, offsets: Sequence[int] | None, matrices: Matrices, plan: Plan
    ) -> "Input":
        """Cut an input into blocks that suit the machine.

        Args:
            x_BNC: input.
            mask_BN: nodes that take part.
            offsets: boundaries of the samples in a single row of packed nodes; ``None`` if each row is a sample.
            matrices: the layer's matrices.
            plan: the layer's plan.
        """
        if plan.norm == "batch":
            return cls(x_BNC, mask_BN, blocks(x_BNC, offsets, None))
        reduced, latents = matrices.reduces[0].shape[0], plan.groups * sum(plan.latents)
        numbers = 3 * reduced + 2 * latents + (x_BNC.shape[2] if plan.norm in ("layer", "rms") else 0)
        most = nodes_per_block(x_BNC.device, numbers)
        if plan.norm == "group":
            # Samples stay whole, because group norm's statistics are over all nodes of a sample.
            largest = x_BNC.shape[1] if offsets is None else max(last - first for first, last in pairwise(offsets))
            most = max(most, largest)
        return cls(x_BNC, mask_BN, blocks(x_BNC, offsets, most))

    @property
    def samples(self) -> int:
        """How many samples there are, S."""
        return self.todo[-1].samples.stop

    @property
    def is_one_block(self) -> bool:
        """Whether all is computed at once."""
        return len(self.todo) == 1 and self.todo[0].whole


def in_products(x_BNC: Tensor, block: Block, valid_sT1: Tensor | None, matrices: Matrices, plan: Plan) -> Tensor:
    """A block of the input, or of the output's gradient, in the dtype of the products.

    Nodes outside the mask become 0: they may hold NaN.
    """
    x_sTC = to_dtype(block.of(x_BNC), plan.compute)
    if plan.in_rows and sum(len(matrix_RC) for matrix_RC in matrices.reduces) >= x_sTC.shape[2]:
        # Norms over a node's channels need them contiguous, and the reductions do not have fewer channels.
        x_sTC = x_sTC.contiguous()
    return x_sTC if valid_sT1 is None else torch.where(valid_sT1, x_sTC, 0)
