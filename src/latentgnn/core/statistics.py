"""Norms that take statistics from their input: group norm, layer norm and RMS norm.

Each computes its output, and the gradients through output and statistics.

Axes: s rows of the input, T nodes, F channels of what is normalised, S samples of a block.
"""

from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from latentgnn.core.layouts import cat, cat_nodes, nodes_innermost
from latentgnn.core.nodes import Block
from latentgnn.core.products import sum_of_nodes
from latentgnn.core.scaling import scaled_


class Statistics(NamedTuple):
    """A norm's statistics: the mean (``None`` for RMS norm) and the inverse standard deviation."""

    mean: Tensor | None
    inverse_std: Tensor


class Norm(Protocol):
    """A norm with statistics of its own; ``weight_F`` and ``bias_F`` are ``None`` for ones and zeros."""

    @property
    def eps(self) -> float: ...

    def normalize(
        self, raw_sTF: Tensor, weight_F: Tensor | None, bias_F: Tensor | None, block: Block, *, keep: bool = True
    ) -> tuple[Tensor, Statistics]:
        """The norm of ``raw`` and its statistics; unless ``keep``, it may overwrite ``raw``."""

    def backward(
        self, grad_sTF: Tensor, raw_sTF: Tensor, weight_F: Tensor | None, statistics: Statistics, block: Block
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Gradients of what was normalised, of the weight and of the bias."""


@dataclass(frozen=True)
class GroupNorm:
    """Group norm: groups of channels over all nodes of a sample, whose nodes are in one block.

    Args:
        eps: added to the variance.
        groups: of the channels.
    """

    eps: float
    groups: int

    def normalize(
        self, raw_sTF: Tensor, weight_F: Tensor | None, bias_F: Tensor | None, block: Block, *, keep: bool = True
    ) -> tuple[Tensor, Statistics]:
        parts, means, inverses = [], [], []
        for raw in block.each_sample(raw_sTF, 1):
            if raw.shape[1] == 0:
                means.append(raw.new_zeros(raw.shape[0], self.groups))
                inverses.append(means[-1])
                continue
            x = _channels_first(raw)
            y, mean, inverse = torch.native_group_norm(
                x, weight_F, bias_F, x.shape[0], x.shape[1], raw.shape[1], self.groups, self.eps
            )
            parts.append(_channels_last(y, raw))
            means.append(mean)
            inverses.append(inverse)
        return cat_nodes(parts, 1), Statistics(cat(means), cat(inverses))

    def backward(
        self, grad_sTF: Tensor, raw_sTF: Tensor, weight_F: Tensor | None, statistics: Statistics, block: Block
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        assert statistics.mean is not None
        wanted = [True, weight_F is not None, weight_F is not None]
        innermost, first = nodes_innermost(raw_sTF), 0
        parts: list[Tensor] = []
        totals: list[Tensor | None] = [None, None]
        for grad, raw in zip(block.each_sample(grad_sTF, 1), block.each_sample(raw_sTF, 1), strict=True):
            x = _channels_first(raw)
            own = slice(first, first + raw.shape[0])
            first = own.stop
            if raw.shape[1] == 0:
                continue
            grad_x, *grads = torch.ops.aten.native_group_norm_backward(
                *(_channels_first(grad, innermost=innermost), x, statistics.mean[own], statistics.inverse_std[own]),
                *(weight_F, x.shape[0], x.shape[1], raw.shape[1], self.groups, wanted),
            )
            parts.append(_channels_last(grad_x, raw))
            if weight_F is not None:
                totals = [new if total is None else total + new for total, new in zip(totals, grads, strict=True)]
        return cat_nodes(parts, 1), totals[0], totals[1]


def _channels_first(x_sTF: Tensor, *, innermost: bool | None = None) -> Tensor:
    """(s, F, T) where nodes lie innermost; otherwise (s, F, 1, T) in PyTorch's channels-last order.

    Channels-last order is only for CPUs; elsewhere PyTorch's group norm ignores it.
    """
    if not x_sTF.is_cpu or (nodes_innermost(x_sTF) if innermost is None else innermost):
        return x_sTF.mT.contiguous()
    return x_sTF.contiguous().mT.unsqueeze(2)


def _channels_last(x: Tensor, raw_sTF: Tensor) -> Tensor:
    """Undo `_channels_first`, in the layout of ``raw``."""
    if x.dim() == 4:
        return x.squeeze(2).mT
    return x.mT if nodes_innermost(raw_sTF) else x.mT.contiguous()


@dataclass(frozen=True)
class NodeNorm:
    """Layer norm and RMS norm: channels of each node, which lie next to one another.

    Args:
        eps: added to the variance, or to the mean of squares.
        parts: number of equal parts of the channels, each normalised separately.
        centres: whether the mean is subtracted first, as in layer norm.
    """

    eps: float
    parts: int
    centres: bool

    def normalize(
        self, raw_sTF: Tensor, weight_F: Tensor | None, bias_F: Tensor | None, block: Block, *, keep: bool = True
    ) -> tuple[Tensor, Statistics]:
        raw = self._split(raw_sTF)
        if self.centres and self.parts == 1:
            y_sTF, mean, inverse = torch.native_layer_norm(raw, raw.shape[-1:], weight_F, bias_F, self.eps)
            return y_sTF, Statistics(mean, inverse)
        if self.centres:
            unit, *taken = torch.native_layer_norm(raw, raw.shape[-1:], None, None, self.eps)
            statistics = Statistics(*taken)
        else:
            squares = torch.linalg.vector_norm(raw, dim=-1, keepdim=True).square_()
            statistics = Statistics(None, squares.div_(raw.shape[-1]).add_(self.eps).rsqrt_())
            unit = raw * statistics.inverse_std if keep else raw.mul_(statistics.inverse_std)
        y_sTF = unit.view(raw_sTF.shape)
        return y_sTF if weight_F is None else scaled_(y_sTF, weight_F, bias_F), statistics

    def backward(
        self, grad_sTF: Tensor, raw_sTF: Tensor, weight_F: Tensor | None, statistics: Statistics, block: Block
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        raw = self._split(raw_sTF)
        grad_weight_F = grad_bias_F = None
        if self.centres and self.parts == 1:
            wanted = [True, weight_F is not None, weight_F is not None]
            given = (grad_sTF.contiguous(), raw, raw.shape[-1:], statistics.mean, statistics.inverse_std)
            # The weight stands in for the bias: only its presence matters, not its values.
            return torch.ops.aten.native_layer_norm_backward(*given, weight_F, weight_F, wanted)
        if self.centres:
            unit = torch.sub(raw, statistics.mean).mul_(statistics.inverse_std)  # type: ignore[arg-type]
        else:
            unit = raw * statistics.inverse_std
        if weight_F is not None:
            grad_weight_F = sum_of_nodes(grad_sTF * unit.view(raw_sTF.shape), grad_sTF.dtype)
            grad_bias_F = sum_of_nodes(grad_sTF, grad_sTF.dtype)
            grad_sTF = grad_sTF * weight_F
        grad = self._split(grad_sTF.contiguous())
        if self.centres:
            grad, *_ = torch.ops.aten.native_layer_norm_backward(
                grad, raw, raw.shape[-1:], statistics.mean, statistics.inverse_std, None, None, [True, False, False]
            )
        else:
            along = (grad * unit).mean(-1, keepdim=True)
            grad = torch.addcmul(grad, unit, along, value=-1).mul_(statistics.inverse_std)
        return grad.view(raw_sTF.shape), grad_weight_F, grad_bias_F

    def _split(self, x_sTF: Tensor) -> Tensor:
        return x_sTF if self.parts == 1 else x_sTF.unflatten(-1, (self.parts, -1))
