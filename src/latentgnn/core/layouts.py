"""How tensors over nodes lie in memory: nodes or channels innermost, samples apart or side by side.

If nodes are innermost, results for several samples on a CPU have the nodes of all samples side by side in memory,
(channels, s * T), so that a projection is one matrix product instead of one per sample.

Axes: s rows of the input, T nodes, M = s * T, C channels.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from latentgnn.core.pages import with_pages

# Samples are put side by side up to this many nodes in all; larger ones are as fast one by one, without a copy.
_NODES_AT_ONCE = 2048


def is_plain(x: Tensor) -> bool:
    """Whether a tensor is a plain tensor; a DTensor, for example, has no oneDNN products and no storage of its own."""
    return type(x) in (Tensor, nn.Parameter)


def nodes_innermost(x_sTC: Tensor) -> bool:
    """Whether nodes are innermost in memory, as in a contiguous (B, C, N)."""
    return x_sTC.stride(-1) != 1 or (x_sTC.shape[-1] == 1 and x_sTC.shape[-2] > 1 and x_sTC.stride(-2) == 1)


def empty_like_layout(x_sTC: Tensor, channels: int) -> Tensor:
    """New dense memory, (s, T, channels), in the layout of ``x_sTC``."""
    samples, nodes, _ = x_sTC.shape
    # Not a transposed view: autograd forbids in-place operations on views that a function returned.
    strides = (nodes * channels, 1, nodes) if nodes_innermost(x_sTC) else (nodes * channels, channels, 1)
    return with_pages(x_sTC.new_empty_strided((samples, nodes, channels), strides))


def columns(x_sTC: Tensor) -> Tensor:
    """(C, M): a view where the nodes of all samples lie side by side, or channels innermost."""
    return x_sTC[0].mT if x_sTC.shape[0] == 1 else x_sTC.permute(2, 0, 1).reshape(x_sTC.shape[2], -1)


def from_columns(x_CM: Tensor, samples: int) -> Tensor:
    """(s, T, C), a view with nodes innermost."""
    return x_CM.mT.unsqueeze(0) if samples == 1 else x_CM.unflatten(1, (samples, -1)).permute(1, 2, 0)


def laid_out_like(x_sTC: Tensor, like_sTC: Tensor) -> Tensor:
    """A tensor in the layout of ``like``, nodes or channels innermost; at most one copy."""
    # A compiler's strides may be symbols, and it lays out by itself.
    if torch.compiler.is_compiling() or nodes_innermost(x_sTC) == nodes_innermost(like_sTC):
        return x_sTC
    return x_sTC.mT.contiguous().mT if nodes_innermost(like_sTC) else x_sTC.contiguous()


def cat(parts: Sequence[Tensor], dim: int = 0) -> Tensor:
    """Concatenate tensors; a single one as it is."""
    return parts[0] if len(parts) == 1 else torch.cat(list(parts), dim)


def cat_nodes(parts: Sequence[Tensor], dim: int) -> Tensor:
    """Concatenate tensors over nodes, (..., T, K), in their memory layout; ``dim`` is not negative."""
    nodes = parts[0].dim() - 2
    if len(parts) == 1 or not nodes_innermost(parts[0]):
        return cat(parts, dim)
    turned = {nodes: nodes + 1, nodes + 1: nodes}.get(dim, dim)
    return torch.cat([part.mT for part in parts], turned).mT


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
