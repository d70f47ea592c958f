"""The output's batch norm in training from the moments of its features, without the output.

The mean and the variance of f U^T follow from those of f, which has fewer channels.

Axes: s rows of the input, T nodes, F features, C channels.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from latentgnn.core.products import contract_all
from latentgnn.core.routines import outer
from latentgnn.core.statistics import Statistics


class Moments(NamedTuple):
    """Of features over all nodes: mean (F,), and covariance (F, F)."""

    mean: Tensor
    covariance: Tensor


def moments(feature_sTF: Tensor) -> tuple[Moments, Tensor]:
    """The features' moments, and the centred features.

    Features are centred first: E[f^2] - E[f]^2 would lose all precision, because means are often ten times the spread.
    """
    count = max(feature_sTF.shape[0] * feature_sTF.shape[1], 1)
    mean_F = feature_sTF.sum((0, 1)) / count
    centred_sTF = feature_sTF - mean_F
    return Moments(mean_F, contract_all(centred_sTF, centred_sTF) / count), centred_sTF


def expansion(
    matrix_CF: Tensor, of_features: Moments, weight_C: Tensor | None, bias_C: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Statistics]:
    """The matrix and the shift of norm(f U^T), and the statistics of f U^T; with gradients, where autograd records."""
    mean_C, product_CF = _products(matrix_CF, of_features)
    var_C = (product_CF * matrix_CF).sum(1)
    inverse_C = torch.rsqrt(var_C + eps)
    scale_C = inverse_C if weight_C is None else inverse_C * weight_C
    shift_C = -mean_C * scale_C
    if bias_C is not None:
        shift_C = shift_C + bias_C
    return matrix_CF * scale_C.unsqueeze(1), shift_C, Statistics(mean_C, inverse_C)


def _products(matrix_CF: Tensor, of_features: Moments) -> tuple[Tensor, Tensor]:
    """The matrix times the mean, and times the covariance."""
    if torch.is_grad_enabled():
        return matrix_CF @ of_features.mean, matrix_CF @ of_features.covariance
    # The covariance is its own transpose.
    right_MF = torch.cat([of_features.covariance, of_features.mean.unsqueeze(0)])
    product_CM = outer(matrix_CF, right_MF)
    return product_CM[:, -1].clone(), product_CM[:, :-1]
