"""Latent to visible, L = l2(norm(W x)), Q = l2(relu(norm(Psi L))), f = Q Y or relu(norm(Q Y G^T)); and back.

The backward pass computes L and Q again. Each program adds up a part of a sample's nodes; the parts are summed by
PyTorch, always in the same order. Q's length is over all latents, so that they cannot be cut.

Axes: S samples, N nodes of a block, R reduced channels, D latents.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from latentgnn.kernels.common import (
    EPS2,
    before_unit,
    inverse_length,
    load_affine,
    load_matrix,
    load_raw,
    load_valid,
    nodes_of,
    product,
    projections_in,
    rectified,
    sums_in,
)
from latentgnn.kernels.rows import Rows
from latentgnn.kernels.sizes import Sizes, padded
from latentgnn.kernels.weights import Projected


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
    reduce_eps,
    assign_eps,
    conv_eps,
    nodes,
    blocks,
    u_sample,
    u_node,
    u_channel,
    feature_sample,
    feature_node,
    feature_channel,
    width,
    latents,
    GRAPH_CONV: tl.constexpr,
    EPS2: tl.constexpr,
    PROJECTIONS: tl.constexpr,
    SUMS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Features of a block of a sample's nodes; for those that take no part, finite numbers."""
    # One axis for both: the others of a grid end at 65,535.
    program = tl.program_id(0).to(tl.int64)
    sample = program // blocks
    d_D, r_R = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_R)
    inside_D, inside_R = d_D < latents, r_R < width
    begin, count = nodes_of(bounds, sample, nodes)
    n_N = begin + program % blocks * BLOCK_N + tl.arange(0, BLOCK_N)
    last = begin + count
    if valid is not None and bounds is None:
        valid += sample * nodes
    valid_N = load_valid(valid, n_N, last)
    inside_NR = (n_N < last)[:, None] & inside_R[None, :]
    scale_R, shift_R = load_affine(
        reduce_weight, reduce_bias, reduce_mean, reduce_var, reduce_eps, r_R, inside_R
    )
    scale_D, shift_D = load_affine(
        assign_weight, assign_bias, assign_mean, assign_var, assign_eps, d_D, inside_D
    )
    kind = psi.dtype.element_ty
    u_NR = load_raw(u + sample * u_sample, up, n_N[:, None] * u_node + r_R[None, :] * u_channel, inside_NR)
    y_NR = tl.where(inside_R[None, :], u_NR * scale_R[None, :] + shift_R[None, :], 0.0)
    l_NR = y_NR * inverse_length(y_NR, valid_N, EPS2)[:, None]
    psi_DR = load_matrix(psi + d_D * width, inside_D, width, BLOCK_R)
    q_ND = product(l_NR, tl.trans(psi_DR), kind, PROJECTIONS)
    q_ND = tl.where(inside_D[None, :], rectified(q_ND * scale_D[None, :] + shift_D[None, :]), 0.0)
    q_ND = q_ND * inverse_length(q_ND, valid_N, EPS2)[:, None]
    matrix_DR = load_matrix(to_feature + (sample * latents + d_D) * width, inside_D, width, BLOCK_R)
    f_NR = product(q_ND, matrix_DR, kind, SUMS)
    if GRAPH_CONV:
        scale_R, shift_R = load_affine(conv_weight, conv_bias, conv_mean, conv_var, conv_eps, r_R, inside_R)
        f_NR = rectified(f_NR * scale_R[None, :] + shift_R[None, :])
    place_NR = n_N[:, None] * feature_node + r_R[None, :] * feature_channel
    tl.store(feature + sample * feature_sample + place_NR, f_NR.to(feature.dtype.element_ty), mask=inside_NR)


