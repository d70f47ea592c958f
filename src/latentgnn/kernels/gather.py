"""Visible to latent, V = l2(norm(W x)), P = relu(norm(Psi V)), Z = sum of P V^T, from W x in one pass.

Meant for norms that are affine maps, in single and half precision, where only Z is wanted. Not meant for

- symmetric layers: their scatter starts from P, which is not written;
- batch norm in training: its statistics of all nodes stand between W x and V;
- backward passes: nothing is kept, and `latentgnn.core.gather` computes it again;
- float64: sums are of float32;
- a group's channels by a block of latents that leave no room in shared memory (`latentgnn.kernels.sizes`).

Axes: s samples, T nodes (N of a block), G groups, r channels of a group, D latents of a group.
"""

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
)
from latentgnn.kernels.sizes import latents_of_block, nodes_of_block, options, padded

# So many programs for each multiprocessor keep it busy while others wait for memory.
_PROGRAMS = 4


@triton.jit  # type: ignore[untyped-decorator]
def gather_kernel(  # type: ignore[no-untyped-def]
    u,
    valid,
    scale,
    shift,
    assign,
    assign_shift,
    sums,
    weights,
    nodes,
    nodes_of_split,
    u_sample,
    u_node,
    u_channel,
    groups,
    width,
    latents,
    MEAN: tl.constexpr,
    EPS2: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Sums of one group of one sample, for a block of latents and a part of the nodes."""
    graph, split = tl.program_id(0).to(tl.int64), tl.program_id(2).to(tl.int64)
    sample, group = graph // groups, graph % groups
    d_D, r_R = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_R)
    inside_D, inside_R = d_D < latents, r_R < width
    c_R, latent_D = group * width + r_R, group * latents + d_D
    scale_R, shift_R = load_vector(scale, c_R, inside_R, 1.0), load_vector(shift, c_R, inside_R, 0.0)
    psi_DR = load_matrix(assign + latent_D * width, inside_D, width, BLOCK_R)
    psi_shift_D = load_vector(assign_shift, latent_D, inside_D, 0.0)
    sums_DR = tl.zeros((BLOCK_D, BLOCK_R), tl.float32)
    weights_D = tl.zeros((BLOCK_D,), tl.float32)
    u += sample * u_sample
    first = split * nodes_of_split
    last = tl.minimum(first + nodes_of_split, nodes)
    for start in range(first, last, BLOCK_N):
        n_N = start + tl.arange(0, BLOCK_N)
        valid_N = load_valid(valid, sample, n_N, last, nodes)
        inside_NR = (n_N < last)[:, None] & inside_R[None, :]
        v_NR = load_values(u, n_N, c_R, inside_NR, scale_R, shift_R, valid_N, u_node, u_channel, EPS2)
        v_NR = v_NR.to(psi_DR.dtype)
        p_ND = rectified(projected(v_NR, psi_DR, PRECISION) + psi_shift_D[None, :]) * valid_N[:, None]
        weights_D += tl.sum(p_ND if MEAN else p_ND * p_ND, 0)
        sums_DR += tl.dot(tl.trans(p_ND.to(psi_DR.dtype)), v_NR, input_precision=PRECISION)
    row_D = (split * tl.num_programs(0) + graph) * latents + d_D
    inside_DR = inside_D[:, None] & inside_R[None, :]
    tl.store(sums + row_D[:, None] * width + r_R[None, :], sums_DR, mask=inside_DR)
    tl.store(weights + row_D, weights_D, mask=inside_D)


def gather(u_sTR: Tensor, valid_sT1: Tensor | None, way: Way, plan: Plan) -> tuple[Tensor, Tensor]:
    """Sums of values by assignments over the nodes of each row, and what they will be divided by.

    Args:
        u_sTR: W x of gather's reduction, whatever its strides.
        valid_sT1: nodes that take part.
        way: gather's matrices.
        plan: of the layer.

    Returns:
        (s, G, D, r) and (s, G, D) in float32.
    """
    samples, nodes, _ = u_sTR.shape
    groups, latents, width = way.assign.shape
    block_nodes = nodes_of_block(width, plan.compute)
    block_latents = latents_of_block(block_nodes)
    blocks = triton.cdiv(latents, block_latents)
    splits = max(_programs(u_sTR.device) // max(samples * groups * blocks, 1), 1)
    nodes_of_split = max(triton.cdiv(triton.cdiv(nodes, splits), block_nodes), 1) * block_nodes
    splits = max(triton.cdiv(nodes, nodes_of_split), 1)
    sums_SsGDr = u_sTR.new_empty((splits, samples, groups, latents, width), dtype=torch.float32)
    weights_SsGD = u_sTR.new_empty((splits, samples, groups, latents), dtype=torch.float32)
    with torch.cuda.device_of(u_sTR):
        gather_kernel[samples * groups, blocks, splits](
            u_sTR,
            bytes_of(valid_sT1),
            *way,
            sums_SsGDr,
            weights_SsGD,
            nodes,
            nodes_of_split,
            *u_sTR.stride(),
            groups,
            width,
            latents,
            MEAN=plan.node_scale == "mean",
            EPS2=EPS2,
            PRECISION=precision(),
            BLOCK_N=block_nodes,
            BLOCK_R=padded(width),
            BLOCK_D=block_latents,
            **options(width, block_latents),
        )
    return sums_SsGDr.sum(0), weights_SsGD.sum(0)


def _programs(device: torch.device) -> int:
    return _PROGRAMS * (torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1)
