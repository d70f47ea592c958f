"""What the machine offers: its processor, how large a tile should be, which kernels to use, and memory that is quick to
touch.
"""

import ctypes
import os
import platform
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

# Where the system does not tell, what processors of recent years have at least.
_USUAL_CACHE = 1 << 20

# An accelerator hides nothing behind a small tile; only the largest inputs are cut, so that memory stays bounded.
_ACCELERATOR_BYTES = 1 << 31


def processor_name() -> str:
    """The name of the processor, with those of its instruction sets that matter to matrix products."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    model = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())
    flags = next((line.split() for line in lines if line.startswith("flags")), [])
    known = [flag for flag in ("avx2", "avx512f", "amx_tile") if flag in flags]
    return f"{model} ({', '.join(known)})" if known else model


@cache
def core_cache_bytes() -> int:
    """Second-level cache of one core."""
    try:
        size = os.sysconf("SC_LEVEL2_CACHE_SIZE")
    except (AttributeError, OSError, ValueError):
        size = 0
    return size if size > 0 else _USUAL_CACHE


def nodes_per_tile(device: torch.device, row: int) -> int:
    """How many nodes a tile should have at most.

    Args:
        device: where it lies.
        row: numbers that a tile holds for each node.
    """
    if device.type == "cpu":
        # As measured: what a tile holds lies about in the caches of the cores; more of smaller tiles cost more calls.
        return max(3 * core_cache_bytes() * torch.get_num_threads() // (4 * row), 256)
    return max(_ACCELERATOR_BYTES // (4 * row), 256)


def wants_triton(device: torch.device) -> bool:
    """Whether Triton kernels are asked for: ``LATENTGNN_TRITON=1`` in the environment, and a CUDA device."""
    return device.type == "cuda" and os.environ.get("LATENTGNN_TRITON", "0") == "1"


# Smaller tensors have few pages, and mostly lie in memory that was used before.
_LARGE = 4 << 20
_HUGE_PAGE = 2 << 20
_MADV_HUGEPAGE = 14


@cache
def _madvise() -> Callable[[int, int, int], int] | None:
    if not sys.platform.startswith("linux"):
        return None
    try:
        function = ctypes.CDLL(None, use_errno=True).madvise
    except (AttributeError, OSError):
        return None
    function.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    return function


def prefer_huge_pages(tensor: Tensor) -> Tensor:
    """Ask Linux to back a large new CPU tensor with huge pages, and return it.

    The first touch of each page of fresh memory costs more than reading and writing it; huge pages are 512 times
    fewer. It is a hint: where the system does not follow it, nothing changes.
    """
    size = tensor.numel() * tensor.element_size()
    madvise = _madvise() if tensor.device.type == "cpu" and size >= _LARGE else None
    if madvise is not None:
        first = -(-tensor.data_ptr() // _HUGE_PAGE) * _HUGE_PAGE
        length = (tensor.data_ptr() + size - first) // _HUGE_PAGE * _HUGE_PAGE
        if length > 0:
            madvise(first, length, _MADV_HUGEPAGE)
    return tensor
