"""Which nodes take part, of which sample, in which blocks.

A block is the unit of computation: some whole samples, some nodes of one sample, or consecutive scenes of packed
points. Inside a block, tensors over nodes are (s, T, channels) or (s, G, T, channels) whatever their strides: where
the input's nodes lie innermost in memory, so do those of all that is computed from it.

Axes: B batch, N nodes, S samples of all; in a block s rows, T nodes, G groups.
"""

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import pairwise

import torch
from torch import Tensor

# The least that recent processors have; used if the system does not say.
_USUAL_CACHE = 1 << 20
# On an accelerator small blocks have no advantage; only the largest inputs are cut, to bound the memory.
_ACCELERATOR_BYTES = 1 << 31


@dataclass(frozen=True)
class Block:
    """The position of a block in the input.

    Args:
        rows: of the input.
        nodes: of the input.
        samples: among all samples.
        bounds: for packed points, where each sample's nodes begin inside the block, and the end; otherwise ``None``,
            and each row is a sample.
        whole: the block is all of the input.
    """

    rows: slice
    nodes: slice
    samples: slice
    bounds: tuple[int, ...] | None = None
    whole: bool = False

    def of(self, x_BN: Tensor) -> Tensor:
        """The block's part of a tensor over all nodes."""
        return x_BN if self.whole else x_BN[self.rows, self.nodes]

    def valid(self, mask_BN: Tensor | None) -> Tensor | None:
        """Which of the block's nodes take part, (s, T, 1)."""
        return None if mask_BN is None else self.of(mask_BN).unsqueeze(-1)

    def each_sample(self, x: Tensor, dim: int) -> list[Tensor]:
        """A block's tensor, split by sample if several samples share a row."""
        if self.bounds is None or len(self.bounds) == 2:
            return [x]
        return [x.narrow(dim, first, last - first) for first, last in pairwise(self.bounds)]


def check_offsets(offsets: Sequence[int], points: int) -> None:
    """Refuse offsets that do not rise from 0 to the number of points."""
    if offsets[0] != 0 or offsets[-1] != points or any(last < first for first, last in pairwise(offsets)):
        shown = list(offsets) if len(offsets) <= 8 else [*offsets[:4], "...", *offsets[-3:]]
        raise ValueError(f"offsets must rise from 0 to the number of points, {points}; got {shown}")


def bounds_of(offsets: Tensor | None, x_BNC: Tensor) -> list[int] | None:
    """Offsets as a list of ints, checked."""
    if offsets is None:
        return None
    bounds = offsets.tolist()
    # The layer checks them too, but cannot read their values while a compiler traces it.
    check_offsets(bounds, x_BNC.shape[1])
    return bounds


def blocks(x_BNC: Tensor, offsets: Sequence[int] | None, most: int | None) -> list[Block]:
    """Cut an input into blocks of about ``most`` nodes, at most twice as many; ``None`` makes one block of all."""
    batch, nodes, _ = x_BNC.shape
    if offsets is not None:
        return list(_packed(offsets, max(nodes, 1) if most is None else most))
    if most is None or batch * nodes <= most:
        return [Block(slice(0, batch), slice(0, nodes), slice(0, batch), whole=True)]
    together = max(most // max(nodes, 1), 1)
    if most < nodes <= 2 * most:
        most = nodes  # A whole sample lies without gaps, and is multiplied without a copy.
    parts = []
    for first in range(0, batch, together):
        rows = slice(first, min(first + together, batch))
        parts += [Block(rows, nodes_of_part, rows) for nodes_of_part in _cut(0, nodes, most)]
    return parts


def _packed(offsets: Sequence[int], most: int) -> Iterator[Block]:
    """As many consecutive scenes as fit into a block; scenes that do not fit are cut."""
    row, sample, last_sample = slice(0, 1), 0, len(offsets) - 1
    while sample < last_sample:
        first, end = offsets[sample], sample + 1
        if offsets[end] - first > most:
            for part in _cut(first, offsets[end], most):
                yield Block(row, part, slice(sample, end), (0, part.stop - part.start))
        else:
            while end < last_sample and offsets[end + 1] - first <= most:
                end += 1
            bounds = tuple(offset - first for offset in offsets[sample : end + 1])
            yield Block(row, slice(first, offsets[end]), slice(sample, end), bounds)
        sample = end


def _cut(first: int, last: int, most: int) -> Iterator[slice]:
    """Pieces of equal length, of at most ``most`` nodes."""
    pieces = max(-(-(last - first) // most), 1)
    length = max(-(-(last - first) // pieces), 1)
    return (slice(start, min(start + length, last)) for start in range(first, last, length))


def nodes_per_block(device: torch.device, numbers: int) -> int:
    """The most nodes that a block should have, if ``numbers`` elements are computed per node."""
    if device.type == "cpu":
        # Measured: a block's results then roughly fit the cores' caches; smaller blocks would make more calls.
        return max(3 * _core_cache_bytes() * torch.get_num_threads() // (4 * numbers), 256)
    return max(_ACCELERATOR_BYTES // (4 * numbers), 256)


@cache
def _core_cache_bytes() -> int:
    """Second-level cache of one core."""
    try:
        size = os.sysconf("SC_LEVEL2_CACHE_SIZE")
    except (AttributeError, OSError, ValueError):
        size = 0
    return size if size > 0 else _USUAL_CACHE
