"""The layer forward and backward by the kernels, as `latentgnn.core.passes` and `latentgnn.core.backward` do it.

The reductions and the features' gradient are PyTorch convolutions; the kernels do everything else.

Axes: B batch, N nodes, C channels, R reduced channels, S samples, D latents.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from latentgnn.core.layouts import empty_like_layout
from latentgnn.core.plan import Plan
from latentgnn.kernels.contract import contract, expand_gradients
from latentgnn.kernels.expand import add_product, scaled
from latentgnn.kernels.gather import gather, gather_backward
from latentgnn.kernels.latents import finish
from latentgnn.kernels.mix import mix, mix_backward
from latentgnn.kernels.rows import Rows
from latentgnn.kernels.scatter import scatter, scatter_backward
from latentgnn.kernels.way import Way
from latentgnn.kernels.weights import Projected
from latentgnn.numerics import row_bound, to_dtype
from latentgnn.projections import NormedMatrix, split_parts


@dataclass(frozen=True)
class _Layer:
    """A layer of one kernel and one group, and the nodes of its input.

    Args:
        rows: the nodes.
        x_BNC: in the dtype of the products, zero where nodes take no part.
        reduce: both reductions' matrices below one another, (2 R, C).
        up: the factor that their product with x is multiplied by; only in float16.
        reduces: their norms.
        assigns: of gather and scatter.
        conv: ``None`` without a graph convolution.
        expand: of the output.
        gamma: ``None`` without a residual connection.
    """

    rows: Rows
    x_BNC: Tensor
    reduce: Tensor
    up: Tensor | None
    reduces: Sequence[Projected]
    assigns: Sequence[Projected]
    conv: Projected | None
    expand: Projected
    gamma: Tensor | None

    @classmethod
    def of(
        cls,
        x_BNC: Tensor,
        mask_BN: Tensor | None,
        offsets: Sequence[int] | None,
        tensors: Sequence[Tensor | None],
        plan: Plan,
    ) -> "_Layer":
        normed = NormedMatrix.each(tensors[:-1])
        projected = [Projected.of(part, eps, plan.compute) for part, eps in zip(normed, plan.eps, strict=True)]
        return cls(
            rows=Rows.of(x_BNC, mask_BN, offsets),
            x_BNC=masked(to_dtype(x_BNC, plan.compute), mask_BN),
            reduce=torch.cat([part.matrix for part in projected[:2]]),
            up=row_bound([part.matrix for part in normed[:2]]).unsqueeze(0) if plan.compute == torch.float16 else None,
            reduces=projected[:2],
            assigns=projected[2:4],
            conv=projected[4] if plan.graph_conv else None,
            expand=projected[-1],
            gamma=tensors[-1],
        )

    def reduced(self) -> Tensor:
        """W x of gather's reduction, and of scatter's, (B, N, 2 R)."""
        matrix = self.reduce if self.up is None else (self.reduce.float() / self.up).to(self.reduce.dtype)
        return convolved(self.x_BNC, matrix)

    def ways(self, raw_BNR: Tensor) -> tuple[Way, Way]:
        """Gather's and scatter's, from W x of both."""
        first, second = (
            Way(own, self.up, self.rows, reduce, assign)
            for own, reduce, assign in zip(raw_BNR.chunk(2, -1), self.reduces, self.assigns, strict=True)
        )
        return first, second

    def features(self, way: Way, to_feature_SDR: Tensor) -> Tensor:
        """What the output is expanded from, (B, N, R)."""
        feature_BNR = empty_like_layout(self.x_BNC, way.width)
        scatter(way, to_feature_SDR, self.conv, feature_BNR)
        return feature_BNR

    @property
    def conv_matrix(self) -> Tensor | None:
        """G, ``None`` without a graph convolution."""
        return None if self.conv is None else self.conv.matrix


def masked(x_BNC: Tensor, mask_BN: Tensor | None) -> Tensor:
    """Zeros at nodes outside the mask, which may hold NaN."""
    return x_BNC if mask_BN is None else torch.where(mask_BN.unsqueeze(-1), x_BNC, 0)


def convolved(x_BNC: Tensor, matrix_OC: Tensor) -> Tensor:
    """x W^T, (B, N, O), by PyTorch's convolution."""
    # As a map with one row: with one column, cuDNN may take ten times as long.
    return torch.conv2d(x_BNC.mT.unsqueeze(2), matrix_OC[:, :, None, None]).squeeze(2).mT


