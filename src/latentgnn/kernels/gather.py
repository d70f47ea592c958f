"""Visible to latent, V = l2(norm(W x)), P = relu(norm(Psi V)), Z = sum of P V^T, from W x in one pass; and back.

The backward pass computes V and P again. Each program adds up a part of a sample's nodes; the parts are summed by
PyTorch, always in the same order.

Axes: S samples, N nodes of a block, R reduced channels, D latents of a block.
"""

import triton
import triton.language as tl
from torch import Tensor

from latentgnn.kernels.common import (
    before_unit,
    load_affine,
    load_matrix,
    load_unit,
    load_valid,
    nodes_of,
    place_of,
    product,
    rectified,
)
from latentgnn.kernels.way import Way


@triton.jit  # type: ignore[untyped-decorator]
def gather_kernel(  # type: ignore[no-untyped-def]
    u,
    up,
    valid,
    bounds,
    reduce_weight,
    reduce_bias,
    reduce_mean,
    reduce_var,
    psi,
    assign_weight,
    assign_bias,
    assign_mean,
    assign_var,
    grad_sums,
    grad_weights,
    parts,
    reduce_eps,
    assign_eps,
    nodes,
    nodes_of_split,
    u_sample,
    u_node,
    u_channel,
    width,
    latents,
    BACKWARD: tl.constexpr,
    MEAN: tl.constexpr,
    EPS2: tl.constexpr,
    PROJECTIONS: tl.constexpr,
    SUMS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """For some latents of one sample and a part of its nodes: sums, and in the last column their divisor.

    Backward: the gradients of Psi, then those of the scale and of the shift of the norm after it.
    """
    sample, split = tl.program_id(0).to(tl.int64), tl.program_id(2).to(tl.int64)
    d_D, r_R = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_R)
    inside_D, inside_R = d_D < latents, r_R < width
    scale_R, shift_R = load_affine(reduce_weight, reduce_bias, reduce_mean, reduce_var, reduce_eps, r_R, inside_R)
    scale_D, shift_D = load_affine(assign_weight, assign_bias, assign_mean, assign_var, assign_eps, d_D, inside_D)
    kind = psi.dtype.element_ty
    psi_DR = load_matrix(psi + d_D * width, inside_D, width, BLOCK_R)
    if BACKWARD:
        grad_DR = load_matrix(grad_sums + (sample * latents + d_D) * width, inside_D, width, BLOCK_R)
        grad_weight_D = tl.load(grad_weights + sample * latents + d_D, mask=inside_D, other=0.0)
    sums_DR = tl.zeros((BLOCK_D, BLOCK_R), tl.float32)
    first_D, second_D = tl.zeros((BLOCK_D,), tl.float32), tl.zeros((BLOCK_D,), tl.float32)
    begin, count = nodes_of(bounds, sample, nodes)
    first = begin + split * nodes_of_split
    last = tl.minimum(first + nodes_of_split, begin + count)
    u += sample * u_sample
    if valid is not None and bounds is None:
        valid += sample * nodes
    for start in range(first, last, BLOCK_N):
        n_N = start + tl.arange(0, BLOCK_N)
        valid_N = load_valid(valid, n_N, last)
        inside_NR = (n_N < last)[:, None] & inside_R[None, :]
        place_NR = place_of(n_N, r_R, u_node, u_channel)
        _, v_NR, _ = load_unit(u, up, place_NR, inside_NR, scale_R, shift_R, inside_R, valid_N, EPS2)
        raw_ND = product(v_NR, tl.trans(psi_DR), kind, PROJECTIONS)
        s_ND = raw_ND * scale_D[None, :] + shift_D[None, :]
        p_ND = rectified(s_ND) * valid_N[:, None]
        if BACKWARD:
            p_ND = product(v_NR, tl.trans(grad_DR), kind, SUMS) + grad_weight_D[None, :] * (1.0 if MEAN else 2.0 * p_ND)
            p_ND = tl.where(s_ND > 0, p_ND, 0.0) * valid_N[:, None]
            first_D += tl.sum(p_ND * raw_ND, 0)
            second_D += tl.sum(p_ND, 0)
            sums_DR += product(tl.trans(p_ND * scale_D[None, :]), v_NR, kind, PROJECTIONS)
        else:
            first_D += tl.sum(p_ND if MEAN else p_ND * p_ND, 0)
            sums_DR += product(tl.trans(p_ND), v_NR, kind, SUMS)
    parts += (split * tl.num_programs(0) + sample) * latents * (width + (2 if BACKWARD else 1))
    inside_DR = inside_D[:, None] & inside_R[None, :]
    if BACKWARD:
        tl.store(parts + (d_D * width)[:, None] + r_R[None, :], sums_DR, mask=inside_DR)
        tl.store(parts + latents * width + d_D, first_D, mask=inside_D)
        tl.store(parts + latents * (width + 1) + d_D, second_D, mask=inside_D)
    else:
        tl.store(parts + (d_D * (width + 1))[:, None] + r_R[None, :], sums_DR, mask=inside_DR)
        tl.store(parts + d_D * (width + 1) + width, first_D, mask=inside_D)


