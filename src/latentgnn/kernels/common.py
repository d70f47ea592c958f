"""Functions that the kernels share: norms, unit length, ranges of nodes, and the precision of float32 products.

Axes: N nodes of a block, F channels of a row, I and O channels before and after a matrix, S samples.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from latentgnn.numerics import EPS

EPS2 = EPS**2


@triton.jit  # type: ignore[untyped-decorator]
def load_vector(vector, index, inside, OTHERWISE: tl.constexpr):  # type: ignore[no-untyped-def]
    """Load elements of a vector as float32; a constant if there is no vector."""
    if vector is None:
        numbers = tl.full(index.shape, OTHERWISE, tl.float32)
    else:
        numbers = tl.load(vector + index, mask=inside, other=0.0).to(tl.float32)
    return numbers


@triton.jit
def load_affine(weight, bias, mean, var, eps, index, inside):  # type: ignore[no-untyped-def]
    """Scale and shift of a norm, from its stored statistics; 1 and 0 without statistics."""
    scale, shift = load_vector(weight, index, inside, 1.0), load_vector(bias, index, inside, 0.0)
    if var is not None:
        scale = scale / tl.sqrt(tl.load(var + index, mask=inside, other=1.0).to(tl.float32) + eps)
        shift = shift - load_vector(mean, index, inside, 0.0) * scale
    return scale, shift


@triton.jit  # type: ignore[untyped-decorator]
def load_matrix(row_O, inside_O, columns, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """Load a matrix from pointers to its rows."""
    column = tl.arange(0, BLOCK)
    inside_OI = inside_O[:, None] & (column < columns)[None, :]
    return tl.load(row_O[:, None] + column[None, :], mask=inside_OI, other=0.0)


@triton.jit
def nodes_of(bounds, sample, nodes):  # type: ignore[no-untyped-def]
    """The first node of a sample in its row, and the number of its nodes."""
    if bounds is None:
        first, count = sample * 0, sample * 0 + nodes
    else:
        first = tl.load(bounds + sample).to(tl.int64)
        count = tl.load(bounds + sample + 1).to(tl.int64) - first
    return first, count


@triton.jit
def place_of(n_N, r_R, node_stride, channel_stride):  # type: ignore[no-untyped-def]
    """Offsets of nodes by channels in memory; in 64 bits, because large inputs exceed 32."""
    return n_N.to(tl.int64)[:, None] * node_stride + r_R.to(tl.int64)[None, :] * channel_stride


@triton.jit
def load_valid(valid, n_N, last):  # type: ignore[no-untyped-def]
    """1 for nodes that take part and 0 for others."""
    inside_N = n_N < last
    if valid is not None:
        inside_N = inside_N & (tl.load(valid + n_N, mask=inside_N, other=0) != 0)
    return inside_N.to(tl.float32)


@triton.jit
def rectified(x):  # type: ignore[no-untyped-def]
    """ReLU that keeps NaN, as PyTorch's does and a maximum does not."""
    return tl.where(x < 0, 0.0, x)


@triton.jit  # type: ignore[untyped-decorator]
def load_unit(  # type: ignore[no-untyped-def]
    u, up, place_NR, inside_NR, scale_R, shift_R, inside_R, valid_N, EPS2: tl.constexpr
):
    """For some nodes: W x, its norm at unit length, and the factor to unit length."""
    u_NR = tl.load(u + place_NR, mask=inside_NR, other=0.0).to(tl.float32)
    if up is not None:
        # In float16, W was scaled down to avoid an overflow.
        u_NR *= tl.load(up).to(tl.float32)
    y_NR = tl.where(inside_R[None, :], u_NR * scale_R[None, :] + shift_R[None, :], 0.0)
    inverse_N = inverse_length(y_NR, valid_N, EPS2)
    return u_NR, y_NR * inverse_N[:, None], inverse_N


@triton.jit  # type: ignore[untyped-decorator]
def inverse_root(squares_N, valid_N, EPS2: tl.constexpr):  # type: ignore[no-untyped-def]
    """1 / length, from squared lengths; 0 for zero rows and nodes outside the mask."""
    return tl.where(squares_N > EPS2, 1.0 / tl.sqrt(tl.maximum(squares_N, EPS2)), squares_N * 0.0) * valid_N


@triton.jit  # type: ignore[untyped-decorator]
def inverse_weight(weight, MEAN: tl.constexpr, EPS: tl.constexpr, EPS2: tl.constexpr):  # type: ignore[no-untyped-def]
    """The factor of latents' sums: 1 / sum of assignments, or 1 / length from its square."""
    if MEAN:
        inverse = tl.where(weight > EPS, 1.0 / tl.maximum(weight, EPS), weight * 0.0)
    else:
        inverse = inverse_root(weight, 1.0, EPS2)
    return inverse


@triton.jit  # type: ignore[untyped-decorator]
def inverse_length(x_NF, valid_N, EPS2: tl.constexpr):  # type: ignore[no-untyped-def]
    """`inverse_root` of rows."""
    return inverse_root(tl.sum(x_NF * x_NF, 1), valid_N, EPS2)


@triton.jit
def before_unit(grad_NF, unit_NF, inverse_N):  # type: ignore[no-untyped-def]
    """The gradient of rows, from that of the same rows of unit length."""
    return inverse_N[:, None] * (grad_NF - unit_NF * tl.sum(grad_NF * unit_NF, 1)[:, None])


@triton.jit  # type: ignore[untyped-decorator]
def product(x_NI, matrix_IO, kind: tl.constexpr, PRECISION: tl.constexpr):  # type: ignore[no-untyped-def]
    """x W, with both operands cast to a dtype and summed in float32."""
    return tl.dot(x_NI.to(kind), matrix_IO.to(kind), input_precision=PRECISION)


@triton.jit  # type: ignore[untyped-decorator]
def assigned(  # type: ignore[no-untyped-def]
    l_NR, psi, weight, bias, mean, var, eps, d_D, latents, width, PRECISION: tl.constexpr, BLOCK_R: tl.constexpr
):
    """Psi, Psi L, its norm, and the norm's scale, for some latents; zeros past the last latent."""
    inside_D = d_D < latents
    scale_D, shift_D = load_affine(weight, bias, mean, var, eps, d_D, inside_D)
    psi_DR = load_matrix(psi + d_D * width, inside_D, width, BLOCK_R)
    raw_ND = product(l_NR, tl.trans(psi_DR), psi.dtype.element_ty, PRECISION)
    return psi_DR, raw_ND, tl.where(inside_D[None, :], raw_ND * scale_D[None, :] + shift_D[None, :], 0.0), scale_D


def sums_in() -> str:
    """Precision of float32 products in sums over nodes and in mixing: as PyTorch's setting for matrix products says.

    If TF32 is not allowed, a product is computed as three TF32 products, which is as exact as float32 and several times
    as fast.
    """
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "tf32x3"


def projections_in() -> str:
    """The same for projections, by PyTorch's setting for convolutions, because they are 1x1 convolutions."""
    return "tf32" if torch.backends.cudnn.conv.fp32_precision == "tf32" else "tf32x3"  # type: ignore[attr-defined]


def bytes_of(mask: Tensor | None) -> Tensor | None:
    """A mask as the kernels read it."""
    return None if mask is None else mask.contiguous().view(torch.uint8)
