"""The middle of the forward pass as Triton kernels: between the reduction and the expansion, one pass each way.

`latentgnn.tiles` leaves the two large products to PyTorch's own routines. Between them it takes about ten passes over
tensors of R or D numbers a node (lengths, scales, rectifiers, sums); here `gather` reads the reduced channels once for
each block of latents and writes only sums, and `scatter` reads them once for each kernel and writes what the output is
expanded from.

Axes: s samples, T nodes, G groups, E = s * G graphs, r channels of a group, D latents of a group, F features.
"""

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from latentgnn.functional import EPS
from latentgnn.tiles import Plan, Weights, rows

# Small processors of recent years give 99 KiB of shared memory to a block: so much of it a matrix of the layer may
# have, so much the rows of a block's nodes, and so many numbers a row.
_MATRIX_BYTES = 1 << 16
_ROWS_BYTES = 1 << 14
_WIDEST = 256
# So many programs for each multiprocessor keep it busy while others wait for memory.
_PROGRAMS = 4
_EPS2 = EPS**2


def takes(weights: Weights, plan: Plan) -> bool:
    """Whether the kernels know this layer: asymmetric, in single or half precision, with matrices that fit."""
    assigns = weights.scatter_assign
    if plan.symmetric or plan.compute == torch.float64:
        return False
    if assigns is None or assigns.shape != weights.gather_assign.shape:  # they shift nothing
        return False
    width, latents = _block(assigns.shape[2] - 1), _block(max(plan.latents))
    return max(width, latents) <= _WIDEST and width * latents * plan.compute.itemsize <= _MATRIX_BYTES


@triton.jit  # type: ignore[untyped-decorator]
def _inverse_length(x_NF, eps2: tl.constexpr):  # type: ignore[no-untyped-def]
    squares_N = tl.sum(x_NF * x_NF, 1)
    return tl.where(squares_N > eps2, 1.0 / tl.sqrt(tl.maximum(squares_N, eps2)), 0.0)


@triton.jit
def _rectified(x):  # type: ignore[no-untyped-def]
    """ReLU that keeps NaN, as PyTorch's does and a maximum does not."""
    return tl.where(x < 0, 0.0, x)


@triton.jit  # type: ignore[untyped-decorator]
def _counting(valid, sample, n_N, last, nodes, MASKED: tl.constexpr):  # type: ignore[no-untyped-def]
    """1 for nodes that count and 0 for others."""
    inside_N = n_N < last
    if MASKED:
        inside_N = inside_N & (tl.load(valid + sample * nodes + n_N, mask=inside_N, other=0) != 0)
    return inside_N.to(tl.float32)


