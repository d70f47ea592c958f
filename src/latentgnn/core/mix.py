"""Latent to latent: small tensors, whose gradients are autograd's.

Axes: S samples, G groups, D latents of all kernels in a group (D_k of one), r channels of a group.
"""

from collections.abc import Sequence

from torch import Tensor

from latentgnn.core.plan import Plan
from latentgnn.functional import mix, scale_of_weight


def mixed(sums_SGDr: Tensor, weights_SGD: Tensor, plan: Plan) -> list[Tensor]:
    """Y of each kernel, (S, G, D_k, r), from gather's sums and their divisors."""
    latent_SGDr = sums_SGDr
    if plan.node_scale == "mean" or not plan.symmetric:
        latent_SGDr = sums_SGDr * scale_of_weight(weights_SGD, node_scale=plan.node_scale).unsqueeze(-1)
    if len(plan.latents) == 1:
        return [mix(latent_SGDr)]
    return [mix(latent_SGDr[:, :, kernel]) for kernel in plan.kernels]


def scatter_matrices(sums_SGDr: Tensor, weights_SGD: Tensor, convs: Sequence[Tensor], plan: Plan) -> list[Tensor]:
    """The matrix from assignments to features of each kernel, (S, G, r, D_k): Y^T, or with graph convolution G Y^T."""
    latents = mixed(sums_SGDr, weights_SGD, plan)
    if not plan.graph_conv:
        return [latent_SGDr.mT for latent_SGDr in latents]
    return [conv_Grr @ latent_SGDr.mT for conv_Grr, latent_SGDr in zip(convs, latents, strict=True)]
