"""How much of a layer a program of the kernels holds at once, and which layers that leaves out; plain arithmetic."""

from typing import Any

import torch

# Small processors of recent years give 99 KiB of shared memory to a block: so much of it a matrix of the layer may
# have, so much the rows of a block's nodes, and so many numbers a row.
MATRIX_BYTES = 1 << 16
_ROWS_BYTES = 1 << 14
_WIDEST = 256


def padded(size: int) -> int:
    """The power of two that Triton's products take: 16 at least.

    Example:
        >>> padded(3), padded(64), padded(150)
        (16, 64, 256)
    """
    return max(1 << (size - 1).bit_length(), 16)


def fits(width: int, latents: int, dtype: torch.dtype) -> bool:
    """Whether a matrix of so many channels by so many latents leaves room for nodes.

    Example:
        >>> fits(128, 100, torch.float32), fits(128, 150, torch.float32), fits(128, 150, torch.bfloat16)
        (True, False, True)
    """
    width, latents = padded(width), padded(latents)
    return max(width, latents) <= _WIDEST and width * latents * dtype.itemsize <= MATRIX_BYTES


def nodes_of_block(widest: int, dtype: torch.dtype) -> int:
    """Nodes at a time: with rows of so many numbers, what a block holds of them fits beside a matrix.

    Example:
        >>> nodes_of_block(64, torch.float32), nodes_of_block(256, torch.float32)
        (64, 16)
    """
    return max(min(_ROWS_BYTES // (padded(widest) * dtype.itemsize), 64), 16)


def latents_of_block(nodes: int) -> int:
    """Latents that gather sums for at a time, beside so many nodes."""
    return min(2 * nodes, 64)


def options(width: int, latents: int) -> dict[str, Any]:
    """How the kernels are compiled; said in full because what Triton does without being asked changes by version."""
    return {"num_warps": 8 if max(width, latents) > 128 else 4, "enable_fp_fusion": True}