@triton.jit  # type: ignore[untyped-decorator]
def gather_values_kernel(  # type: ignore[no-untyped-def]
    u,
    up,
    valid,
    bounds,
    reduce_weight,
    reduce_bias,
    reduce_mean,
    reduce_var,
    psi,
    assign_weight,
    assign_bias,
    assign_mean,
    assign_var,
    grad_sums,
    grad_weights,
    grad_u,
    parts,
    reduce_eps,
    assign_eps,
    nodes,
    nodes_of_split,
    u_sample,
    u_node,
    u_channel,
    width,
    latents,
    MEAN: tl.constexpr,
    EPS2: tl.constexpr,
    PROJECTIONS: tl.constexpr,
    SUMS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Gradients of W x for a part of a sample's nodes, and of scale and shift of the norm after it."""
    sample, split = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    r_R = tl.arange(0, BLOCK_R)
    inside_R = r_R < width
    scale_R, shift_R = load_affine(reduce_weight, reduce_bias, reduce_mean, reduce_var, reduce_eps, r_R, inside_R)
    kind = psi.dtype.element_ty
    scale_grad_R, shift_grad_R = tl.zeros((BLOCK_R,), tl.float32), tl.zeros((BLOCK_R,), tl.float32)
    begin, count = nodes_of(bounds, sample, nodes)
    first = begin + split * nodes_of_split
    last = tl.minimum(first + nodes_of_split, begin + count)
    u += sample * u_sample
    grad_u += sample * u_sample
    if valid is not None and bounds is None:
        valid += sample * nodes
    for start in range(first, last, BLOCK_N):
        n_N = start + tl.arange(0, BLOCK_N)
        valid_N = load_valid(valid, n_N, last)
        inside_NR = (n_N < last)[:, None] & inside_R[None, :]
        place_NR = place_of(n_N, r_R, u_node, u_channel)
        u_NR, v_NR, inverse_N = load_unit(u, up, place_NR, inside_NR, scale_R, shift_R, inside_R, valid_N, EPS2)
        grad_NR = tl.zeros((BLOCK_N, BLOCK_R), tl.float32)
        for first_latent in range(0, latents, BLOCK_D):
            d_D = first_latent + tl.arange(0, BLOCK_D)
            inside_D = d_D < latents
            scale_D, shift_D = load_affine(
                assign_weight, assign_bias, assign_mean, assign_var, assign_eps, d_D, inside_D
            )
            psi_DR = load_matrix(psi + d_D * width, inside_D, width, BLOCK_R)
            grad_DR = load_matrix(grad_sums + (sample * latents + d_D) * width, inside_D, width, BLOCK_R)
            grad_weight_D = tl.load(grad_weights + sample * latents + d_D, mask=inside_D, other=0.0)
            s_ND = product(v_NR, tl.trans(psi_DR), kind, PROJECTIONS) * scale_D[None, :] + shift_D[None, :]
            p_ND = rectified(s_ND) * valid_N[:, None]
            grad_ND = product(v_NR, tl.trans(grad_DR), kind, SUMS)
            grad_ND += grad_weight_D[None, :] * (1.0 if MEAN else 2.0 * p_ND)
            grad_ND = tl.where(s_ND > 0, grad_ND * scale_D[None, :], 0.0) * valid_N[:, None]
            grad_NR += product(p_ND, grad_DR, kind, SUMS) + product(grad_ND, psi_DR, kind, PROJECTIONS)
        grad_NR = before_unit(grad_NR, v_NR, inverse_N)
        scale_grad_R += tl.sum(grad_NR * u_NR, 0)
        shift_grad_R += tl.sum(grad_NR, 0)
        tl.store(grad_u + place_NR, (grad_NR * scale_R[None, :]).to(grad_u.dtype.element_ty), mask=inside_NR)
    parts += (split * tl.num_programs(0) + sample) * 2 * width
    tl.store(parts + r_R, scale_grad_R, mask=inside_R)
    tl.store(parts + width + r_R, shift_grad_R, mask=inside_R)


def gather(way: Way, *, mean: bool) -> Tensor:
    """Sums of values by assignments over the nodes of each sample, and in the last column their divisors.

    Args:
        way: gather's.
        mean: sums are divided by sums of assignments, not by their length.

    Returns:
        (P, S, D, R + 1) in float32, for each of some parts of the nodes.
    """
    return _over_latents(way, None, None, mean=mean)


def gather_backward(
    way: Way, grad_sums_SDR: Tensor, grad_weights_SD: Tensor, grad_raw_BNR: Tensor, *, mean: bool, learns: bool
) -> list[Tensor | None]:
    """Write the gradient of W x, and give those of Psi, of its norm's scale and shift, and of the reduction's.

    Args:
        way: gather's.
        grad_sums_SDR: of the sums.
        grad_weights_SD: of what they are divided by.
        grad_raw_BNR: written to; with the strides of W x.
        mean: as `gather` had it.
        learns: whether the reduction's norm needs gradients.

    Returns:
        (D, R), (D,), (D,), (R,) and (R,) in float32; ``None`` for the last two where they are not learnt.
    """
    rows, numbers = way.rows, way.latents * way.width
    splits, nodes_of_split = way.splits()
    parts = way.new(splits * rows.samples, 2, way.width)
    gather_values_kernel[rows.samples, splits](
        *way.tensors,
        grad_sums_SDR,
        grad_weights_SD,
        grad_raw_BNR,
        parts,
        *way.eps,
        rows.nodes,
        nodes_of_split,
        *rows.strides(way.raw_BNR),
        *way.shape,
        MEAN=mean,
        **way.options,
    )
    of_latents = _over_latents(way, grad_sums_SDR, grad_weights_SD, mean=mean).flatten(0, 1)
    total = of_latents[0] if len(of_latents) == 1 else of_latents.sum(0)
    matrix, vectors = total.flatten().tensor_split([numbers])
    own = parts.sum(0) if learns else [None] * parts.shape[1]
    return [matrix.view(way.latents, way.width), *vectors.chunk(2), *own]


def _over_latents(way: Way, grad_sums_SDR: Tensor | None, grad_weights_SD: Tensor | None, *, mean: bool) -> Tensor:
    """`gather_kernel`: (P, S, D, R + 1), or backward (P, S, D, R + 2), a sample's D R, D and D numbers in a row."""
    rows, backward = way.rows, grad_sums_SDR is not None
    splits, nodes_of_split = way.splits(way.blocks)
    parts = way.new(splits, rows.samples, way.latents, way.width + (2 if backward else 1))
    gather_kernel[rows.samples, way.blocks, splits](
        *way.tensors,
        grad_sums_SDR,
        grad_weights_SD,
        parts,
        *way.eps,
        rows.nodes,
        nodes_of_split,
        *rows.strides(way.raw_BNR),
        *way.shape,
        BACKWARD=backward,
        MEAN=mean,
        **way.options,
    )
    return parts
