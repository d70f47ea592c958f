"""Scatter backward: the gradients of Psi, of its norm, and of what takes assignments to features.

Each program sums over nodes for some latents. It reads what `latentgnn.kernels.scatter` wrote: gradients of Q Y G^T,
and for each node 1 / |Q| and the product of Q with its gradient.

Axes: S samples, N nodes of a block, R reduced channels, D latents of a block.
"""

import triton
import triton.language as tl
from torch import Tensor

from latentgnn.kernels.common import (
    assigned,
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
        place_NR = place_of(n_N, r_R, u_node, u_channel)
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
        place_NR = place_of(n_N, r_R, feature_node, feature_channel)
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


def matrix_gradients(
    way: Way, to_feature_SDR: Tensor, grad_feature_BNR: Tensor, lengths_BN2: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Of what `mix` gave, (S, D, R); of Psi, (D, R); and of scale and shift of its norm, (2 D,). All in float32.

    Args:
        way: scatter's.
        to_feature_SDR: from `mix`.
        grad_feature_BNR: of Q Y G^T, any strides.
        lengths_BN2: of each node 1 / |Q|, and Q times its gradient.
    """
    rows, numbers = way.rows, way.latents * way.width
    splits, nodes_of_split = way.splits(way.blocks)
    parts = way.new(splits, rows.samples, 2 * numbers + 2 * way.latents)
    matrices_kernel[rows.samples, way.blocks, splits](
        *way.tensors,
        to_feature_SDR,
        grad_feature_BNR,
        lengths_BN2,
        parts,
        *way.eps,
        rows.nodes,
        nodes_of_split,
        *rows.strides(way.raw_BNR),
        *rows.strides(grad_feature_BNR),
        *way.shape,
        **way.options,
    )
    of_samples = parts[0] if splits == 1 else parts.sum(0)
    matrix = of_samples[:, :numbers].unflatten(1, (way.latents, way.width))
    whole = of_samples[0] if rows.samples == 1 else of_samples.sum(0)
    _, psi, vectors = whole.tensor_split([numbers, 2 * numbers])
    return matrix.contiguous(), psi.view(way.latents, way.width), vectors
