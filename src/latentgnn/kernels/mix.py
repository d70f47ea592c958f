"""Latent to latent, A = softmax(z z^T) with z = l2(Z), Y = A Z, and what takes assignments to features, Y or Y G^T.

Rows of the affinity are computed some at a time, and again in the backward pass. There, the sum over a row of A dA
equals the sum of Y dY.

Axes: S samples, D and M latents of a block, R reduced channels.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from latentgnn.kernels.common import EPS2, before_unit, inverse_length, inverse_weight, load_matrix, sums_in
from latentgnn.kernels.sizes import padded
from latentgnn.numerics import EPS

# Rows of the affinity that a program computes.
_ROWS = 16


def _columns(width: int, latents: int) -> int:
    """Columns of the affinity that a program takes at a time, limited by registers."""
    return max(min(4096 // padded(width), padded(latents), 64), 16)


@triton.jit  # type: ignore[untyped-decorator]
def mix_kernel(  # type: ignore[no-untyped-def]
    latent,
    unit,
    conv,
    to_feature,
    grad,
    mixed,
    grad_mixed,
    totals,
    latents,
    width,
    BACKWARD: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_O: tl.constexpr,
):
    """What takes assignments to features, of some latents of one sample.

    Backward: Y, its gradient, and for each row of A the softmax's denominator and the sum of Y dY.
    """
    sample = tl.program_id(0).to(tl.int64)
    m_M, r_R = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_R)
    inside_M, row_M = m_M < latents, sample * latents + m_M
    unit_MR = load_matrix(unit + row_M * width, inside_M, width, BLOCK_R)
    y_MR, total_M = tl.zeros((BLOCK_M, BLOCK_R), tl.float32), tl.zeros((BLOCK_M,), tl.float32)
    for start in range(0, latents, BLOCK_D):
        d_D = start + tl.arange(0, BLOCK_D)
        inside_D, row_D = d_D < latents, (sample * latents + d_D) * width
        unit_DR = load_matrix(unit + row_D, inside_D, width, BLOCK_R)
        z_DR = load_matrix(latent + row_D, inside_D, width, BLOCK_R)
        cosine_MD = tl.dot(unit_MR, tl.trans(unit_DR), input_precision=PRECISION)
        # Cosines are at most 1, so the softmax need not subtract a maximum.
        weight_MD = tl.where(inside_D[None, :], tl.exp(cosine_MD), 0.0)
        total_M += tl.sum(weight_MD, 1)
        y_MR += tl.dot(weight_MD, z_DR, input_precision=PRECISION)
    y_MR /= total_M[:, None]
    place_MR, inside_MR = (row_M * width)[:, None] + r_R[None, :], inside_M[:, None] & (r_R < width)[None, :]
    o_O = tl.arange(0, BLOCK_O)
    if BACKWARD:
        if conv is None:
            grad_MR = tl.load(grad + place_MR, mask=inside_MR, other=0.0)
        else:
            grad_MR = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
            for start in range(0, width, BLOCK_O):
                inside_O = start + o_O < width
                place_MO = (row_M * width)[:, None] + (start + o_O)[None, :]
                grad_MO = tl.load(grad + place_MO, mask=inside_M[:, None] & inside_O[None, :], other=0.0)
                conv_OR = load_matrix(conv + (start + o_O) * width, inside_O, width, BLOCK_R).to(tl.float32)
                grad_MR += tl.dot(grad_MO, conv_OR, input_precision=PRECISION)
        tl.store(mixed + place_MR, y_MR, mask=inside_MR)
        tl.store(grad_mixed + place_MR, grad_MR, mask=inside_MR)
        tl.store(totals + 2 * row_M, total_M, mask=inside_M)
        tl.store(totals + 2 * row_M + 1, tl.sum(y_MR * grad_MR, 1), mask=inside_M)
    elif conv is None:
        tl.store(to_feature + place_MR, y_MR.to(to_feature.dtype.element_ty), mask=inside_MR)
    else:
        for start in range(0, width, BLOCK_O):
            inside_O = start + o_O < width
            conv_OR = load_matrix(conv + (start + o_O) * width, inside_O, width, BLOCK_R).to(tl.float32)
            f_MO = tl.dot(y_MR, tl.trans(conv_OR), input_precision=PRECISION).to(to_feature.dtype.element_ty)
            place_MO = (row_M * width)[:, None] + (start + o_O)[None, :]
            tl.store(to_feature + place_MO, f_MO, mask=inside_M[:, None] & inside_O[None, :])


@triton.jit  # type: ignore[untyped-decorator]
def mix_backward_kernel(  # type: ignore[no-untyped-def]
    latent,
    unit,
    weights,
    grad_mixed,
    totals,
    grad_sums,
    grad_weights,
    latents,
    width,
    MEAN: tl.constexpr,
    EPS: tl.constexpr,
    EPS2: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """The gradients of the sums of some latents of one sample, and of what they were divided by.

    The matrix of cosines is symmetric, so each gets a gradient from its row and from its column of A.
    """
    sample = tl.program_id(0).to(tl.int64)
    m_M, r_R = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_R)
    inside_M, row_M = m_M < latents, sample * latents + m_M
    unit_MR = load_matrix(unit + row_M * width, inside_M, width, BLOCK_R)
    z_MR = load_matrix(latent + row_M * width, inside_M, width, BLOCK_R)
    grad_y_MR = load_matrix(grad_mixed + row_M * width, inside_M, width, BLOCK_R)
    total_M = tl.load(totals + 2 * row_M, mask=inside_M, other=1.0)
    dot_M = tl.load(totals + 2 * row_M + 1, mask=inside_M, other=0.0)
    grad_unit_MR = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
    grad_MR = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
    for start in range(0, latents, BLOCK_D):
        d_D = start + tl.arange(0, BLOCK_D)
        inside_D, row_D = d_D < latents, sample * latents + d_D
        unit_DR = load_matrix(unit + row_D * width, inside_D, width, BLOCK_R)
        z_DR = load_matrix(latent + row_D * width, inside_D, width, BLOCK_R)
        grad_y_DR = load_matrix(grad_mixed + row_D * width, inside_D, width, BLOCK_R)
        total_D = tl.load(totals + 2 * row_D, mask=inside_D, other=1.0)
        dot_D = tl.load(totals + 2 * row_D + 1, mask=inside_D, other=0.0)
        weight_MD = tl.exp(tl.dot(unit_MR, tl.trans(unit_DR), input_precision=PRECISION))
        weight_MD = tl.where(inside_M[:, None] & inside_D[None, :], weight_MD, 0.0)
        of_row_MD, of_column_MD = weight_MD / total_M[:, None], weight_MD / total_D[None, :]
        grad_row_MD = tl.dot(grad_y_MR, tl.trans(z_DR), input_precision=PRECISION) - dot_M[:, None]
        grad_column_MD = tl.dot(z_MR, tl.trans(grad_y_DR), input_precision=PRECISION) - dot_D[None, :]
        grad_MD = of_row_MD * grad_row_MD + of_column_MD * grad_column_MD
        grad_unit_MR += tl.dot(grad_MD, unit_DR, input_precision=PRECISION)
        grad_MR += tl.dot(of_column_MD, grad_y_DR, input_precision=PRECISION)
    grad_MR += before_unit(grad_unit_MR, unit_MR, inverse_length(z_MR, inside_M.to(tl.float32), EPS2))
    weight_M = tl.load(weights + row_M, mask=inside_M, other=0.0)
    inverse_M = inverse_weight(weight_M, MEAN, EPS, EPS2)
    # Unless MEAN, the weight is a squared length.
    along_M = -tl.sum(grad_MR * z_MR, 1) * inverse_M * (1.0 if MEAN else 0.5 * inverse_M)
    place_MR, inside_MR = (row_M * width)[:, None] + r_R[None, :], inside_M[:, None] & (r_R < width)[None, :]
    tl.store(grad_sums + place_MR, grad_MR * inverse_M[:, None], mask=inside_MR)
    tl.store(grad_weights + row_M, along_M, mask=inside_M)


def mix(latent_SDR: Tensor, unit_SDR: Tensor, conv_RR: Tensor | None, dtype: torch.dtype) -> Tensor:
    """What takes a node's assignments to its features, (S, D, R).

    Args:
        latent_SDR: Z.
        unit_SDR: z.
        conv_RR: of the graph convolution, ``None`` without one.
        dtype: of the result.
    """
    to_feature_SDR = torch.empty_like(latent_SDR, dtype=dtype)
    _over_rows(latent_SDR, unit_SDR, conv_RR, to_feature_SDR, None, None, None, None, _precision(dtype))
    return to_feature_SDR


def mix_backward(
    latent_SDR: Tensor,
    unit_SDR: Tensor,
    weights_SD: Tensor,
    conv_RR: Tensor | None,
    grad_SDR: Tensor,
    dtype: torch.dtype,
    *,
    mean: bool,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Gradients of the sums, of what they are divided by, and of the graph convolution.

    Args:
        latent_SDR: Z.
        unit_SDR: z.
        weights_SD: from `finish`.
        conv_RR: of the graph convolution, ``None`` without one.
        grad_SDR: of what `mix` gave, in float32.
        dtype: of what `mix` gave.
        mean: as `finish` had it.
    """
    samples, latents, width = latent_SDR.shape
    precision = _precision(dtype)
    mixed, grad_mixed, grad_sums = latent_SDR.new_empty((3, samples, latents, width)).unbind()
    totals = latent_SDR.new_empty((samples, latents, 2))
    grad_weights = latent_SDR.new_empty((samples, latents))
    _over_rows(latent_SDR, unit_SDR, conv_RR, None, grad_SDR, mixed, grad_mixed, totals, precision)
    mix_backward_kernel[samples, triton.cdiv(latents, _ROWS)](
        latent_SDR,
        unit_SDR,
        weights_SD,
        grad_mixed,
        totals,
        grad_sums,
        grad_weights,
        latents,
        width,
        MEAN=mean,
        EPS=EPS,
        EPS2=EPS2,
        PRECISION=precision,
        BLOCK_M=_ROWS,
        BLOCK_D=_columns(width, latents),
        BLOCK_R=padded(width),
        num_warps=8 if width > 64 else 4,
        num_stages=1,
    )
    grad_conv = None if conv_RR is None else torch.mm(grad_SDR.flatten(0, 1).mT, mixed.flatten(0, 1))
    return grad_sums, grad_weights, grad_conv


