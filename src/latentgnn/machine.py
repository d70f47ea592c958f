"""What the machine offers, as far as the size of a tile depends on it."""

import os

import torch

# Where the system does not tell, what processors of recent years have at least.
_USUAL_CACHE = 1 << 20

# An accelerator hides nothing behind a small tile; only the largest inputs are cut, so that memory stays bounded.
_ACCELERATOR_BYTES = 1 << 31


def core_cache_bytes() -> int:
    """Second-level cache of one core."""
    try:
        return os.sysconf("SC_LEVEL2_CACHE_SIZE") or _USUAL_CACHE
    except (AttributeError, OSError, ValueError):
        return _USUAL_CACHE


def tile_bytes(device: torch.device) -> int:
    """Bytes that a tile and its intermediates may take."""
    if device.type != "cpu":
        return _ACCELERATOR_BYTES
    return 2 * core_cache_bytes() * torch.get_num_threads()
