"""The nodes of a layer's input as the kernels see them: maps or packed points, with or without a mask.

Axes: B rows of the input, N nodes of a row, S samples.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from itertools import pairwise

import torch
from torch import Tensor

from latentgnn.kernels.common import bytes_of

# Programs per multiprocessor, so that it stays busy while some wait for memory.
_PROGRAMS = 4
# Scenes of unequal size may be cut into this many times as many parts as scenes of equal size.
_UNEQUAL = 4


@dataclass(frozen=True)
class Rows:
    """Which nodes there are.

    Args:
        samples: S.
        nodes: N.
        most: nodes of the largest sample.
        valid: (B, N), which nodes take part, as bytes; ``None`` for all.
        bounds: (S + 1,), where each sample begins in the only row, and the end; ``None`` if rows are samples.
    """

    samples: int
    nodes: int
    most: int
    valid: Tensor | None
    bounds: Tensor | None

    @classmethod
    def of(cls, x_BNC: Tensor, mask_BN: Tensor | None, offsets: Sequence[int] | None) -> "Rows":
        """Of an input.

        Args:
            x_BNC: the input.
            mask_BN: nodes that take part.
            offsets: where each sample begins, as `Rows.bounds`.
        """
        batch, nodes, _ = x_BNC.shape
        if offsets is None:
            return cls(batch, nodes, nodes, bytes_of(mask_BN), None)
        bounds = torch.tensor(offsets).to(x_BNC.device, non_blocking=True)
        most = max(last - first for first, last in pairwise(offsets))
        return cls(len(offsets) - 1, nodes, most, bytes_of(mask_BN), bounds)

    def strides(self, x_BNF: Tensor) -> tuple[int, int, int]:
        """From sample to sample (0 where all are in one row), from node to node, and from channel to channel."""
        row, node, channel = x_BNF.stride()
        return (row if self.bounds is None else 0, node, channel)

    def splits(self, device: torch.device, blocks: int, block_nodes: int) -> tuple[int, int]:
        """Into how many parts a sample's nodes are cut, and how many nodes a part has.

        Args:
            device: where the kernels run.
            blocks: programs for each part.
            block_nodes: that a program holds at a time.
        """
        programs, largest = _PROGRAMS * multiprocessors(device), max(self.most, 1)
        splits = programs // max(self.samples * blocks, 1)
        if self.bounds is not None:
            # Small scenes finish early and leave the GPU to the largest; but each part needs memory for its sums.
            splits = min(programs * largest // max(self.nodes * blocks, 1), _UNEQUAL * max(splits, 1))
        splits = max(splits, 1)
        nodes = max(-(-max(self.most, 1) // splits), 1)
        nodes = -(-nodes // block_nodes) * block_nodes
        return max(-(-self.most // nodes), 1), nodes


@cache
def multiprocessors(device: torch.device) -> int:
    """The number of multiprocessors of a device; 2 if the kernels are interpreted."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2
