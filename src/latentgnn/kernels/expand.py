"""Products over the channels of the input: x + gamma norm(U f) and its like for gradients, in one pass over x.

Axes: N nodes of a block, C channels of a block, K rows of the matrix, O and I rows and columns of a matrix.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from latentgnn.kernels.common import load_affine, load_valid, product, projections_in
from latentgnn.kernels.sizes import padded
from latentgnn.kernels.weights import Projected

_CHANNELS = 128


@triton.jit  # type: ignore[untyped-decorator]
def add_product_kernel(  # type: ignore[no-untyped-def]
    base,
    valid,
    f,
    matrix,
    weight,
    bias,
    mean,
    var,
    gamma,
    out,
    eps,
    nodes,
    channels,
    inner,
    blocks,
    base_sample,
    base_node,
    base_channel,
    f_sample,
    f_node,
    f_channel,
    out_sample,
    out_node,
    out_channel,
    matrix_channel,
    matrix_inner,
    RESIDUAL: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Some channels of a block of nodes."""
    program = tl.program_id(0).to(tl.int64)
    sample = program // blocks
    n_N = program % blocks * BLOCK_N + tl.arange(0, BLOCK_N)
    # Nodes of all channels may be more than 32 bits count.
    c_C = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C).to(tl.int64)
    k_K = tl.arange(0, BLOCK_K).to(tl.int64)
    inside_N, inside_C = n_N < nodes, c_C < channels
    sum_NC = tl.zeros((BLOCK_N, BLOCK_C), tl.float32)
    f += sample * f_sample + n_N[:, None] * f_node
    for start in range(0, inner, BLOCK_K):
        inside_K = start + k_K < inner
        f_NK = tl.load(f + (start + k_K)[None, :] * f_channel, mask=inside_N[:, None] & inside_K[None, :], other=0.0)
        matrix_KC = tl.load(
            matrix + (start + k_K)[:, None] * matrix_inner + c_C[None, :] * matrix_channel,
            mask=inside_K[:, None] & inside_C[None, :],
            other=0.0,
        )
        sum_NC += product(f_NK, matrix_KC, matrix.dtype.element_ty, PRECISION)
    scale_C, shift_C = load_affine(weight, bias, mean, var, eps, c_C, inside_C)
    sum_NC = sum_NC * scale_C[None, :] + shift_C[None, :]
    if gamma is not None:
        sum_NC *= tl.load(gamma).to(tl.float32)
    inside_NC = inside_N[:, None] & inside_C[None, :]
    if base is not None:
        place_NC = sample * base_sample + n_N[:, None] * base_node + c_C[None, :] * base_channel
        base_NC = tl.load(base + place_NC, mask=inside_NC, other=0.0).to(tl.float32)
        if RESIDUAL:
            sum_NC += base_NC
        if valid is not None:
            sum_NC = tl.where(load_valid(valid + sample * nodes, n_N, nodes)[:, None] > 0, sum_NC, base_NC)
    place_NC = sample * out_sample + n_N[:, None] * out_node + c_C[None, :] * out_channel
    tl.store(out + place_NC, sum_NC.to(out.dtype.element_ty), mask=inside_NC)


@triton.jit  # type: ignore[untyped-decorator]
def scaled_kernel(  # type: ignore[no-untyped-def]
    matrix, weight, bias, mean, var, gamma, out, eps, rows, columns, BLOCK_O: tl.constexpr, BLOCK_I: tl.constexpr
):
    """Some rows of a matrix times what the norm after it multiplies by."""
    o_O = tl.program_id(0) * BLOCK_O + tl.arange(0, BLOCK_O)
    i_I = tl.program_id(1) * BLOCK_I + tl.arange(0, BLOCK_I)
    inside_O = o_O < rows
    scale_O, _ = load_affine(weight, bias, mean, var, eps, o_O, inside_O)
    if gamma is not None:
        scale_O *= tl.load(gamma).to(tl.float32)
    place_OI, place_IO = (o_O * columns)[:, None] + i_I[None, :], (i_I * rows)[None, :] + o_O[:, None]
    inside_OI = inside_O[:, None] & (i_I < columns)[None, :]
    matrix_OI = tl.load(matrix + place_OI, mask=inside_OI, other=0.0).to(tl.float32)
    tl.store(out + place_IO, (matrix_OI * scale_O[:, None]).to(out.dtype.element_ty), mask=inside_OI)


def add_product(
    base_BNC: Tensor,
    valid_BN: Tensor | None,
    f_BNK: Tensor,
    matrix_CK: Tensor,
    norm: Projected | None,
    gamma: Tensor | None,
    out_BNC: Tensor,
    *,
    residual: bool,
) -> None:
    """Write gamma norm(f matrix^T), plus the base if ``residual``; nodes outside the mask get the base.

    Args:
        base_BNC: any strides and its type, like all tensors over nodes.
        valid_BN: which nodes take part, in bytes; ``None`` for all.
        f_BNK: features, in the dtype of the products.
        matrix_CK: any strides.
        norm: after the product; ``None`` without one.
        gamma: (1,); ``None`` for 1.
        out_BNC: written to.
        residual: the base is added.
    """
    batch, nodes, inner = f_BNK.shape
    base = base_BNC if residual or valid_BN is not None else None
    # Measured (docs/results.md): with larger blocks, too few programs are left to hide the wait for memory.
    block = 32 if f_BNK.dtype == torch.float32 else 64
    blocks, channels = triton.cdiv(nodes, block), matrix_CK.shape[0]
    add_product_kernel[blocks * batch, triton.cdiv(channels, _CHANNELS)](
        base,
        valid_BN,
        f_BNK,
        matrix_CK,
        *([None] * 4 if norm is None else norm.norm),
        gamma,
        out_BNC,
        0.0 if norm is None else norm.eps,
        nodes,
        channels,
        inner,
        blocks,
        *base_BNC.stride(),
        *f_BNK.stride(),
        *out_BNC.stride(),
        *matrix_CK.stride(),
        RESIDUAL=residual,
        PRECISION=projections_in(),
        BLOCK_N=block,
        BLOCK_C=_CHANNELS,
        BLOCK_K=min(padded(inner), 64),
        num_warps=4,
        num_stages=2,
    )


def scaled(projected: Projected, gamma: Tensor | None) -> Tensor:
    """A matrix times the scale of its norm and gamma, transposed: (I, O).

    Args:
        projected: the matrix, (O, I), and the norm.
        gamma: (1,); ``None`` for 1.
    """
    rows, columns = projected.matrix.shape
    out_IO = projected.matrix.new_empty((columns, rows))
    scaled_kernel[triton.cdiv(rows, 32), triton.cdiv(columns, 32)](
        projected.matrix, *projected.norm, gamma, out_IO, projected.eps, rows, columns, BLOCK_O=32, BLOCK_I=32
    )
    return out_IO
