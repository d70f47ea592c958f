"""What both kernels do alike: values of unit length, assignments, and how float32 is multiplied.

Axes: N nodes of a block, F channels of a row, I and O channels before and after a matrix; in `Way` as in the core.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from latentgnn.functional import EPS

EPS2 = EPS**2


class Way(NamedTuple):
    """What gather or scatter multiplies by between W x and its assignments.

    Args:
        scale: (R,), of the norm after the reduction, in float32; ``None`` for ones.
        shift: (R,), likewise; ``None`` for zeros.
        assign: Psi of all kernels, contiguous (G, D, r), in the type of the products.
        assign_shift: (G * D,) in float32; ``None`` for zeros.
    """

    scale: Tensor | None
    shift: Tensor | None
    assign: Tensor
    assign_shift: Tensor | None


@triton.jit  # type: ignore[untyped-decorator]
def load_vector(vector, index, inside, OTHERWISE: tl.constexpr):  # type: ignore[no-untyped-def]
    """Numbers of a vector in float32, or the same number everywhere where there is no vector."""
    if vector is None:
        numbers = tl.full(index.shape, OTHERWISE, tl.float32)
    else:
        numbers = tl.load(vector + index, mask=inside, other=0.0).to(tl.float32)
    return numbers


@triton.jit  # type: ignore[untyped-decorator]
def load_matrix(row_O, inside_O, columns, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """A matrix, given where its rows begin."""
    column = tl.arange(0, BLOCK)
    inside_OI = inside_O[:, None] & (column < columns)[None, :]
    return tl.load(row_O[:, None] + column[None, :], mask=inside_OI, other=0.0)


@triton.jit
def load_valid(valid, sample, n_N, last, nodes):  # type: ignore[no-untyped-def]
    """1 for nodes that take part and 0 for others."""
    inside_N = n_N < last
    if valid is not None:
        inside_N = inside_N & (tl.load(valid + sample * nodes + n_N, mask=inside_N, other=0) != 0)
    return inside_N.to(tl.float32)


@triton.jit
def rectified(x):  # type: ignore[no-untyped-def]
    """ReLU that keeps NaN, as PyTorch's does and a maximum does not."""
    return tl.where(x < 0, 0.0, x)


@triton.jit  # type: ignore[untyped-decorator]
def unit(x_NF, valid_N, EPS2: tl.constexpr):  # type: ignore[no-untyped-def]
    """Rows of unit length, of zeros where nodes take no part."""
    squares_N = tl.sum(x_NF * x_NF, 1)
    inverse_N = tl.where(squares_N > EPS2, 1.0 / tl.sqrt(tl.maximum(squares_N, EPS2)), 0.0)
    return x_NF * (inverse_N * valid_N)[:, None]


@triton.jit  # type: ignore[untyped-decorator]
def projected(x_NI, matrix_OI, PRECISION: tl.constexpr):  # type: ignore[no-untyped-def]
    """x W^T in float32."""
    return tl.dot(x_NI.to(matrix_OI.dtype), tl.trans(matrix_OI), input_precision=PRECISION)


@triton.jit  # type: ignore[untyped-decorator]
def load_values(  # type: ignore[no-untyped-def]
    u, n_N, c_F, inside_NF, scale_F, shift_F, valid_N, u_node, u_channel, EPS2: tl.constexpr
):
    """l2(W x * scale + shift) of nodes, in float32."""
    u_NF = tl.load(u + n_N[:, None] * u_node + c_F[None, :] * u_channel, mask=inside_NF, other=0.0).to(tl.float32)
    return unit(u_NF * scale_F[None, :] + shift_F[None, :], valid_N, EPS2)


def precision() -> str:
    """How float32 is multiplied: as PyTorch's own products are allowed to."""
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"


def bytes_of(valid_sT1: Tensor | None) -> Tensor | None:
    """A mask as the kernels read it."""
    return None if valid_sT1 is None else valid_sT1.contiguous().view(torch.uint8)