@dataclass(frozen=True)
class Saved:
    """What a backward pass starts from.

    Args:
        latent: Z, (S, D, R).
        unit: z, likewise.
        weights: divisors of the sums, (S, D).
        to_feature: the matrix from assignments to features, (S, D, R). This and the next two: ``None`` to recompute.
        raw: W x of both reductions, (B, N, 2 R).
        feature: what the output is expanded from, (B, N, R).
    """

    latent: Tensor
    unit: Tensor
    weights: Tensor
    to_feature: Tensor | None
    raw: Tensor | None
    feature: Tensor | None


def forward(
    x_BNC: Tensor,
    mask_BN: Tensor | None,
    offsets: Sequence[int] | None,
    tensors: Sequence[Tensor | None],
    plan: Plan,
) -> tuple[Tensor, Saved]:
    """The layer's output, (B, N, C) in the input's type and order of strides, and what its backward pass starts from.

    Args:
        x_BNC: input, any strides.
        mask_BN: nodes that take part; the others are returned unchanged.
        offsets: boundaries of the samples in a single row of packed nodes; ``None`` if each row is a sample.
        tensors: as `latentgnn.core.parameters.Parts.of` takes them.
        plan: the layer's plan.
    """
    with torch.cuda.device_of(x_BNC):
        x_BNC = _in_memory(x_BNC)
        layer = _Layer.of(x_BNC, mask_BN, offsets, tensors, plan)
        mean, raw_BNR = plan.node_scale == "mean", layer.reduced()
        of_gather, of_scatter = layer.ways(raw_BNR)
        latent_SDR, unit_SDR, weights_SD = finish(gather(of_gather, mean=mean), mean=mean)
        to_feature_SDR = mix(latent_SDR, unit_SDR, layer.conv_matrix, plan.compute)
        feature_BNR = layer.features(of_scatter, to_feature_SDR)
        out_BNC = empty_like_layout(x_BNC, x_BNC.shape[-1])
        add_product(
            x_BNC,
            layer.rows.valid,
            feature_BNR,
            layer.expand.matrix,
            layer.expand,
            layer.gamma,
            out_BNC,
            residual=plan.residual,
        )
    return out_BNC, Saved(latent_SDR, unit_SDR, weights_SD, to_feature_SDR, raw_BNR, feature_BNR)


class _Needs(NamedTuple):
    """Which tensors of a projection need gradients; the fields are those of `NormedMatrix`."""

    matrix: bool
    weight: bool
    bias: bool
    mean: bool
    var: bool


