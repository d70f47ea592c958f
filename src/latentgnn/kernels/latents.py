"""Latents from the parts of their sums, and their unit length.

Axes: P parts of the nodes, S samples, D latents, R reduced channels.
"""

import triton
import triton.language as tl
from torch import Tensor

from latentgnn.kernels.common import EPS2, inverse_root, inverse_weight, load_matrix
from latentgnn.kernels.sizes import padded
from latentgnn.numerics import EPS


@triton.jit  # type: ignore[untyped-decorator]
def finish_kernel(  # type: ignore[no-untyped-def]
    parts,
    latent,
    unit,
    weights,
    splits,
    rows,
    width,
    MEAN: tl.constexpr,
    EPS: tl.constexpr,
    EPS2: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """Z and z of one latent, from the sums over each part of the nodes."""
    row = tl.program_id(0).to(tl.int64)
    r_R, sums_R = tl.arange(0, BLOCK_R), tl.zeros((BLOCK_R,), tl.float32)
    inside_R = r_R < width
    weight = 0.0
    for start in range(0, splits, BLOCK_P):
        p_P = start + tl.arange(0, BLOCK_P)
        row_P, inside_P = parts + (p_P * rows + row) * (width + 1), p_P < splits
        sums_R += tl.sum(load_matrix(row_P, inside_P, width, BLOCK_R), 0)
        weight += tl.sum(tl.load(row_P + width, mask=inside_P, other=0.0), 0)
    z_R = sums_R * inverse_weight(weight, MEAN, EPS, EPS2)
    unit_R = z_R * inverse_root(tl.sum(z_R * z_R, 0), 1.0, EPS2)
    tl.store(latent + row * width + r_R, z_R, mask=inside_R)
    tl.store(unit + row * width + r_R, unit_R, mask=inside_R)
    tl.store(weights + row, weight)


def finish(parts_PSDr: Tensor, *, mean: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Latents from the parts of their sums.

    Args:
        parts_PSDr: from `gather`, (P, S, D, R + 1).
        mean: sums are divided by sums of assignments, not by their length.

    Returns:
        Z and z, (S, D, R), and what the sums were divided by (its square, for a length), (S, D).
    """
    splits, samples, latents, columns = parts_PSDr.shape
    width, rows = columns - 1, samples * latents
    latent, unit = parts_PSDr.new_empty((2, samples, latents, width)).unbind()
    weights = parts_PSDr.new_empty((samples, latents))
    finish_kernel[(rows,)](
        parts_PSDr,
        latent,
        unit,
        weights,
        splits,
        rows,
        width,
        MEAN=mean,
        EPS=EPS,
        EPS2=EPS2,
        BLOCK_P=min(triton.next_power_of_2(splits), max(4096 // padded(width), 1)),
        BLOCK_R=padded(width),
        num_warps=4,
    )
    return latent, unit, weights
