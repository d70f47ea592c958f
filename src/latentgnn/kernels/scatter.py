"""Latent to visible, L = l2(norm(W x)), Q = l2(relu(norm(Psi L))), f = Q Y or relu(norm(Q Y G^T)); and back.

Q's length is over all latents, but only some are computed at a time: features are summed from unscaled assignments, and
divided by the length at the end. The backward pass computes L and Q again. Each program adds up a part of a sample's
nodes; the parts are summed by PyTorch, always in the same order.

Axes: S samples, N nodes of a block, R reduced channels, D latents of a block.
"""

import triton
import triton.language as tl
from torch import Tensor

from latentgnn.kernels.common import (
    assigned,
    before_unit,
    inverse_root,
    load_affine,
    load_matrix,
    load_unit,
    load_valid,
    nodes_of,
    place_of,
    product,
    rectified,
)
from latentgnn.kernels.scatter_matrices import matrix_gradients
from latentgnn.kernels.way import Way
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

    Backward: computes the gradients of W x and of both norms from those of the features. Overwrites the latter with the
    gradients of Q Y G^T, and writes two numbers per node from which `matrices_kernel` gets the gradients of Q.
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
        place_NR = place_of(n_N, r_R, u_node, u_channel)
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
        place_feature_NR = place_of(n_N, r_R, feature_node, feature_channel)
        if BACKWARD:
            grad_NR = tl.load(feature + place_feature_NR, mask=inside_NR, other=0.0).to(tl.float32) * valid_N[:, None]
            if GRAPH_CONV:
                grad_NR = tl.where(f_NR * conv_scale_R[None, :] + conv_shift_R[None, :] > 0, grad_NR, 0.0)
                conv_scale_grad_R += tl.sum(grad_NR * f_NR, 0)
                conv_shift_grad_R += tl.sum(grad_NR, 0)
                grad_NR *= conv_scale_R[None, :]
                tl.store(feature + place_feature_NR, grad_NR.to(feature.dtype.element_ty), mask=inside_NR)
            # Q has unit length, so the part of its gradient along Q is removed. That part is known only after all
            # latents, so both parts are summed separately.
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
            # The sum of f df over channels equals the sum of Q dQ over latents.
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


def scatter(way: Way, to_feature_SDR: Tensor, conv: Projected | None, feature_BNR: Tensor) -> None:
    """Write what the output is expanded from; for nodes that take no part, finite numbers.

    Args:
        way: scatter's.
        to_feature_SDR: from `mix`, in the dtype of the products.
        conv: the graph convolution's norm; ``None`` without one.
        feature_BNR: written to, any strides.
    """
    _over_nodes(way, to_feature_SDR, conv, feature_BNR, None, None)


def scatter_backward(
    way: Way,
    to_feature_SDR: Tensor,
    conv: Projected | None,
    grad_feature_BNR: Tensor,
    grad_raw_BNR: Tensor,
    *,
    learns: bool,
) -> tuple[Tensor, list[Tensor | None]]:
    """Write the gradient of W x, and give those of matrices and norms.

    Args:
        way: scatter's.
        to_feature_SDR: from `mix`.
        conv: the graph convolution's norm.
        grad_feature_BNR: of the features, any strides; with a graph convolution it is written over.
        grad_raw_BNR: written to; with the strides of W x.
        learns: whether the norm of the reduction or of the graph convolution needs gradients.

    Returns:
        In float32, of what `mix` gave, (S, D, R); of Psi, (D, R), of scale and shift of the assignment's norm, (D,), of
        the reduction's, (R,), and of the graph convolution's, (R,), ``None`` where they are not learnt.
    """
    lengths_BN2 = way.new(*way.raw_BNR.shape[:2], 2)
    parts = _over_nodes(way, to_feature_SDR, conv, grad_feature_BNR, grad_raw_BNR, lengths_BN2)
    matrix, psi, vectors = matrix_gradients(way, to_feature_SDR, grad_feature_BNR, lengths_BN2)
    return matrix, [psi, *vectors.chunk(2), *(parts.sum(0) if learns else [None] * parts.shape[1])]


def _over_nodes(
    way: Way,
    to_feature_SDR: Tensor,
    conv: Projected | None,
    feature_BNR: Tensor,
    grad_raw_BNR: Tensor | None,
    lengths_BN2: Tensor | None,
) -> Tensor:
    """`scatter_kernel`; backward it gives gradients of norms, (parts, 4, R)."""
    rows, backward = way.rows, grad_raw_BNR is not None
    splits, nodes_of_split = way.splits()
    parts = way.new(splits * rows.samples if backward else 0, 4, way.width)
    norm, eps = ([None] * 4, 0.0) if conv is None else (conv.norm, conv.eps)
    scatter_kernel[rows.samples, splits](
        *way.tensors,
        to_feature_SDR,
        *norm,
        feature_BNR,
        grad_raw_BNR,
        lengths_BN2,
        parts if backward else None,
        *way.eps,
        eps,
        rows.nodes,
        nodes_of_split,
        *rows.strides(way.raw_BNR),
        *rows.strides(feature_BNR),
        *way.shape,
        BACKWARD=backward,
        GRAPH_CONV=conv is not None,
        **way.options,
    )
    return parts
