"""Latent to latent, A = softmax(z z^T) with z = l2(Z), Y = A Z, and what takes assignments to features, Y or Y G^T.

The backward pass is autograd's (`latentgnn.core.mix`): the tensors are small.

Axes: S samples, D and M latents, R reduced channels.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from latentgnn.kernels.common import EPS2, inverse_length, load_matrix, sums_in
from latentgnn.kernels.sizes import padded

# Rows of the affinity that a program computes.
_ROWS = 16


@triton.jit  # type: ignore[untyped-decorator]
def load_latents(  # type: ignore[no-untyped-def]
    sums, sample, d_D, latents, width, MEAN: tl.constexpr, EPS: tl.constexpr, BLOCK_R: tl.constexpr
):
    """Z of some latents, (D, R)."""
    inside_D = d_D < latents
    row_D = sums + (sample * latents + d_D) * (width + 1)
    sums_DR = load_matrix(row_D, inside_D, width, BLOCK_R)
    weight_D = tl.load(row_D + width, mask=inside_D, other=0.0)
    if MEAN:
        inverse_D = tl.where(weight_D > EPS, 1.0 / tl.maximum(weight_D, EPS), weight_D * 0.0)
    else:
        inverse_D = tl.where(weight_D > EPS * EPS, 1.0 / tl.sqrt(tl.maximum(weight_D, EPS * EPS)), weight_D * 0.0)
    return sums_DR * inverse_D[:, None]


@triton.jit  # type: ignore[untyped-decorator]
def mix_kernel(  # type: ignore[no-untyped-def]
    sums,
    conv,
    to_feature,
    latents,
    width,
    MEAN: tl.constexpr,
    EPS: tl.constexpr,
    EPS2: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Some rows of one sample."""
    sample = tl.program_id(0).to(tl.int64)
    m_M, d_D, r_R = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_R)
    z_DR = load_latents(sums, sample, d_D, latents, width, MEAN, EPS, BLOCK_R)
    z_MR = load_latents(sums, sample, m_M, latents, width, MEAN, EPS, BLOCK_R)
    unit_DR = z_DR * inverse_length(z_DR, tl.full((BLOCK_D,), 1.0, tl.float32), EPS2)[:, None]
    unit_MR = z_MR * inverse_length(z_MR, tl.full((BLOCK_M,), 1.0, tl.float32), EPS2)[:, None]
    cosine_MD = tl.dot(unit_MR, tl.trans(unit_DR), input_precision=PRECISION)
    # Cosines are at most 1, so that their exponentials need no maximum taken away.
    weight_MD = tl.where((d_D < latents)[None, :], tl.exp(cosine_MD), 0.0)
    y_MR = tl.dot(weight_MD, z_DR, input_precision=PRECISION) / tl.sum(weight_MD, 1)[:, None]
    if conv is not None:
        conv_OR = load_matrix(conv + r_R * width, r_R < width, width, BLOCK_R).to(tl.float32)
        y_MR = tl.dot(y_MR, tl.trans(conv_OR), input_precision=PRECISION)
    place_MR = ((sample * latents + m_M) * width)[:, None] + r_R[None, :]
    inside_MR = (m_M < latents)[:, None] & (r_R < width)[None, :]
    tl.store(to_feature + place_MR, y_MR.to(to_feature.dtype.element_ty), mask=inside_MR)


def mix(sums_SDr: Tensor, conv_RR: Tensor | None, dtype: torch.dtype, *, mean: bool) -> Tensor:
    """What takes a node's assignments to its features, (S, D, R).

    Args:
        sums_SDr: from `gather`, (S, D, R + 1).
        conv_RR: of the graph convolution, ``None`` without one.
        dtype: of the result.
        mean: sums are divided by sums of assignments, not by their length.
    """
    samples, latents, width = sums_SDr.shape[0], sums_SDr.shape[1], sums_SDr.shape[2] - 1
    to_feature_SDR = sums_SDr.new_empty((samples, latents, width), dtype=dtype)
    mix_kernel[samples, triton.cdiv(latents, _ROWS)](
        sums_SDr,
        conv_RR,
        to_feature_SDR,
        latents,
        width,
        MEAN=mean,
        EPS=EPS2**0.5,
        EPS2=EPS2,
        PRECISION=sums_in(),
        BLOCK_M=_ROWS,
        BLOCK_R=padded(width),
        BLOCK_D=padded(latents),
        num_warps=8 if padded(width) * padded(latents) > 4096 else 4,
        num_stages=1,
    )
    return to_feature_SDR
