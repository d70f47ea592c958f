"""Pages of large new tensors, mapped before they are first written.

Only on Linux, and only for tensors on a CPU.
"""

import ctypes
import mmap
import sys
from collections.abc import Callable
from functools import cache

from torch import Tensor

# Smaller tensors have few pages, and mostly reuse memory.
_LARGE = 4 << 20
_PAGE, _HUGE_PAGE = mmap.PAGESIZE, 2 << 20
_MADV_HUGEPAGE, _MADV_POPULATE_WRITE = 14, 23


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


def with_pages(tensor: Tensor) -> Tensor:
    """Ask Linux to map a large new CPU tensor's pages at once, as huge pages if possible; returns the tensor.

    The first touch of a page costs more than reading and writing it, and threads that touch the same new huge page wait
    for each other. If the system ignores the request, nothing changes.
    """
    size = tensor.numel() * tensor.element_size()
    if size < _LARGE or tensor.device.type != "cpu" or type(tensor) is not Tensor:
        return tensor
    madvise = _madvise()
    if madvise is not None:
        for page, advice in ((_HUGE_PAGE, _MADV_HUGEPAGE), (_PAGE, _MADV_POPULATE_WRITE)):
            first = -(-tensor.data_ptr() // page) * page
            length = (tensor.data_ptr() + size - first) // page * page
            if length > 0:
                madvise(first, length, advice)
    return tensor
