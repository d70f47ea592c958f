"""Batch norm in training: each channel over all nodes of the batch, which are one block.

Axes: s rows of the input, T nodes, F channels of what is normalised.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from latentgnn.core.layouts import columns, from_columns, lie_together, nodes_innermost
from latentgnn.core.nodes import Block
from latentgnn.core.scaling import scaled, scaled_
from latentgnn.core.statistics import Statistics

# From this many elements on, separate sums are faster than PyTorch's batch norm in one call.
_MANY_NUMBERS = 1 << 17


@dataclass(frozen=True)
class TrainingBatchNorm:
    """Batch norm in training: each channel over all nodes of the batch, which are one block."""

    eps: float

    def normalize(
        self, raw_sTF: Tensor, weight_F: Tensor | None, bias_F: Tensor | None, block: Block, *, keep: bool = True
    ) -> tuple[Tensor, Statistics]:
        x = _channels_second(raw_sTF, raw_sTF)
        if x.dim() == 3 and x.numel() > _MANY_NUMBERS:
            y, statistics = self._normalize_channels(x, weight_F, bias_F, keep=keep)
        else:
            y, mean_F, inverse_F = torch.native_batch_norm(x, weight_F, bias_F, None, None, True, 0.0, self.eps)
            statistics = Statistics(mean_F, inverse_F)
        return _nodes_second(y, raw_sTF), statistics

    def _normalize_channels(
        self, x_sFT: Tensor, weight_F: Tensor | None, bias_F: Tensor | None, *, keep: bool
    ) -> tuple[Tensor, Statistics]:
        # Sums along contiguous memory: several times as fast on a CPU as PyTorch's batch norm.
        count = x_sFT.shape[0] * x_sFT.shape[2]
        mean_F = _over_samples(x_sFT.sum(2)).div_(count)
        centred_sFT = x_sFT - mean_F.unsqueeze(1) if keep else x_sFT.sub_(mean_F.unsqueeze(1))
        squares_F = _over_samples(torch.linalg.vector_norm(centred_sFT, dim=2).square_())
        inverse_F = squares_F.div_(count).add_(self.eps).rsqrt_()
        scale_F1 = _times(inverse_F, weight_F).unsqueeze(1)
        bias_F1 = None if bias_F is None else bias_F.unsqueeze(1)
        return scaled_(centred_sFT, scale_F1, bias_F1), Statistics(mean_F, inverse_F)

    def backward(
        self, grad_sTF: Tensor, raw_sTF: Tensor, weight_F: Tensor | None, statistics: Statistics, block: Block
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        wanted = [True, weight_F is not None, weight_F is not None]
        x, grad = _channels_second(raw_sTF, raw_sTF), _channels_second(grad_sTF, raw_sTF)
        # Three or two dimensions: with four, PyTorch's gradients are wrong for some strides.
        grad_x, grad_weight_F, grad_bias_F = torch.ops.aten.native_batch_norm_backward(
            grad, x, weight_F, None, None, statistics.mean, statistics.inverse_std, True, self.eps, wanted
        )
        return _nodes_second(grad_x, raw_sTF), grad_weight_F, grad_bias_F


def batch_norm_again(raw_sTF: Tensor, weight_F: Tensor | None, bias_F: Tensor | None, statistics: Statistics) -> Tensor:
    """Batch norm with known statistics: recomputes its output where only its input was held."""
    assert statistics.mean is not None
    scale_F = _times(statistics.inverse_std, weight_F)
    shift_F = -statistics.mean * scale_F
    return scaled(raw_sTF, scale_F, shift_F if bias_F is None else shift_F + bias_F)


def _over_samples(x_sF: Tensor) -> Tensor:
    return x_sF[0] if len(x_sF) == 1 else x_sF.sum(0)


def _channels_second(x_sTF: Tensor, like_sTF: Tensor) -> Tensor:
    """Dense: rows (M, F); where nodes lie innermost (s, F, T), or (1, F, M) where those of all samples lie together."""
    if not nodes_innermost(like_sTF):
        return x_sTF.reshape(-1, x_sTF.shape[2]).contiguous()
    return columns(x_sTF).contiguous().unsqueeze(0) if lie_together(like_sTF) else x_sTF.mT.contiguous()


def _nodes_second(x: Tensor, like_sTF: Tensor) -> Tensor:
    """Undo `_channels_second`."""
    if x.dim() == 2:
        return x.view(like_sTF.shape)
    return from_columns(x[0], len(like_sTF)) if len(x) == 1 else x.mT


def _times(inverse_F: Tensor, weight_F: Tensor | None) -> Tensor:
    return inverse_F if weight_F is None else inverse_F * weight_F