def _over_rows(
    latent_SDR: Tensor,
    unit_SDR: Tensor,
    conv_RR: Tensor | None,
    to_feature_SDR: Tensor | None,
    grad_SDR: Tensor | None,
    mixed_SDR: Tensor | None,
    grad_mixed_SDR: Tensor | None,
    totals_SD2: Tensor | None,
    precision: str,
) -> None:
    """`mix_kernel`."""
    samples, latents, width = latent_SDR.shape
    mix_kernel[samples, triton.cdiv(latents, _ROWS)](
        latent_SDR,
        unit_SDR,
        conv_RR,
        to_feature_SDR,
        grad_SDR,
        mixed_SDR,
        grad_mixed_SDR,
        totals_SD2,
        latents,
        width,
        BACKWARD=grad_SDR is not None,
        PRECISION=precision,
        BLOCK_M=_ROWS,
        BLOCK_D=_columns(width, latents),
        BLOCK_R=padded(width),
        BLOCK_O=max(min(padded(width), 8192 // padded(width)), 16),
        num_warps=8 if width > 64 else 4,
        num_stages=1,
    )


def _precision(dtype: torch.dtype) -> str:
    """How the latents, in float32, are multiplied where nodes have a type: TF32 has more digits than half precision."""
    return sums_in() if dtype == torch.float32 else "tf32"
