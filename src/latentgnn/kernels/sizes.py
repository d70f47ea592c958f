"""How much of a layer a program of the kernels holds, and which layers are too wide for it; plain arithmetic."""

from dataclasses import dataclass
from typing import Any

# The most reduced channels, rounded up to a power of two: a program holds all of a node's.
WIDEST = 256


def padded(size: int) -> int:
    """Rounded up to a power of two, at least 16, as Triton's products need.

    Example:
        >>> padded(3), padded(64), padded(150)
        (16, 64, 256)
    """
    return max(1 << (size - 1).bit_length(), 16)


def shared_bytes(width: int, element_size: int) -> int:
    """Shared memory that the most demanding kernel takes, as Triton compiled it, for so many reduced channels.

    Example:
        >>> shared_bytes(128, 4) >> 10, shared_bytes(256, 4) >> 10
        (99, 184)
    """
    return (184 if padded(width) > 128 and element_size > 2 else 99) << 10


@dataclass(frozen=True)
class Sizes:
    """What a program holds.

    Args:
        nodes: at a time.
        channels: all reduced ones.
        latents: at a time.
        warps: that compute it.

    Example:
        >>> Sizes.of(64)
        Sizes(nodes=32, channels=64, latents=32, warps=4)
        >>> Sizes.of(256)
        Sizes(nodes=16, channels=256, latents=32, warps=8)
    """

    nodes: int
    channels: int
    latents: int
    warps: int

    @classmethod
    def of(cls, width: int) -> "Sizes":
        """For a layer with so many reduced channels."""
        channels = padded(width)
        # Measured (docs/results.md): with more nodes, registers would spill to memory.
        return cls(
            nodes=max(min(2048 // channels, 64), 16),
            channels=channels,
            latents=32,
            warps=8 if channels > 128 else 4,
        )

    def options(self) -> dict[str, Any]:
        """Compiler options of the kernels; all are given because Triton's defaults change."""
        return {
            "BLOCK_N": self.nodes,
            "BLOCK_R": self.channels,
            "BLOCK_D": self.latents,
            "num_warps": self.warps,
            "num_stages": 1,
            "enable_fp_fusion": True,
        }
