"""Batch norm in training: the statistics of what a norm is applied to, and the gradients through them.

Inside the layer a norm follows a product and has the product at hand. The output's norm need not: the mean and the
variance of f U^T follow from those of f, which has fewer channels.

Axes: s rows of the input, T nodes, F features; C channels, M = s * T.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from latentgnn.core.nodes import nodes_innermost
from latentgnn.core.products import contract_all


class Statistics(NamedTuple):
    """Mean and inverse standard deviation of each channel."""

    mean: Tensor
    inverse: Tensor


def normalize(raw_sTF: Tensor, weight_F: Tensor | None, bias_F: Tensor | None, eps: float) -> tuple[Tensor, Statistics]:
    """Batch norm, and the statistics that it took."""
    if not nodes_innermost(raw_sTF):
        y, mean, inverse = torch.native_batch_norm(raw_sTF.flatten(0, 1), weight_F, bias_F, None, None, True, 0.0, eps)
        return y.view(raw_sTF.shape), Statistics(mean, inverse)
    # Sums along what lies next to one another: several times as fast on a CPU as PyTorch's batch norm.
    count = raw_sTF.shape[0] * raw_sTF.shape[1]
    mean_F = raw_sTF.sum(1).sum(0) / count
    centred_sTF = raw_sTF - mean_F
    squares_F = torch.linalg.vector_norm(centred_sTF, dim=1).square_().sum(0)
    inverse_F = torch.rsqrt(squares_F / count + eps)
    scale_F = inverse_F if weight_F is None else inverse_F * weight_F
    if bias_F is None:
        return centred_sTF.mul_(scale_F), Statistics(mean_F, inverse_F)
    return torch.addcmul(bias_F, centred_sTF, scale_F, out=centred_sTF), Statistics(mean_F, inverse_F)


def normalize_again(raw_sTF: Tensor, weight_F: Tensor | None, bias_F: Tensor | None, statistics: Statistics) -> Tensor:
    """Batch norm with statistics that are known."""
    scale_F = statistics.inverse if weight_F is None else statistics.inverse * weight_F
    shift_F = -statistics.mean * scale_F
    return torch.addcmul(shift_F if bias_F is None else shift_F + bias_F, raw_sTF, scale_F)


def normalize_backward(
    grad_sTF: Tensor, raw_sTF: Tensor, weight_F: Tensor | None, statistics: Statistics, eps: float
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Gradients of what was normalised, of the weight and of the bias."""
    wanted = [True, weight_F is not None, weight_F is not None]
    innermost = nodes_innermost(raw_sTF)
    # Three or two dimensions: with four, PyTorch's gradients are wrong for some strides.
    grad, raw = (grad_sTF.mT, raw_sTF.mT) if innermost else (grad_sTF.flatten(0, 1), raw_sTF.flatten(0, 1))
    grad_raw, grad_weight_F, grad_bias_F = torch.ops.aten.native_batch_norm_backward(
        grad.contiguous(), raw, weight_F, None, None, statistics.mean, statistics.inverse, True, eps, wanted
    )
    return grad_raw.mT if innermost else grad_raw.view(raw_sTF.shape), grad_weight_F, grad_bias_F


class Moments(NamedTuple):
    """Of features over all nodes: mean (F,), and covariance (F, F)."""

    mean: Tensor
    covariance: Tensor


def moments(feature_sTF: Tensor) -> tuple[Moments, Tensor]:
    """The features' moments, and the features less their mean.

    They are centred first: E[f^2] - E[f]^2 would lose every digit, as a mean is often ten times its spread.
    """
    count = max(feature_sTF.shape[0] * feature_sTF.shape[1], 1)
    mean_F = feature_sTF.sum((0, 1)) / count
    centred_sTF = feature_sTF - mean_F
    return Moments(mean_F, contract_all(centred_sTF, centred_sTF) / count), centred_sTF


def expansion(
    matrix_CF: Tensor, of_features: Moments, weight_C: Tensor | None, bias_C: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Statistics]:
    """The matrix and the shift of norm(f U^T), and the statistics of f U^T; with gradients, where autograd records."""
    mean_C = matrix_CF @ of_features.mean
    var_C = ((matrix_CF @ of_features.covariance) * matrix_CF).sum(1)
    inverse_C = torch.rsqrt(var_C + eps)
    scale_C = inverse_C if weight_C is None else inverse_C * weight_C
    shift_C = -mean_C * scale_C
    if bias_C is not None:
        shift_C = shift_C + bias_C
    return matrix_CF * scale_C.unsqueeze(1), shift_C, Statistics(mean_C, inverse_C)


def moments_pay(nodes: int, features: int, channels: int) -> bool:
    """Whether the output's statistics cost less by the features' moments than by the output itself.

    Moments take two products of F x F, one over the nodes and one over the channels; the output's own take about six
    passes over C numbers a node, each worth about twenty multiply-adds, as measured.
    """
    return features * features * (nodes + channels) < 60 * nodes * channels
