"""How tensors over nodes lie in memory: nodes or channels innermost, samples apart or side by side.

If nodes are innermost, results for several samples on a CPU have the nodes of all samples side by side in memory,
(channels, s * T), so that a projection is one matrix product instead of one per sample.

Axes: s rows of the input, T nodes, M = s * T, C channels.
"""

import ctypes
import mmap
import sys
from collections.abc import Callable, Iterator
from functools import cache

import torch
from torch import Tensor, nn

# Samples are put side by side up to this many nodes in all; larger ones are as fast one by one, without a copy.
_NODES_AT_ONCE = 2048


def is_plain(x: Tensor) -> bool:
    """Whether a tensor is a plain tensor; a DTensor, for example, has no oneDNN products and no storage of its own."""
    return type(x) in (Tensor, nn.Parameter)


def nodes_innermost(x_sTC: Tensor) -> bool:
    """Whether nodes are innermost in memory, as in a contiguous (B, C, N)."""
    return x_sTC.stride(-1) != 1 or (x_sTC.shape[-1] == 1 and x_sTC.shape[-2] > 1 and x_sTC.stride(-2) == 1)


def empty_like_layout(x_sTC: Tensor, channels: int, dtype: torch.dtype | None = None) -> Tensor:
    """New dense memory, (s, T, channels), in the layout of ``x_sTC``."""
    samples, nodes, _ = x_sTC.shape
    # Not a transposed view: autograd forbids in-place operations on views that a function returned.
    strides = (nodes * channels, 1, nodes) if nodes_innermost(x_sTC) else (nodes * channels, channels, 1)
    return with_pages(x_sTC.new_empty_strided((samples, nodes, channels), strides, dtype=dtype))


def columns(x_sTC: Tensor) -> Tensor:
    """(C, M): a view where the nodes of all samples lie side by side, or channels innermost."""
    return x_sTC[0].mT if x_sTC.shape[0] == 1 else x_sTC.permute(2, 0, 1).reshape(x_sTC.shape[2], -1)


def from_columns(x_CM: Tensor, samples: int) -> Tensor:
    """(s, T, C), a view with nodes innermost."""
    return x_CM.mT.unsqueeze(0) if samples == 1 else x_CM.unflatten(1, (samples, -1)).permute(1, 2, 0)


def laid_out_like(x_sTC: Tensor, like_sTC: Tensor) -> Tensor:
    """A dense tensor in the layout of ``like``, nodes or channels innermost; at most one copy."""
    innermost = nodes_innermost(like_sTC)
    if nodes_innermost(x_sTC) == innermost:
        return x_sTC
    return x_sTC.mT.contiguous().mT if innermost else x_sTC.contiguous()


def lie_together(x_sTC: Tensor) -> bool:
    """Whether the nodes of all samples are side by side in memory, so that `columns` is a view."""
    return x_sTC.shape[0] == 1 or x_sTC.stride(0) == x_sTC.shape[1] * x_sTC.stride(1)


def side_by_side(x_sTC: Tensor, memory_sTC: Tensor | None) -> Tensor:
    """The same tensor with the nodes of all samples side by side, if there are few; several products will read it.

    Args:
        x_sTC: the tensor; returned as it is if it is large, side by side already, or has channels innermost.
        memory_sTC: dense scratch memory of the same shape, which may be written to.
    """
    samples, nodes, channels = x_sTC.shape
    if x_sTC.device.type != "cpu" or not is_plain(x_sTC) or samples * nodes > _NODES_AT_ONCE:
        return x_sTC
    if lie_together(x_sTC) or not nodes_innermost(x_sTC):
        return x_sTC
    if memory_sTC is None or memory_sTC.dtype != x_sTC.dtype:
        return from_columns(columns(x_sTC), samples)
    columns_CsT = memory_sTC.new_empty(0).set_(
        memory_sTC.untyped_storage(), 0, (channels, samples, nodes), (samples * nodes, nodes, 1)
    )
    return columns_CsT.copy_(x_sTC.permute(2, 0, 1)).permute(1, 2, 0)


def sample_parts(x_sTC: Tensor) -> Iterator[slice]:
    """The samples to put side by side at a time."""
    together = x_sTC.shape[0] if lie_together(x_sTC) else max(_NODES_AT_ONCE // max(x_sTC.shape[1], 1), 1)
    return (slice(first, first + together) for first in range(0, x_sTC.shape[0], together))


def not_a_view(new: Tensor) -> Tensor:
    """A view of new memory as a tensor that is no view: autograd forbids in-place operations on a function's views."""
    if type(new) is not Tensor:
        return new
    return new.new_empty(0).set_(new.untyped_storage(), new.storage_offset(), new.shape, new.stride())


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