@triton.jit  # type: ignore[untyped-decorator]
def _affine(row_O, inside_O, columns, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """Matrix and shift of an affine tensor, given where its rows begin."""
    column = tl.arange(0, BLOCK)
    inside_OI = inside_O[:, None] & (column < columns)[None, :]
    matrix_OI = tl.load(row_O[:, None] + column[None, :], mask=inside_OI, other=0.0)
    return matrix_OI, tl.load(row_O + columns, mask=inside_O, other=0.0).to(tl.float32)


@triton.jit  # type: ignore[untyped-decorator]
def _applied(x_NI, matrix_OI, shift_O, counting_N, PRECISION: tl.constexpr):  # type: ignore[no-untyped-def]
    """An affine tensor and the rectifier after it, zero for nodes that do not count."""
    y_NO = tl.dot(x_NI.to(matrix_OI.dtype), tl.trans(matrix_OI), input_precision=PRECISION)
    return _rectified(y_NO + shift_O[None, :] * counting_N[:, None])


@triton.jit  # type: ignore[untyped-decorator]
def _unit(x_NF, counting_N, EPS2: tl.constexpr):  # type: ignore[no-untyped-def]
    """Rows of unit length, of zeros where nodes do not count."""
    return x_NF * (_inverse_length(x_NF, EPS2) * counting_N)[:, None]


@triton.jit  # type: ignore[untyped-decorator]
def _gather(  # type: ignore[no-untyped-def]
    u,
    valid,
    assign,
    sums,
    squares,
    nodes,
    nodes_of_split,
    u_sample,
    u_node,
    assign_row,
    groups,
    width,
    latents,
    MASKED: tl.constexpr,
    EPS2: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    graph, split = tl.program_id(0).to(tl.int64), tl.program_id(2).to(tl.int64)
    sample, group = graph // groups, graph % groups
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    c = tl.arange(0, BLOCK_R)
    psi_DR, shift_D = _affine(assign + (group * latents + d) * assign_row, d < latents, width, BLOCK_R)
    total_DR = tl.zeros((BLOCK_D, BLOCK_R), tl.float32)
    ones_D = tl.zeros((BLOCK_D,), tl.float32)
    squares_D = tl.zeros((BLOCK_D,), tl.float32)
    first = split * nodes_of_split
    last = tl.minimum(first + nodes_of_split, nodes)
    for start in range(first, last, BLOCK_N):
        n = start + tl.arange(0, BLOCK_N)
        counting_N = _counting(valid, sample, n, last, nodes, MASKED)
        inside_NR = (n < last)[:, None] & (c < width)[None, :]
        u_NR = tl.load(
            u + sample * u_sample + n[:, None] * u_node + (group * width + c)[None, :], mask=inside_NR, other=0.0
        ).to(tl.float32)
        v_NR = _unit(u_NR, counting_N, EPS2).to(psi_DR.dtype)
        a_ND = _applied(v_NR, psi_DR, shift_D, counting_N, PRECISION)
        ones_D += tl.sum(a_ND, 0)
        squares_D += tl.sum(a_ND * a_ND, 0)
        total_DR += tl.dot(tl.trans(a_ND.to(psi_DR.dtype)), v_NR, input_precision=PRECISION)
    row = (split * tl.num_programs(0) + graph) * latents + d
    tl.store(
        sums + row[:, None] * (width + 1) + c[None, :], total_DR, mask=(d < latents)[:, None] & (c < width)[None, :]
    )
    tl.store(sums + row * (width + 1) + width, ones_D, mask=d < latents)
    tl.store(squares + row, squares_D, mask=d < latents)


@triton.jit  # type: ignore[untyped-decorator]
def _scatter(  # type: ignore[no-untyped-def]
    u,
    valid,
    assign,
    convolving,
    feature,
    nodes,
    blocks,
    u_sample,
    u_node,
    assign_row,
    convolving_row,
    feature_sample,
    feature_node,
    groups,
    width,
    latents,
    before,
    count,
    kernel,
    CONVOLVES: tl.constexpr,
    MASKED: tl.constexpr,
    EPS2: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    # One axis for both: the others of a grid end at 65,535.
    program = tl.program_id(0).to(tl.int64)
    graph = program // blocks
    sample, group = graph // groups, graph % groups
    n = program % blocks * BLOCK_N + tl.arange(0, BLOCK_N)
    d, c = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_R)
    counting_N = _counting(valid, sample, n, nodes, nodes, MASKED)
    u += sample * u_sample + n * u_node
    inside_ND = (n < nodes)[:, None] & (d < count)[None, :]
    inside_NR = (n < nodes)[:, None] & (c < width)[None, :]
    u_NR = tl.load(u[:, None] + (group * width + c)[None, :], mask=inside_NR, other=0.0).to(tl.float32)
    psi_DR, shift_D = _affine(assign + (group * latents + before + d) * assign_row, d < count, width, BLOCK_R)
    q_ND = _unit(_applied(_unit(u_NR, counting_N, EPS2), psi_DR, shift_D, counting_N, PRECISION), counting_N, EPS2)
    feature += sample * feature_sample + n * feature_node
    if CONVOLVES:
        matrix_RD, shift_R = _affine(convolving + (graph * width + c) * convolving_row, c < width, count, BLOCK_D)
        f_NR = _applied(q_ND, matrix_RD, shift_R, counting_N, PRECISION)
        column = (kernel * groups + group) * width + c
        tl.store(feature[:, None] + column[None, :], f_NR.to(feature.dtype.element_ty), mask=inside_NR)
    else:
        column = group * latents + before + d
        tl.store(feature[:, None] + column[None, :], q_ND.to(feature.dtype.element_ty), mask=inside_ND)


def gather(
    u_sTR: Tensor, valid_sT1: Tensor | None, assign_GDr: Tensor, sums_sGDr: Tensor, squares_sGD: Tensor, plan: Plan
) -> None:
    """Add a tile to the sums of values and of ones and to those of squared assignments.

    Args:
        u_sTR: what gather starts from, channels innermost.
        valid_sT1: nodes that count.
        assign_GDr: affine tensor (G, D, r + 1) in the type of the products.
        sums_sGDr: (s, G, D, r + 1), added to.
        squares_sGD: (s, G, D), added to.
        plan: of the layer.
    """
    samples, nodes, _ = u_sTR.shape
    groups, latents, width = assign_GDr.shape[0], assign_GDr.shape[1], assign_GDr.shape[2] - 1
    block_nodes = _nodes_of_block(width, plan.compute)
    block_latents = _latents_of_block(block_nodes)
    blocks = triton.cdiv(latents, block_latents)
    splits = max(_programs(u_sTR.device) // (samples * groups * blocks), 1)
    nodes_of_split = triton.cdiv(triton.cdiv(nodes, splits), block_nodes) * block_nodes
    splits = triton.cdiv(nodes, nodes_of_split)
    parts = sums_sGDr.new_empty((splits, *sums_sGDr.shape))
    square_parts = squares_sGD.new_empty((splits, *squares_sGD.shape))
    valid = None if valid_sT1 is None else valid_sT1.contiguous()
    with torch.cuda.device_of(u_sTR):
        _gather[samples * groups, blocks, splits](
            u_sTR,
            u_sTR if valid is None else valid.view(torch.uint8),
            assign_GDr,
            parts,
            square_parts,
            nodes,
            nodes_of_split,
            u_sTR.stride(0),
            u_sTR.stride(1),
            assign_GDr.stride(1),
            groups,
            width,
            latents,
            MASKED=valid is not None,
            EPS2=_EPS2,
            PRECISION=_precision(),
            BLOCK_N=block_nodes,
            BLOCK_R=_block(width),
            BLOCK_D=block_latents,
            **_options(width, block_latents),
        )
    sums_sGDr += parts.sum(0)
    squares_sGD += square_parts.sum(0)


def scatter(
    u_sTR: Tensor, valid_sT1: Tensor | None, assign_GDr: Tensor, latents: Sequence[Tensor], plan: Plan
) -> Tensor:
    """What a tile's output is expanded from, with a column of ones, (s, T, F + 1).

    Args:
        u_sTR: what scatter starts from, channels innermost.
        valid_sT1: nodes that count.
        assign_GDr: affine tensor (G, D, r + 1) in the type of the products.
        latents: of each kernel, the affine tensor (s, G, r, D_k + 1) of the graph convolution, if there is one.
        plan: of the layer.
    """
    samples, nodes, _ = u_sTR.shape
    groups, every, width = assign_GDr.shape[0], assign_GDr.shape[1], assign_GDr.shape[2] - 1
    features = groups * (width * len(latents) if latents else every)
    feature_sTF = rows((samples, nodes, features + 1), u_sTR, plan.compute)
    if valid_sT1 is None:
        feature_sTF[..., -1].fill_(1)
    else:
        feature_sTF[..., -1:].copy_(valid_sT1)
    valid = None if valid_sT1 is None else valid_sT1.contiguous()
    for index, kernel in enumerate(plan.kernels):
        count = kernel.stop - kernel.start
        block_nodes = _nodes_of_block(max(width, count), plan.compute)
        blocks = triton.cdiv(nodes, block_nodes)
        convolving = latents[index].contiguous() if latents else None
        with torch.cuda.device_of(u_sTR):
            _scatter[(blocks * samples * groups,)](
                u_sTR,
                u_sTR if valid is None else valid.view(torch.uint8),
                assign_GDr,
                u_sTR if convolving is None else convolving,
                feature_sTF,
                nodes,
                blocks,
                u_sTR.stride(0),
                u_sTR.stride(1),
                assign_GDr.stride(1),
                0 if convolving is None else convolving.stride(2),
                feature_sTF.stride(0),
                feature_sTF.stride(1),
                groups,
                width,
                every,
                kernel.start,
                count,
                index,
                CONVOLVES=convolving is not None,
                MASKED=valid is not None,
                EPS2=_EPS2,
                PRECISION=_precision(),
                BLOCK_N=block_nodes,
                BLOCK_R=_block(width),
                BLOCK_D=_block(count),
                **_options(width, count),
            )
    return feature_sTF


def _block(size: int) -> int:
    """The power of two that products take: 16 at least."""
    return max(triton.next_power_of_2(size), 16)


def _nodes_of_block(widest: int, dtype: torch.dtype) -> int:
    """Nodes at a time: with rows of so many numbers, what a block holds of them fits beside a matrix."""
    return max(min(_ROWS_BYTES // (_block(widest) * dtype.itemsize), 64), 16)


def _latents_of_block(nodes: int) -> int:
    return min(2 * nodes, 64)


def _options(width: int, latents: int) -> dict[str, Any]:
    """How the kernels are compiled; said in full because what Triton does without being asked changes by version."""
    return {"num_warps": 8 if max(width, latents) > 128 else 4, "enable_fp_fusion": True}


def _precision() -> str:
    """How float32 is multiplied: as PyTorch's own products are allowed to."""
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"


def _programs(device: torch.device) -> int:
    return _PROGRAMS * (torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1)
