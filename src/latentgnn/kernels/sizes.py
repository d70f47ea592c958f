"""How much of a layer a program of the kernels holds at once, and which layers that leaves out; plain arithmetic."""

from dataclasses import dataclass
from typing import Any

import torch

# Processors of recent years give 99 to 227 KiB of shared memory to a block: so much of it a matrix may have.
MATRIX_BYTES = 1 << 16
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


def latents_of_block(latents: int) -> int:
    """Latents that gather sums for at a time."""
    return min(padded(latents), 64)


@dataclass(frozen=True)
class Sizes:
    """What a program holds.

    Args:
        nodes: at a time.
        warps: that compute it.
    """

    nodes: int
    warps: int

    @classmethod
    def of(cls, width: int, latents: int, dtype: torch.dtype) -> "Sizes":
        """For a matrix of so many channels by so many latents."""
        widest = max(padded(width), padded(latents))
        return cls(nodes=32 if widest > 128 else 64, warps=8 if padded(width) * padded(latents) > 4096 else 4)

    def options(self) -> dict[str, Any]:
        """How the kernels are compiled; said in full because what Triton does without being asked changes."""
        return {"num_warps": self.warps, "num_stages": 1, "enable_fp_fusion": True}