def backward(
    grad_BNC: Tensor,
    x_BNC: Tensor,
    mask_BN: Tensor | None,
    offsets: Sequence[int] | None,
    tensors: Sequence[Tensor | None],
    saved: Saved,
    plan: Plan,
    *,
    needs_x: bool,
    needs: Sequence[bool],
) -> tuple[Tensor | None, list[Tensor | None]]:
    """Gradients of the input, and of the tensors; ``None`` for what needs none.

    Args:
        grad_BNC: of the output.
        x_BNC: as `forward` had it, like all that follow.
        mask_BN: nodes that take part.
        offsets: of the samples.
        tensors: parameters and statistics.
        saved: from `forward`.
        plan: the layer's plan.
        needs_x: whether the input needs a gradient.
        needs: whether each of the tensors does.
    """
    with torch.cuda.device_of(x_BNC):
        grad_BNC, x_BNC = _in_memory(grad_BNC), _in_memory(x_BNC)
        layer = _Layer.of(x_BNC, mask_BN, offsets, tensors, plan)
        to_feature_SDR = saved.to_feature
        if to_feature_SDR is None:
            to_feature_SDR = mix(saved.latent, saved.unit, layer.conv_matrix, plan.compute)
        raw_BNR = layer.reduced() if saved.raw is None else saved.raw
        of_gather, of_scatter = layer.ways(raw_BNR)
        feature_BNR = layer.features(of_scatter, to_feature_SDR) if saved.feature is None else saved.feature
        inside_BNC = masked(to_dtype(grad_BNC, plan.compute), mask_BN)
        need_v, need_l, need_psi_v, need_psi_l, *need_convs, need_expand = map(_Needs._make, split_parts(needs[:-1]))
        grads_expand: Sequence[Tensor | None] = [None] * 6
        if any(need_expand) or needs[-1]:
            matrix, *vectors, of_gamma = expand_gradients(feature_BNR, inside_BNC, layer.expand, layer.gamma)
            grads_expand = [matrix, *layer.expand.norm_gradients(*vectors, needs=need_expand), of_gamma]
        grad_feature_BNR = convolved(inside_BNC, scaled(layer.expand, layer.gamma))

        mean, grad_raw_BNR = plan.node_scale == "mean", torch.empty_like(raw_BNR)
        grad_gather, grad_scatter = grad_raw_BNR.chunk(2, -1)
        grad_to_feature, (grad_psi_l, *vectors_l) = scatter_backward(
            of_scatter,
            to_feature_SDR,
            layer.conv,
            grad_feature_BNR,
            grad_scatter,
            learns=any(need.weight or need.bias for need in (need_l, *need_convs)),
        )
        grad_sums, grad_weights, grad_conv = mix_backward(
            saved.latent, saved.unit, saved.weights, layer.conv_matrix, grad_to_feature, plan.compute, mean=mean
        )
        grad_psi_v, *vectors_v = gather_backward(
            of_gather, grad_sums, grad_weights, grad_gather, mean=mean, learns=need_v.weight or need_v.bias
        )
        grad_x_BNC = None
        if needs_x:
            grad_x_BNC = empty_like_layout(x_BNC, x_BNC.shape[-1])
            add_product(
                grad_BNC,
                layer.rows.valid,
                grad_raw_BNR,
                layer.reduce.mT,
                None,
                None,
                grad_x_BNC,
                residual=plan.residual,
            )
        grad_reduces: Sequence[Tensor | None] = (None, None)
        if need_v.matrix or need_l.matrix:
            grad_reduces = contract(grad_raw_BNR, layer.x_BNC).chunk(2)
    grads = [
        *(grad_reduces[0], *layer.reduces[0].norm_gradients(*vectors_v[2:], needs=need_v)),
        *(grad_reduces[1], *layer.reduces[1].norm_gradients(*vectors_l[2:4], needs=need_l)),
        *(grad_psi_v, *layer.assigns[0].norm_gradients(*vectors_v[:2], needs=need_psi_v)),
        *(grad_psi_l, *layer.assigns[1].norm_gradients(*vectors_l[:2], needs=need_psi_l)),
        *([] if layer.conv is None else [grad_conv, *layer.conv.norm_gradients(*vectors_l[4:], needs=need_convs[0])]),
        *grads_expand,
    ]
    return grad_x_BNC, [
        to_dtype(grad, tensor.dtype) if need and tensor is not None and grad is not None else None
        for grad, tensor, need in zip(grads, tensors, needs, strict=True)
    ]


def _in_memory(x_BNC: Tensor) -> Tensor:
    """Resolve PyTorch's lazy negation, which the imaginary part of a conjugate has and the kernels would not see."""
    return x_BNC.resolve_neg()