@triton.jit  # type: ignore[untyped-decorator]
def scatter_backward_kernel(  # type: ignore[no-untyped-def]
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
    grad_feature,
    grad_u,
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
    GRAPH_CONV: tl.constexpr,
    EPS2: tl.constexpr,
    PROJECTIONS: tl.constexpr,
    SUMS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Gradients of W x for a part of a sample's nodes, and what these add to those of matrices and norms."""
    sample, split = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    d_D, r_R = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_R)
    inside_D, inside_R = d_D < latents, r_R < width
    scale_R, shift_R = load_affine(
        reduce_weight, reduce_bias, reduce_mean, reduce_var, reduce_eps, r_R, inside_R
    )
    scale_D, shift_D = load_affine(
        assign_weight, assign_bias, assign_mean, assign_var, assign_eps, d_D, inside_D
    )
    conv_scale_R, conv_shift_R = load_affine(conv_weight, conv_bias, conv_mean, conv_var, conv_eps, r_R, inside_R)
    kind = psi.dtype.element_ty
    psi_DR = load_matrix(psi + d_D * width, inside_D, width, BLOCK_R)
    matrix_DR = load_matrix(to_feature + (sample * latents + d_D) * width, inside_D, width, BLOCK_R)
    psi_grad_DR, matrix_grad_DR = tl.zeros((BLOCK_D, BLOCK_R), tl.float32), tl.zeros((BLOCK_D, BLOCK_R), tl.float32)
    scale_grad_D, shift_grad_D = tl.zeros((BLOCK_D,), tl.float32), tl.zeros((BLOCK_D,), tl.float32)
    scale_grad_R, shift_grad_R = tl.zeros((BLOCK_R,), tl.float32), tl.zeros((BLOCK_R,), tl.float32)
    conv_scale_grad_R, conv_shift_grad_R = tl.zeros((BLOCK_R,), tl.float32), tl.zeros((BLOCK_R,), tl.float32)
    begin, count = nodes_of(bounds, sample, nodes)
    first = begin + split * nodes_of_split
    last = tl.minimum(first + nodes_of_split, begin + count)
    u += sample * u_sample
    grad_u += sample * u_sample
    grad_feature += sample * feature_sample
    if valid is not None and bounds is None:
        valid += sample * nodes
    for start in range(first, last, BLOCK_N):
        n_N = start + tl.arange(0, BLOCK_N)
        valid_N = load_valid(valid, n_N, last)
        inside_NR = (n_N < last)[:, None] & inside_R[None, :]
        place_NR = n_N[:, None] * u_node + r_R[None, :] * u_channel
        u_NR = load_raw(u, up, place_NR, inside_NR)
        y_NR = tl.where(inside_R[None, :], u_NR * scale_R[None, :] + shift_R[None, :], 0.0)
        inverse_N = inverse_length(y_NR, valid_N, EPS2)
        l_NR = y_NR * inverse_N[:, None]
        raw_ND = product(l_NR, tl.trans(psi_DR), kind, PROJECTIONS)
        s_ND = tl.where(inside_D[None, :], raw_ND * scale_D[None, :] + shift_D[None, :], 0.0)
        q_ND = rectified(s_ND)
        inverse_q_N = inverse_length(q_ND, valid_N, EPS2)
        q_ND = q_ND * inverse_q_N[:, None]
        place_NR = n_N[:, None] * feature_node + r_R[None, :] * feature_channel
        grad_NR = tl.load(grad_feature + place_NR, mask=inside_NR, other=0.0).to(tl.float32) * valid_N[:, None]
        if GRAPH_CONV:
            f_NR = product(q_ND, matrix_DR, kind, SUMS)
            grad_NR = tl.where(f_NR * conv_scale_R[None, :] + conv_shift_R[None, :] > 0, grad_NR, 0.0)
            conv_shift_grad_R += tl.sum(grad_NR, 0)
            conv_scale_grad_R += tl.sum(grad_NR * f_NR, 0)
            grad_NR *= conv_scale_R[None, :]
        matrix_grad_DR += product(tl.trans(q_ND), grad_NR, kind, SUMS)
        grad_ND = before_unit(product(grad_NR, tl.trans(matrix_DR), kind, SUMS), q_ND, inverse_q_N)
        grad_ND = tl.where(s_ND > 0, grad_ND, 0.0)
        shift_grad_D += tl.sum(grad_ND, 0)
        scale_grad_D += tl.sum(grad_ND * raw_ND, 0)
        grad_ND *= scale_D[None, :]
        psi_grad_DR += product(tl.trans(grad_ND), l_NR, kind, PROJECTIONS)
        grad_NR = before_unit(product(grad_ND, psi_DR, kind, PROJECTIONS), l_NR, inverse_N)
        shift_grad_R += tl.sum(grad_NR, 0)
        scale_grad_R += tl.sum(grad_NR * u_NR, 0)
        place_NR = n_N[:, None] * u_node + r_R[None, :] * u_channel
        tl.store(grad_u + place_NR, (grad_NR * scale_R[None, :]).to(grad_u.dtype.element_ty), mask=inside_NR)
    parts += (split * tl.num_programs(0) + sample) * (2 * latents * width + 2 * latents + 4 * width)
    place_DR, inside_DR = (d_D * width)[:, None] + r_R[None, :], inside_D[:, None] & inside_R[None, :]
    tl.store(parts + place_DR, matrix_grad_DR, mask=inside_DR)
    tl.store(parts + latents * width + place_DR, psi_grad_DR, mask=inside_DR)
    parts += 2 * latents * width
    tl.store(parts + d_D, scale_grad_D, mask=inside_D)
    tl.store(parts + latents + d_D, shift_grad_D, mask=inside_D)
    parts += 2 * latents
    tl.store(parts + r_R, scale_grad_R, mask=inside_R)
    tl.store(parts + width + r_R, shift_grad_R, mask=inside_R)
    tl.store(parts + 2 * width + r_R, conv_scale_grad_R, mask=inside_R)
    tl.store(parts + 3 * width + r_R, conv_shift_grad_R, mask=inside_R)


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
    latents, width = assign.matrix.shape
    sizes = Sizes.of(width, latents, assign.matrix.dtype)
    blocks = triton.cdiv(rows.most, sizes.nodes)
    norm, eps = ([None] * 4, 0.0) if conv is None else (conv.norm, conv.eps)
    scatter_kernel[(blocks * rows.samples,)](
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
        reduce.eps,
        assign.eps,
        eps,
        rows.nodes,
        blocks,
        *rows.strides(u_sTR),
        *rows.strides(feature_sTR),
        width,
        latents,
        GRAPH_CONV=conv is not None,
        EPS2=EPS2,
        PROJECTIONS=projections_in(),
        SUMS=sums_in(),
        BLOCK_N=sizes.nodes,
        BLOCK_R=padded(width),
        BLOCK_D=padded(latents),
        **sizes.options(),
    )


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
) -> list[Tensor]:
    """Write the gradient of W x, and give those of matrices and norms.

    Args:
        u_sTR: as `scatter` had it, like all but the gradients.
        up: likewise.
        rows: its nodes.
        reduce: the reduction's norm.
        assign: the assignment's matrix and norm.
        to_feature_SDR: from `mix`.
        conv: the graph convolution's norm.
        grad_feature_sTR: of the features, whatever its strides.
        grad_u_sTR: written to; with the strides of ``u``.

    Returns:
        In float32, of what `mix` gave, (S, D, R), and of Psi, (D, R); of scale and shift of the assignment's norm,
        (D,), of the reduction's, (R,), and of the graph convolution's, (R,).
    """
    latents, width = assign.matrix.shape
    sizes = Sizes.of(width, latents, assign.matrix.dtype)
    splits, nodes_of_split = rows.splits(u_sTR.device, 1, sizes.nodes)
    lengths = [latents * width, latents * width, latents, latents, width, width, width, width]
    parts = u_sTR.new_empty((splits, rows.samples, sum(lengths)), dtype=torch.float32)
    norm, eps = ([None] * 4, 0.0) if conv is None else (conv.norm, conv.eps)
    scatter_backward_kernel[rows.samples, splits](
        u_sTR,
        up,
        rows.valid,
        rows.bounds,
        *reduce.norm,
        assign.matrix,
        *assign.norm,
        to_feature_SDR,
        *norm,
        grad_feature_sTR,
        grad_u_sTR,
        parts,
        reduce.eps,
        assign.eps,
        eps,
        rows.nodes,
        nodes_of_split,
        *rows.strides(u_sTR),
        *rows.strides(grad_feature_sTR),
        width,
        latents,
        GRAPH_CONV=conv is not None,
        EPS2=EPS2,
        PROJECTIONS=projections_in(),
        SUMS=sums_in(),
        BLOCK_N=sizes.nodes,
        BLOCK_R=padded(width),
        BLOCK_D=padded(latents),
        **sizes.options(),
    )
    of_samples = parts[0] if splits == 1 else parts.sum(0)
    whole = of_samples[0] if rows.samples == 1 else of_samples.sum(0)
    _, psi, *vectors = whole.split_with_sizes(lengths)
    matrices = of_samples[:, : lengths[0]].reshape(rows.samples, latents, width)
    return [matrices, psi.view(latents, width), *vectors]
