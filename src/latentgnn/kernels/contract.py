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


@triton.jit  # type: ignore[untyped-decorator]
def contract_kernel(  # type: ignore[no-untyped-def]
    left,
    right,
    parts,
    totals,
    nodes,
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
    PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """For a part of a row's nodes, some channels of both; the first channels of ``left`` also sum up ``right``."""
    o_O = tl.program_id(0) * BLOCK_O + tl.arange(0, BLOCK_O)
    c_C = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    inside_O, inside_C = o_O < outputs, c_C < channels
    part = tl.program_id(2).to(tl.int64)
    first = (part % splits) * nodes_of_split
    last = tl.minimum(first + nodes_of_split, nodes)
    left += (part // splits) * left_row + o_O[:, None] * left_channel
    right += (part // splits) * right_row + c_C[None, :] * right_channel
    sum_OC, total_C = tl.zeros((BLOCK_O, BLOCK_C), tl.float32), tl.zeros((BLOCK_C,), tl.float32)
    for start in range(first, last, BLOCK_N):
        n_N = start + tl.arange(0, BLOCK_N)
        inside_N = n_N < last
        left_ON = tl.load(left + n_N[None, :] * left_node, mask=inside_O[:, None] & inside_N[None, :], other=0.0)
        right_NC = tl.load(right + n_N[:, None] * right_node, mask=inside_N[:, None] & inside_C[None, :], other=0.0)
        sum_OC += product(left_ON, right_NC, left.dtype.element_ty, PRECISION)
        if totals is not None:
            total_C += tl.sum(right_NC.to(tl.float32), 0)
    place_OC = (part * outputs + o_O)[:, None] * channels + c_C[None, :]
    tl.store(parts + place_OC, sum_OC, mask=inside_O[:, None] & inside_C[None, :])
    if totals is not None:
        if tl.program_id(0) == 0:
            tl.store(totals + part * channels + c_C, total_C, mask=inside_C)


@triton.jit  # type: ignore[untyped-decorator]
def expand_gradients_kernel(  # type: ignore[no-untyped-def]
    parts,
    totals,
    matrix,
    weight,
    bias,
    mean,
    var,
    gamma,
    grad_matrix,
    vectors,
    eps,
    splits,
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
    along_C, total_C = tl.zeros((BLOCK_C,), tl.float32), tl.zeros((BLOCK_C,), tl.float32)
    for split in range(splits):
        total_C += tl.load(totals + split * channels + c_C, mask=inside_C, other=0.0)
    for start in range(0, inner, BLOCK_K):
        inside_CK = inside_C[:, None] & (start + k_K < inner)[None, :]
        grad_CK = tl.zeros((BLOCK_C, BLOCK_K), tl.float32)
        for split in range(splits):
            place_CK = (split * inner + start + k_K).to(tl.int64)[None, :] * channels + c_C[:, None]
            grad_CK += tl.load(parts + place_CK, mask=inside_CK, other=0.0)
        place_CK = c_C[:, None] * inner + (start + k_K)[None, :]
        along_C += tl.sum(grad_CK * tl.load(matrix + place_CK, mask=inside_CK, other=0.0).to(tl.float32), 1)
        grad_CK *= (scale_C * factor)[:, None]
        tl.store(grad_matrix + place_CK, grad_CK.to(grad_matrix.dtype.element_ty), mask=inside_CK)
    tl.store(vectors + c_C, along_C * factor, mask=inside_C)
    tl.store(vectors + channels + c_C, total_C * factor, mask=inside_C)
    tl.store(vectors + 2 * channels + c_C, along_C * scale_C + total_C * shift_C, mask=inside_C)


def contract(left_BNO: Tensor, right_BNC: Tensor, *, totals: bool = False) -> tuple[Tensor, Tensor | None]:
    """left^T right over all nodes, in parts.

    Args:
        left_BNO: whatever its strides, like ``right``.
        right_BNC: in the same type.
        totals: give the sums of ``right`` too.

    Returns:
        (P, O, C) and (P, C), in float32.
    """
    batch, nodes, outputs = left_BNO.shape
    channels = right_BNC.shape[2]
    block = min(padded(outputs), 64)
    tiles = (triton.cdiv(outputs, block), triton.cdiv(channels, _CHANNELS))
    splits = max(2 * multiprocessors(left_BNO.device) // max(batch * tiles[0] * tiles[1], 1), 1)
    nodes_of_split = max(triton.cdiv(triton.cdiv(nodes, splits), _NODES), 4) * _NODES
    splits = triton.cdiv(nodes, nodes_of_split)
    parts = left_BNO.new_empty((batch * splits, outputs, channels), dtype=torch.float32)
    sums = left_BNO.new_empty((batch * splits, channels), dtype=torch.float32) if totals else None
    contract_kernel[*tiles, batch * splits](
        left_BNO,
        right_BNC,
        parts,
        sums,
        nodes,
        nodes_of_split,
        splits,
        outputs,
        channels,
        *left_BNO.stride(),
        *right_BNC.stride(),
        PRECISION=projections_in(),
        BLOCK_N=_NODES,
        BLOCK_O=block,
        BLOCK_C=_CHANNELS,
        num_warps=4,
        num_stages=3,
    )
    return parts, sums


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
    parts, totals = contract(feature_BNR, grad_BNC, totals=True)
    channels, inner = expand.matrix.shape
    grad_matrix = torch.empty_like(expand.matrix)
    vectors = parts.new_empty((3, channels))
    expand_gradients_kernel[(triton.cdiv(channels, 16),)](
        parts,
        totals,
        expand.matrix,
        *expand.norm,
        gamma,
        grad_matrix,
        vectors,
        expand.eps,
        len(parts),
        channels,
        inner,
        BLOCK_C=16,
        BLOCK_K=min(padded(inner), 64),
        num_warps=4,
    )
    scale, shift, of_gamma = vectors.unbind()
    return grad_matrix, scale, shift, of_gamma.sum(0, keepdim=True)
