"""What the machine offers, as far as the size of a tile depends on it."""

import os
from functools import cache

import torch

# Where the system does not tell, what processors of recent years have at least.
_USUAL_CACHE = 16 << 20

# An accelerator hides nothing behind a small tile; only the largest inputs are cut, so that memory stays bounded.
_ACCELERATOR_BYTES = 1 << 31


@cache
def cache_bytes() -> int:
    """Half of the last-level cache: a tile's intermediates stay there, and leave room for its input."""
    for name in ("SC_LEVEL3_CACHE_SIZE", "SC_LEVEL2_CACHE_SIZE"):
        try:
            size = os.sysconf(name)
        except (AttributeError, OSError, ValueError):
            continue
        if size > 0:
            return size // 2
    return _USUAL_CACHE // 2


def nodes_per_tile(device: torch.device, row: int) -> int:
    """How many nodes a tile should have at most.

    Args:
        device: where it lies.
        row: numbers that a tile holds for each node.
    """
    if device.type == "cpu":
        return max(cache_bytes() // (4 * row), 256)
    return max(_ACCELERATOR_BYTES // (4 * row), 256)
