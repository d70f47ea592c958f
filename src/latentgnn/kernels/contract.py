"""Sums over all nodes of products of two tensors: the gradients of the reductions and of the expansion.

Each program adds up a part of the nodes; the parts are summed afterwards, always in the same order.

Axes: B rows of the input, P parts, N nodes of a block, O and C channels of the two tensors.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from latentgnn.kernels.common import load_affine, product, projections_in
from latentgnn.kernels.rows import multiprocessors
from latentgnn.kernels.sizes import padded
from latentgnn.kernels.weights import Projected

_CHANNELS, _NODES = 128, 32
# Programs per multiprocessor.
_PROGRAMS = 2


@triton.jit  # type: ignore[untyped-decorator]
def contract_kernel(  # type: ignore[no-untyped-def]
    left,
    right,
    parts,
    rows,
    nodes,
    rows_of_part,
    nodes_of_split,
    splits,
    outputs,
    channels,
    left_row,
    left_node,
    left_channel,
    right_row,
    right_node,
    right_channel,
    TOTALS: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """A tile of left^T right over some rows, or a part of one row's nodes; with TOTALS also the sums of ``right``."""
    # One grid dimension only, because the others are limited to 65,535 programs.
    program, blocks_O, blocks_C = tl.program_id(0), tl.cdiv(outputs, BLOCK_O), tl.cdiv(channels, BLOCK_C)
    block_O, part = program % blocks_O, (program // (blocks_O * blocks_C)).to(tl.int64)
    o_O = block_O * BLOCK_O + tl.arange(0, BLOCK_O)
    c_C = program // blocks_O % blocks_C * BLOCK_C + tl.arange(0, BLOCK_C)
    inside_O, inside_C = o_O < outputs, c_C < channels
    first_row = (part // splits) * rows_of_part
    first = (part % splits) * nodes_of_split
    last = tl.minimum(first + nodes_of_split, nodes)
    left += o_O[:, None].to(tl.int64) * left_channel
    right += c_C[None, :].to(tl.int64) * right_channel
    sum_OC, total_C = tl.zeros((BLOCK_O, BLOCK_C), tl.float32), tl.zeros((BLOCK_C,), tl.float32)
    for row in range(first_row, tl.minimum(first_row + rows_of_part, rows)):
        left_O, right_C = left + row * left_row, right + row * right_row
        for start in range(first, last, BLOCK_N):
            n_N = start + tl.arange(0, BLOCK_N)
            inside_N = n_N < last
            left_ON = tl.load(left_O + n_N[None, :] * left_node, mask=inside_O[:, None] & inside_N[None, :], other=0.0)
            right_NC = tl.load(
                right_C + n_N[:, None] * right_node, mask=inside_N[:, None] & inside_C[None, :], other=0.0
            )
            sum_OC += product(left_ON, right_NC, left.dtype.element_ty, PRECISION)
            if TOTALS:
                total_C += tl.sum(right_NC.to(tl.float32), 0)
    parts += part * (outputs + (1 if TOTALS else 0)) * channels
    tl.store(parts + (o_O * channels)[:, None] + c_C[None, :], sum_OC, mask=inside_O[:, None] & inside_C[None, :])
    if TOTALS:  # noqa: SIM102 - a constant, and then a number on the device
        if block_O == 0:
            tl.store(parts + outputs * channels + c_C, total_C, mask=inside_C)


@triton.jit  # type: ignore[untyped-decorator]
def expand_gradients_kernel(  # type: ignore[no-untyped-def]
    sums,
    matrix,
    weight,
    bias,
    mean,
    var,
    gamma,
    grad_matrix,
    vectors,
    eps,
    channels,
    inner,
    BLOCK_C: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Of gamma norm(U f), for some channels: gradients of U, of the norm's scale and shift, and parts of gamma's."""
    c_C, k_K = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C), tl.arange(0, BLOCK_K)
    inside_C = c_C < channels
    scale_C, shift_C = load_affine(weight, bias, mean, var, eps, c_C, inside_C)
    factor = 1.0
    if gamma is not None:
        factor = tl.load(gamma).to(tl.float32)
    total_C = tl.load(sums + inner * channels + c_C, mask=inside_C, other=0.0)
    along_C = tl.zeros((BLOCK_C,), tl.float32)
    for start in range(0, inner, BLOCK_K):
        inside_CK = inside_C[:, None] & (start + k_K < inner)[None, :]
        grad_CK = tl.load(sums + (start + k_K)[None, :] * channels + c_C[:, None], mask=inside_CK, other=0.0)
        place_CK = c_C[:, None] * inner + (start + k_K)[None, :]
        along_C += tl.sum(grad_CK * tl.load(matrix + place_CK, mask=inside_CK, other=0.0).to(tl.float32), 1)
        grad_CK *= (scale_C * factor)[:, None]
        tl.store(grad_matrix + place_CK, grad_CK.to(grad_matrix.dtype.element_ty), mask=inside_CK)
    tl.store(vectors + c_C, along_C * factor, mask=inside_C)
    tl.store(vectors + channels + c_C, total_C * factor, mask=inside_C)
    tl.store(vectors + 2 * channels + c_C, along_C * scale_C + total_C * shift_C, mask=inside_C)


def contract(left_BNO: Tensor, right_BNC: Tensor, *, totals: bool = False) -> Tensor:
    """left^T right over all nodes, (O, C) in float32; with ``totals`` one more row, the sums of ``right``.

    Args:
        left_BNO: any strides, like ``right``.
        right_BNC: in the same dtype.
        totals: also return the sums of ``right``.
    """
    batch, nodes, outputs = left_BNO.shape
    channels = right_BNC.shape[2]
    block = min(padded(outputs), 128)
    tiles = triton.cdiv(outputs, block) * triton.cdiv(channels, _CHANNELS)
    wanted = max(_PROGRAMS * multiprocessors(left_BNO.device) // tiles, 1)
    # Each part stores its own sums; one part per row would need more memory than many rows of a few nodes.
    rows_of_part = triton.cdiv(batch, wanted)
    splits = max(wanted // batch, 1)
    nodes_of_split = max(triton.cdiv(triton.cdiv(nodes, splits), _NODES), 4) * _NODES
    splits = triton.cdiv(nodes, nodes_of_split)
    number = triton.cdiv(batch, rows_of_part) * splits
    parts = left_BNO.new_empty((number, outputs + int(totals), channels), dtype=torch.float32)
    contract_kernel[(tiles * number,)](
        left_BNO,
        right_BNC,
        parts,
        batch,
        nodes,
        rows_of_part,
        nodes_of_split,
        splits,
        outputs,
        channels,
        *left_BNO.stride(),
        *right_BNC.stride(),
        TOTALS=totals,
        PRECISION=projections_in(),
        BLOCK_N=_NODES,
        BLOCK_O=block,
        BLOCK_C=_CHANNELS,
        num_warps=8 if block > 64 else 4,
        num_stages=3,
    )
    return parts[0] if len(parts) == 1 else parts.sum(0)


def expand_gradients(
    feature_BNR: Tensor, grad_BNC: Tensor, expand: Projected, gamma: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Of gamma norm(U f): gradients of U, of the norm's scale and shift, and of gamma.

    Args:
        feature_BNR: f.
        grad_BNC: of the result.
        expand: U and the norm.
        gamma: (1,); ``None`` for 1.

    Returns:
        (C, R) in U's type, (C,), (C,) and (1,).
    """
    channels, inner = expand.matrix.shape
    sums = contract(feature_BNR, grad_BNC, totals=True)
    grad_matrix, vectors = torch.empty_like(expand.matrix), sums.new_empty((3, channels))
    expand_gradients_kernel[(triton.cdiv(channels, 16),)](
        sums,
        expand.matrix,
        *expand.norm,
        gamma,
        grad_matrix,
        vectors,
        expand.eps,
        channels,
        inner,
        BLOCK_C=16,
        BLOCK_K=min(padded(inner), 64),
        num_warps=4,
    )
    scale, shift, of_gamma = vectors.unbind()
    return grad_matrix, scale, shift, of_gamma.sum(0, keepdim=True)
