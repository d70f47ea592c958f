"""Latent to visible, L = l2(norm(W x)), Q = l2(relu(norm(Psi L))), f = Q Y or relu(norm(Q Y G^T)); and back.

Q's length is over all latents, which are taken some at a time: features are summed from assignments of any length,
and divided by it afterwards. The backward pass computes L and Q again. Each program adds up a part of a sample's
nodes; the parts are summed by PyTorch, always in the same order.

Axes: S samples, N nodes of a block, R reduced channels, D latents of a block.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from latentgnn.kernels.common import (
    EPS2,
    before_unit,
    inverse_root,
    load_affine,
    load_matrix,
    load_unit,
    load_valid,
    nodes_of,
    product,
    projections_in,
    rectified,
    sums_in,
)
from latentgnn.kernels.rows import Rows
from latentgnn.kernels.sizes import Sizes
from latentgnn.kernels.weights import Projected


@triton.jit  # type: ignore[untyped-decorator]
def assigned(  # type: ignore[no-untyped-def]
    l_NR, psi, weight, bias, mean, var, eps, d_D, latents, width, PRECISION: tl.constexpr, BLOCK_R: tl.constexpr
):
    """Psi, Psi L, its norm, and the norm's scale, for some latents; zeros for latents that there are not."""
    inside_D = d_D < latents
    scale_D, shift_D = load_affine(weight, bias, mean, var, eps, d_D, inside_D)
    psi_DR = load_matrix(psi + d_D * width, inside_D, width, BLOCK_R)
    raw_ND = product(l_NR, tl.trans(psi_DR), psi.dtype.element_ty, PRECISION)
    return psi_DR, raw_ND, tl.where(inside_D[None, :], raw_ND * scale_D[None, :] + shift_D[None, :], 0.0), scale_D


