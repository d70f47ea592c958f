"""Gather and scatter of a block of nodes by the kernels: the reduction in front of them, and a call for each sample.

Axes: s rows of the input, T nodes, C channels, S samples, R reduced channels, G groups, r channels of a group,
D latents of all kernels in a group (D_k of one), F features.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from latentgnn.core.layouts import empty_like_layout
from latentgnn.core.nodes import Block
from latentgnn.core.parameters import Matrices
from latentgnn.core.plan import Plan
from latentgnn.core.products import project_all
from latentgnn.kernels.common import Way
from latentgnn.kernels.gather import gather
from latentgnn.kernels.scatter import scatter


class Steps:
    """The two steps of one layer, for norms that are affine maps.

    Args:
        matrices: of the layer.
        plan: of the layer.
    """

    def __init__(self, matrices: Matrices, plan: Plan) -> None:
        self._plan = plan
        self._conv_shifts = matrices.conv_shifts if plan.graph_conv else [None] * len(plan.latents)
        self._features = matrices.expand.shape[1]
        self._reduced = matrices.reduces[0].shape[0]
        reduces, shift_R = matrices.reduces, matrices.reduce_shift
        if plan.compute == torch.float16:
            # Rows longer than 1 may take a sum over channels out of float16's range; unit length comes next anyway.
            lengths = [torch.linalg.vector_norm(weight_RC, dim=1).amax() for weight_RC in reduces]
            down = torch.stack(lengths).amax().clamp_min(1).reciprocal()
            reduces = [weight_RC * down for weight_RC in reduces]
            shift_R = None if shift_R is None else shift_R * down
        self._reduces = [weight_RC.to(plan.compute) for weight_RC in reduces]
        scales, shifts = _halves(matrices.reduce_scale), _halves(shift_R)
        self._ways = [
            Way(scale, shift, assign_GDr.to(plan.compute).contiguous(), assign_shift)
            for scale, shift, assign_GDr, assign_shift in zip(
                scales, shifts, matrices.assigns, matrices.assign_shifts, strict=True
            )
        ]

    def gather(self, block: Block, x_sTC: Tensor, valid_sT1: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """Gather from a block.

        Args:
            block: the block.
            x_sTC: its part of the input in the type of the products, zero where nodes take no part.
            valid_sT1: which of its nodes take part.

        Returns:
            Sums of values by assignments, (S, G, D, r); what they will be divided by, (S, G, D); and what `scatter`
            starts from, a view (s, T, R).
        """
        u_sTR = project_all(x_sTC, self._reduces)
        parts = [
            gather(u, valid, self._ways[0], self._plan)
            for u, valid in zip(
                block.each_sample(u_sTR[..., : self._reduced], 1), _each_valid(block, valid_sT1), strict=True
            )
        ]
        sums, weights = zip(*parts, strict=True)
        return _together(sums), _together(weights), u_sTR[..., self._reduced :]

    def scatter(
        self,
        block: Block,
        u_sTR: Tensor,
        valid_sT1: Tensor | None,
        to_features: Sequence[Tensor],
        out_sTC: Tensor,
    ) -> Tensor:
        """What the output of a block is expanded from.

        Args:
            block: the block.
            u_sTR: from `gather`.
            valid_sT1: which of the block's nodes take part.
            to_features: of each kernel, (S, G, r, D_k), in the type of the products.
            out_sTC: the block's part of the output, whose layout the features take.

        Returns:
            (s, T, F) in the type of the products.
        """
        feature_sTF = empty_like_layout(out_sTC, self._features, self._plan.compute)
        u_parts, features = block.each_sample(u_sTR, 1), block.each_sample(feature_sTF, 1)
        matrices = [matrix_SGrD[block.samples].split(u_parts[0].shape[0]) for matrix_SGrD in to_features]
        for u, valid, feature, *of_kernels in zip(
            u_parts, _each_valid(block, valid_sT1), features, *matrices, strict=True
        ):
            scatter(u, valid, self._ways[1], of_kernels, self._conv_shifts, self._plan, feature)
        return feature_sTF


def _halves(vector_R: Tensor | None) -> Sequence[Tensor | None]:
    """Gather's and scatter's part of a vector over both reductions."""
    return (None, None) if vector_R is None else vector_R.chunk(2)


def _each_valid(block: Block, valid_sT1: Tensor | None) -> Sequence[Tensor | None]:
    """The parts of a mask that belong to one sample each."""
    if valid_sT1 is None:
        return [None] * (1 if block.bounds is None else len(block.bounds) - 1)
    return block.each_sample(valid_sT1, 1)


def _together(parts: Sequence[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(list(parts))
