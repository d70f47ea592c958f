"""Latent to visible, L = l2(norm(W x)), Q = l2(relu(norm(Psi L))), f = Y^T Q or relu(norm(G Y^T Q)): one pass over W x.

Meant for norms that are affine maps, in single and half precision, where only f is wanted. Not meant for

- symmetric layers: their Q is gather's, and is computed there;
- batch norm in training: its statistics of all nodes stand between the steps;
- backward passes: nothing is kept, and `latentgnn.core.scatter` computes it again;
- float64: products are of float32;
- a group's channels by a kernel's latents that leave no room in shared memory (`latentgnn.kernels.sizes`): Q's length
  is over all latents of a kernel, so that they cannot be cut.

Axes: s samples, T nodes (N of a block), G groups, r channels of a group, D latents of a kernel in a group, F features.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from latentgnn.core.plan import Plan
from latentgnn.kernels.common import (
    EPS2,
    Way,
    bytes_of,
    load_matrix,
    load_valid,
    load_values,
    load_vector,
    precision,
    projected,
    rectified,
    unit,
)
from latentgnn.kernels.sizes import nodes_of_block, options, padded


@triton.jit  # type: ignore[untyped-decorator]
def scatter_kernel(  # type: ignore[no-untyped-def]
    u,
    valid,
    scale,
    shift,
    assign,
    assign_shift,
    to_feature,
    conv_shift,
    feature,
    nodes,
    blocks,
    u_sample,
    u_node,
    u_channel,
    feature_sample,
    feature_node,
    feature_channel,
    groups,
    width,
    latents,
    before,
    count,
    GRAPH_CONV: tl.constexpr,
    EPS2: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Features of a block of nodes, for one kernel of the layer and one group of one sample."""
    # One axis for both: the others of a grid end at 65,535.
    program = tl.program_id(0).to(tl.int64)
    graph = program // blocks
    sample, group = graph // groups, graph % groups
    n_N = program % blocks * BLOCK_N + tl.arange(0, BLOCK_N)
    d_D, r_R = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_R)
    inside_D, inside_R = d_D < count, r_R < width
    inside_NR = (n_N < nodes)[:, None] & inside_R[None, :]
    c_R, latent_D = group * width + r_R, group * latents + before + d_D
    valid_N = load_valid(valid, sample, n_N, nodes, nodes)
    scale_R, shift_R = load_vector(scale, c_R, inside_R, 1.0), load_vector(shift, c_R, inside_R, 0.0)
    l_NR = load_values(u + sample * u_sample, n_N, c_R, inside_NR, scale_R, shift_R, valid_N, u_node, u_channel, EPS2)
    psi_DR = load_matrix(assign + latent_D * width, inside_D, width, BLOCK_R)
    psi_shift_D = load_vector(assign_shift, latent_D, inside_D, 0.0)
    q_ND = unit(rectified(projected(l_NR, psi_DR, PRECISION) + psi_shift_D[None, :]), valid_N, EPS2)
    matrix_RD = load_matrix(to_feature + (graph * width + r_R) * count, inside_R, count, BLOCK_D)
    f_NR = projected(q_ND, matrix_RD, PRECISION)
    if GRAPH_CONV:
        f_NR = rectified(f_NR + load_vector(conv_shift, c_R, inside_R, 0.0)[None, :])
    place_NR = n_N[:, None] * feature_node + c_R[None, :] * feature_channel
    tl.store(feature + sample * feature_sample + place_NR, f_NR.to(feature.dtype.element_ty), mask=inside_NR)


def scatter(
    u_sTR: Tensor,
    valid_sT1: Tensor | None,
    way: Way,
    to_features: Sequence[Tensor],
    conv_shifts: Sequence[Tensor | None],
    plan: Plan,
    feature_sTF: Tensor,
) -> None:
    """Write what the output is expanded from; for nodes that take no part, finite numbers.

    Args:
        u_sTR: W x of scatter's reduction, whatever its strides.
        valid_sT1: nodes that take part.
        way: scatter's matrices.
        to_features: of each kernel, (s, G, r, D_k), in the type of the products.
        conv_shifts: of each kernel's graph convolution, (R,) in float32; ``None`` for zeros.
        plan: of the layer.
        feature_sTF: written to, whatever its strides.
    """
    samples, nodes, reduced = u_sTR.shape
    groups, latents, width = way.assign.shape
    valid = bytes_of(valid_sT1)
    for index, (kernel, matrix_sGrD) in enumerate(zip(plan.kernels, to_features, strict=True)):
        count = kernel.stop - kernel.start
        block_nodes = nodes_of_block(max(width, count), plan.compute)
        blocks = triton.cdiv(nodes, block_nodes)
        of_kernel_sTR = feature_sTF[..., index * reduced : (index + 1) * reduced]
        with torch.cuda.device_of(u_sTR):
            scatter_kernel[(blocks * samples * groups,)](
                u_sTR,
                valid,
                *way,
                matrix_sGrD.contiguous(),
                conv_shifts[index],
                of_kernel_sTR,
                nodes,
                blocks,
                *u_sTR.stride(),
                *of_kernel_sTR.stride(),
                groups,
                width,
                latents,
                kernel.start,
                count,
                GRAPH_CONV=plan.graph_conv,
                EPS2=EPS2,
                PRECISION=precision(),
                BLOCK_N=block_nodes,
                BLOCK_R=padded(width),
                BLOCK_D=padded(count),
                **options(width, count),
            )
