"""Latent to latent: small tensors, whose gradients are autograd's.

Axes: S samples, G groups, D latents of all kernels in a group (D_k of one), r channels of a group.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from latentgnn.core.plan import Plan
from latentgnn.functional import mix
from latentgnn.numerics import EPS, reciprocal


def mixed(sums_SGDr: Tensor, weights_SGD: Tensor, plan: Plan) -> list[Tensor]:
    """Y of each kernel, (S, G, D_k, r), from gather's sums and their divisors."""
    latent_SGDr = sums_SGDr
    if plan.node_scale == "mean":
        latent_SGDr = sums_SGDr * reciprocal(weights_SGD).unsqueeze(-1)
    elif not plan.symmetric:
        inverse_SGD = torch.threshold(weights_SGD, EPS**2, math.inf).rsqrt()
        latent_SGDr = sums_SGDr * inverse_SGD.unsqueeze(-1)
    if len(plan.latents) == 1:
        return [mix(latent_SGDr)]
    return [mix(latent_SGDr[:, :, kernel]) for kernel in plan.kernels]


def scatter_matrices(sums_SGDr: Tensor, weights_SGD: Tensor, convs: Sequence[Tensor], plan: Plan) -> list[Tensor]:
    """The matrix from assignments to features of each kernel, (S, G, r, D_k): Y^T, or with graph convolution G Y^T."""
    latents = mixed(sums_SGDr, weights_SGD, plan)
    if not plan.graph_conv:
        return [latent_SGDr.mT for latent_SGDr in latents]
    return [conv_Grr @ latent_SGDr.mT for conv_Grr, latent_SGDr in zip(convs, latents, strict=True)]