@triton.jit  # type: ignore[untyped-decorator]
def scatter_kernel(  # type: ignore[no-untyped-def]
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
    to_feature,
    conv_weight,
    conv_bias,
    conv_mean,
    conv_var,
    feature,
    grad_u,
    lengths,
    parts,
    reduce_eps,
    assign_eps,
    conv_eps,
    nodes,
    nodes_of_split,
    u_sample,
    u_node,
    u_channel,
    feature_sample,
    feature_node,
    feature_channel,
    width,
    latents,
    BACKWARD: tl.constexpr,
    GRAPH_CONV: tl.constexpr,
    EPS2: tl.constexpr,
    PROJECTIONS: tl.constexpr,
    SUMS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Features of a part of a sample's nodes; for those that take no part, finite numbers.

    Backward: their gradients give those of W x, and of the norms before and after; in their place come the gradients
    of Q Y G^T, and two numbers a node of which `matrices_kernel` makes the gradients of Q.
    """
    sample, split = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    r_R = tl.arange(0, BLOCK_R)
    inside_R = r_R < width
    scale_R, shift_R = load_affine(reduce_weight, reduce_bias, reduce_mean, reduce_var, reduce_eps, r_R, inside_R)
    conv_scale_R, conv_shift_R = load_affine(conv_weight, conv_bias, conv_mean, conv_var, conv_eps, r_R, inside_R)
    kind = psi.dtype.element_ty
    begin, count = nodes_of(bounds, sample, nodes)
    first = begin + split * nodes_of_split
    last = tl.minimum(first + nodes_of_split, begin + count)
    u += sample * u_sample
    feature += sample * feature_sample
    to_feature += sample * latents * width
    if valid is not None and bounds is None:
        valid += sample * nodes
    if BACKWARD:
        grad_u += sample * u_sample
        if bounds is None:
            lengths += sample * nodes * 2
        scale_grad_R, shift_grad_R = tl.zeros((BLOCK_R,), tl.float32), tl.zeros((BLOCK_R,), tl.float32)
        conv_scale_grad_R, conv_shift_grad_R = tl.zeros((BLOCK_R,), tl.float32), tl.zeros((BLOCK_R,), tl.float32)
    for start in range(first, last, BLOCK_N):
        n_N = start + tl.arange(0, BLOCK_N)
        inside_N = n_N < last
        valid_N = load_valid(valid, n_N, last)
        inside_NR = inside_N[:, None] & inside_R[None, :]
        place_NR = n_N[:, None] * u_node + r_R[None, :] * u_channel
        u_NR, l_NR, inverse_N = load_unit(u, up, place_NR, inside_NR, scale_R, shift_R, inside_R, valid_N, EPS2)
        f_NR, squares_N = tl.zeros((BLOCK_N, BLOCK_R), tl.float32), tl.zeros((BLOCK_N,), tl.float32)
        for first_latent in range(0, latents, BLOCK_D):
            d_D = first_latent + tl.arange(0, BLOCK_D)
            _, _, s_ND, _ = assigned(
                l_NR,
                psi,
                assign_weight,
                assign_bias,
                assign_mean,
                assign_var,
                assign_eps,
                d_D,
                latents,
                width,
                PROJECTIONS,
                BLOCK_R,
            )
            q_ND = rectified(s_ND)
            squares_N += tl.sum(q_ND * q_ND, 1)
            matrix_DR = load_matrix(to_feature + d_D * width, d_D < latents, width, BLOCK_R)
            f_NR += product(q_ND, matrix_DR, kind, SUMS)
        inverse_q_N = inverse_root(squares_N, valid_N, EPS2)
        f_NR *= inverse_q_N[:, None]
        place_feature_NR = n_N[:, None] * feature_node + r_R[None, :] * feature_channel
        if BACKWARD:
            grad_NR = tl.load(feature + place_feature_NR, mask=inside_NR, other=0.0).to(tl.float32) * valid_N[:, None]
            if GRAPH_CONV:
                grad_NR = tl.where(f_NR * conv_scale_R[None, :] + conv_shift_R[None, :] > 0, grad_NR, 0.0)
                conv_scale_grad_R += tl.sum(grad_NR * f_NR, 0)
                conv_shift_grad_R += tl.sum(grad_NR, 0)
                grad_NR *= conv_scale_R[None, :]
                tl.store(feature + place_feature_NR, grad_NR.to(feature.dtype.element_ty), mask=inside_NR)
            # Q is divided by its length, so that its gradient loses what lies along Q: that part is the same for all
            # latents, and is known only when all have been seen.
            across_NR, along_NR = tl.zeros((BLOCK_N, BLOCK_R), tl.float32), tl.zeros((BLOCK_N, BLOCK_R), tl.float32)
            for first_latent in range(0, latents, BLOCK_D):
                d_D = first_latent + tl.arange(0, BLOCK_D)
                psi_DR, _, s_ND, scale_D = assigned(
                    l_NR,
                    psi,
                    assign_weight,
                    assign_bias,
                    assign_mean,
                    assign_var,
                    assign_eps,
                    d_D,
                    latents,
                    width,
                    PROJECTIONS,
                    BLOCK_R,
                )
                matrix_DR = load_matrix(to_feature + d_D * width, d_D < latents, width, BLOCK_R)
                grad_ND = product(grad_NR, tl.trans(matrix_DR), kind, SUMS)
                grad_ND = tl.where(s_ND > 0, grad_ND * scale_D[None, :], 0.0)
                across_NR += product(grad_ND, psi_DR, kind, PROJECTIONS)
                along_NR += product(rectified(s_ND) * scale_D[None, :], psi_DR, kind, PROJECTIONS)
            # Q Y of unit length, times its gradient, is Q times its own.
            dot_N = tl.sum(f_NR * grad_NR, 1)
            tl.store(lengths + 2 * n_N, inverse_q_N, mask=inside_N)
            tl.store(lengths + 2 * n_N + 1, dot_N, mask=inside_N)
            grad_NR = inverse_q_N[:, None] * (across_NR - along_NR * (inverse_q_N * dot_N)[:, None])
            grad_NR = before_unit(grad_NR, l_NR, inverse_N)
            scale_grad_R += tl.sum(grad_NR * u_NR, 0)
            shift_grad_R += tl.sum(grad_NR, 0)
            tl.store(grad_u + place_NR, (grad_NR * scale_R[None, :]).to(grad_u.dtype.element_ty), mask=inside_NR)
        else:
            if GRAPH_CONV:
                f_NR = rectified(f_NR * conv_scale_R[None, :] + conv_shift_R[None, :])
            tl.store(feature + place_feature_NR, f_NR.to(feature.dtype.element_ty), mask=inside_NR)
    if BACKWARD:
        parts += (split * tl.num_programs(0) + sample) * 4 * width
        tl.store(parts + r_R, scale_grad_R, mask=inside_R)
        tl.store(parts + width + r_R, shift_grad_R, mask=inside_R)
        tl.store(parts + 2 * width + r_R, conv_scale_grad_R, mask=inside_R)
        tl.store(parts + 3 * width + r_R, conv_shift_grad_R, mask=inside_R)


@triton.jit  # type: ignore[untyped-decorator]
def matrices_kernel(  # type: ignore[no-untyped-def]
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
    to_feature,
    grad_feature,
    lengths,
    parts,
    reduce_eps,
    assign_eps,
    nodes,
    nodes_of_split,
    u_sample,
    u_node,
    u_channel,
    feature_sample,
    feature_node,
    feature_channel,
    width,
    latents,
    EPS2: tl.constexpr,
    PROJECTIONS: tl.constexpr,
    SUMS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """For some latents of one sample, and a part of its nodes, gradients of ``to_feature`` and of Psi and its norm."""
    sample, split = tl.program_id(0).to(tl.int64), tl.program_id(2).to(tl.int64)
    d_D, r_R = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_R)
    inside_D, inside_R = d_D < latents, r_R < width
    scale_R, shift_R = load_affine(reduce_weight, reduce_bias, reduce_mean, reduce_var, reduce_eps, r_R, inside_R)
    kind = psi.dtype.element_ty
    matrix_DR = load_matrix(to_feature + (sample * latents + d_D) * width, inside_D, width, BLOCK_R)
    psi_grad_DR, matrix_grad_DR = tl.zeros((BLOCK_D, BLOCK_R), tl.float32), tl.zeros((BLOCK_D, BLOCK_R), tl.float32)
    scale_grad_D, shift_grad_D = tl.zeros((BLOCK_D,), tl.float32), tl.zeros((BLOCK_D,), tl.float32)
    begin, count = nodes_of(bounds, sample, nodes)
    first = begin + split * nodes_of_split
    last = tl.minimum(first + nodes_of_split, begin + count)
    u += sample * u_sample
    grad_feature += sample * feature_sample
    if bounds is None:
        lengths += sample * nodes * 2
        if valid is not None:
            valid += sample * nodes
    for start in range(first, last, BLOCK_N):
        n_N = start + tl.arange(0, BLOCK_N)
        inside_N = n_N < last
        valid_N = load_valid(valid, n_N, last)
        inside_NR = inside_N[:, None] & inside_R[None, :]
        place_NR = n_N[:, None] * u_node + r_R[None, :] * u_channel
        _, l_NR, _ = load_unit(u, up, place_NR, inside_NR, scale_R, shift_R, inside_R, valid_N, EPS2)
        _, raw_ND, s_ND, scale_D = assigned(
            l_NR,
            psi,
            assign_weight,
            assign_bias,
            assign_mean,
            assign_var,
            assign_eps,
            d_D,
            latents,
            width,
            PROJECTIONS,
            BLOCK_R,
        )
        inverse_q_N = tl.load(lengths + 2 * n_N, mask=inside_N, other=0.0)
        dot_N = tl.load(lengths + 2 * n_N + 1, mask=inside_N, other=0.0)
        q_ND = rectified(s_ND) * inverse_q_N[:, None]
        place_NR = n_N[:, None] * feature_node + r_R[None, :] * feature_channel
        grad_NR = tl.load(grad_feature + place_NR, mask=inside_NR, other=0.0).to(tl.float32) * valid_N[:, None]
        matrix_grad_DR += product(tl.trans(q_ND), grad_NR, kind, SUMS)
        grad_ND = product(grad_NR, tl.trans(matrix_DR), kind, SUMS) - q_ND * dot_N[:, None]
        grad_ND = tl.where(s_ND > 0, grad_ND * inverse_q_N[:, None], 0.0)
        scale_grad_D += tl.sum(grad_ND * raw_ND, 0)
        shift_grad_D += tl.sum(grad_ND, 0)
        psi_grad_DR += product(tl.trans(grad_ND * scale_D[None, :]), l_NR, kind, PROJECTIONS)
    parts += (split * tl.num_programs(0) + sample) * latents * (2 * width + 2)
    place_DR, inside_DR = (d_D * width)[:, None] + r_R[None, :], inside_D[:, None] & inside_R[None, :]
    tl.store(parts + place_DR, matrix_grad_DR, mask=inside_DR)
    parts += latents * width
    tl.store(parts + place_DR, psi_grad_DR, mask=inside_DR)
    parts += latents * width
    tl.store(parts + d_D, scale_grad_D, mask=inside_D)
    tl.store(parts + latents + d_D, shift_grad_D, mask=inside_D)


def scatter(
    u_sTR: Tensor,
    up: Tensor | None,
    rows: Rows,
    reduce: Projected,
    assign: Projected,
    to_feature_SDR: Tensor,
    conv: Projected | None,
    feature_sTR: Tensor,
) -> None:
    """Write what the output is expanded from; for nodes that take no part, finite numbers.

    Args:
        u_sTR: W x of scatter's reduction, whatever its strides.
        up: what it is multiplied by, (1,); ``None`` for 1.
        rows: its nodes.
        reduce: the reduction's norm.
        assign: the assignment's matrix in the type of the products, and its norm.
        to_feature_SDR: from `mix`, in the type of the products.
        conv: the graph convolution's norm; ``None`` without one.
        feature_sTR: written to, whatever its strides.
    """
    _over_nodes(u_sTR, up, rows, reduce, assign, to_feature_SDR, conv, feature_sTR, None, None)


def scatter_backward(
    u_sTR: Tensor,
    up: Tensor | None,
    rows: Rows,
    reduce: Projected,
    assign: Projected,
    to_feature_SDR: Tensor,
    conv: Projected | None,
    grad_feature_sTR: Tensor,
    grad_u_sTR: Tensor,
    *,
    learns: bool,
) -> tuple[Tensor, list[Tensor | None]]:
    """Write the gradient of W x, and give those of matrices and norms.

    Args:
        u_sTR: as `scatter` had it, like all but the gradients.
        up: likewise.
        rows: its nodes.
        reduce: the reduction's norm.
        assign: the assignment's matrix and norm.
        to_feature_SDR: from `mix`.
        conv: the graph convolution's norm.
        grad_feature_sTR: of the features, whatever its strides; with a graph convolution it is written over.
        grad_u_sTR: written to; with the strides of ``u``.
        learns: the norms of the reduction and of the graph convolution do.

    Returns:
        In float32, of what `mix` gave, (S, D, R); of Psi, (D, R), of scale and shift of the assignment's norm, (D,), of
        the reduction's, (R,), and of the graph convolution's, (R,), ``None`` where they are not learnt.
    """
    latents, width = assign.matrix.shape
    lengths_BN2 = u_sTR.new_empty((*u_sTR.shape[:2], 2), dtype=torch.float32)
    parts = _over_nodes(
        u_sTR, up, rows, reduce, assign, to_feature_SDR, conv, grad_feature_sTR, grad_u_sTR, lengths_BN2
    )
    sizes = Sizes.of(width)
    blocks = triton.cdiv(latents, sizes.latents)
    splits, nodes_of_split = rows.splits(u_sTR.device, blocks, sizes.nodes)
    matrix_numbers = latents * width
    of_latents = u_sTR.new_empty((splits, rows.samples, 2 * matrix_numbers + 2 * latents), dtype=torch.float32)
    matrices_kernel[rows.samples, blocks, splits](
        u_sTR,
        up,
        rows.valid,
        rows.bounds,
        *reduce.norm,
        assign.matrix,
        *assign.norm,
        to_feature_SDR,
        grad_feature_sTR,
        lengths_BN2,
        of_latents,
        reduce.eps,
        assign.eps,
        rows.nodes,
        nodes_of_split,
        *rows.strides(u_sTR),
        *rows.strides(grad_feature_sTR),
        width,
        latents,
        EPS2=EPS2,
        PROJECTIONS=projections_in(),
        SUMS=sums_in(),
        **sizes.options(),
    )
    of_samples = of_latents[0] if splits == 1 else of_latents.sum(0)
    matrix = of_samples[:, :matrix_numbers].unflatten(1, (latents, width))
    whole = of_samples[0] if rows.samples == 1 else of_samples.sum(0)
    _, psi, vectors = whole.tensor_split([matrix_numbers, 2 * matrix_numbers])
    return matrix.contiguous(), [
        psi.view(latents, width),
        *vectors.chunk(2),
        *(parts.sum(0) if learns else [None] * parts.shape[1]),
    ]


def _over_nodes(
    u_sTR: Tensor,
    up: Tensor | None,
    rows: Rows,
    reduce: Projected,
    assign: Projected,
    to_feature_SDR: Tensor,
    conv: Projected | None,
    feature_sTR: Tensor,
    grad_u_sTR: Tensor | None,
    lengths_BN2: Tensor | None,
) -> Tensor:
    """`scatter_kernel`; backward it gives gradients of norms, (parts, 4, R)."""
    latents, width = assign.matrix.shape
    sizes, backward = Sizes.of(width), grad_u_sTR is not None
    splits, nodes_of_split = rows.splits(u_sTR.device, 1, sizes.nodes)
    parts = u_sTR.new_empty((splits * rows.samples if backward else 0, 4, width), dtype=torch.float32)
    norm, eps = ([None] * 4, 0.0) if conv is None else (conv.norm, conv.eps)
    scatter_kernel[rows.samples, splits](
        u_sTR,
        up,
        rows.valid,
        rows.bounds,
        *reduce.norm,
        assign.matrix,
        *assign.norm,
        to_feature_SDR,
        *norm,
        feature_sTR,
        grad_u_sTR,
        lengths_BN2,
        parts if backward else None,
        reduce.eps,
        assign.eps,
        eps,
        rows.nodes,
        nodes_of_split,
        *rows.strides(u_sTR),
        *rows.strides(feature_sTR),
        width,
        latents,
        BACKWARD=backward,
        GRAPH_CONV=conv is not None,
        EPS2=EPS2,
        PROJECTIONS=projections_in(),
        SUMS=sums_in(),
        **sizes.options(),
    )
    return parts
