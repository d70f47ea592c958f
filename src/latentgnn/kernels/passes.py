"""The layer forward and backward by the kernels, as `latentgnn.core.passes` and `latentgnn.core.backward` do it.

Reductions, and the sums over nodes of the two gradients as large as they, are PyTorch's convolutions. What the
kernels join between them is read and written once.

Axes: B batch, N nodes, C channels, R reduced channels, S samples, D latents.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from latentgnn.core.layouts import empty_like_layout
from latentgnn.core.plan import Plan
from latentgnn.core.recorded import Mixing
from latentgnn.functional import cast
from latentgnn.kernels.expand import add_product, scaled
from latentgnn.kernels.gather import gather, gather_backward
from latentgnn.kernels.mix import mix
from latentgnn.kernels.rows import Rows
from latentgnn.kernels.scatter import scatter, scatter_backward
from latentgnn.kernels.weights import Projected


@dataclass(frozen=True)
class _Layer:
    """A layer of one kernel and one group, and the nodes of its input.

    Args:
        rows: the nodes.
        x_BNC: in the type of the products, zero where nodes take no part.
        reduce: both reductions' matrices below one another, (2 R, C).
        up: what their product with x is multiplied by.
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
        fives = [tensors[place : place + 5] for place in range(0, len(tensors) - 1, 5)]
        projected = [Projected.of(five, eps, plan.compute) for five, eps in zip(fives, plan.eps, strict=True)]
        return cls(
            rows=Rows.of(x_BNC, mask_BN, offsets),
            x_BNC=masked(cast(x_BNC, plan.compute), mask_BN),
            reduce=torch.cat([part.matrix for part in projected[:2]]),
            up=_up([five[0] for five in fives[:2]]) if plan.compute == torch.float16 else None,
            reduces=projected[:2],
            assigns=projected[2:4],
            conv=projected[4] if plan.graph_conv else None,
            expand=projected[-1],
            gamma=tensors[-1],
        )

    def reduced(self) -> Tensor:
        """W x of gather's reduction, and of scatter's, (B, N, 2 R)."""
        matrix = self.reduce if self.up is None else (self.reduce.float() / self.up).to(self.reduce.dtype)
        return _as_nodes(torch.conv2d(_as_map(self.x_BNC), matrix[:, :, None, None]))

    def features(self, u_BNR: Tensor, to_feature_SDR: Tensor) -> Tensor:
        """What the output is expanded from, (B, N, R)."""
        own_BNR = u_BNR.chunk(2, -1)[1]
        feature_BNR = empty_like_layout(self.x_BNC, own_BNR.shape[-1])
        scatter(
            own_BNR, self.up, self.rows, self.reduces[1], self.assigns[1], to_feature_SDR, self.conv, feature_BNR
        )
        return feature_BNR

    def mixed(self, sums_SDr: Tensor, plan: Plan) -> Tensor:
        """What takes a node's assignments to its features, (S, D, R)."""
        conv = None if self.conv is None else self.conv.matrix
        return mix(sums_SDr, conv, plan.compute, mean=plan.node_scale == "mean")


def masked(x_BNC: Tensor, mask_BN: Tensor | None) -> Tensor:
    """Zeros where nodes take no part: NaN too may be there."""
    return x_BNC if mask_BN is None else torch.where(mask_BN.unsqueeze(-1), x_BNC, 0)


def forward(
    x_BNC: Tensor,
    mask_BN: Tensor | None,
    offsets: Sequence[int] | None,
    tensors: Sequence[Tensor | None],
    plan: Plan,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The layer's output, and what its backward pass may start from.

    Args:
        x_BNC: input, whatever its strides.
        mask_BN: nodes that take part; the others come back unchanged.
        offsets: where each sample begins among the nodes of a single row, and the end; ``None`` if rows are samples.
        tensors: as `latentgnn.core.parameters.Parts.of` takes them.
        plan: of the layer.

    Returns:
        (B, N, C) in the input's type and order of strides; gather's sums and weights, (S, D, R + 1); W x of both
        reductions, (B, N, 2 R); and the features, (B, N, R).
    """
    with torch.cuda.device_of(x_BNC):
        layer = _Layer.of(x_BNC, mask_BN, offsets, tensors, plan)
        u_BNR = layer.reduced()
        sums_SDr = gather(
            u_BNR.chunk(2, -1)[0],
            layer.up,
            layer.rows,
            layer.reduces[0],
            layer.assigns[0],
            mean=plan.node_scale == "mean",
        )
        feature_BNR = layer.features(u_BNR, layer.mixed(sums_SDr, plan))
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
    return out_BNC, sums_SDr, u_BNR, feature_BNR


def backward(
    grad_BNC: Tensor,
    x_BNC: Tensor,
    mask_BN: Tensor | None,
    offsets: Sequence[int] | None,
    tensors: Sequence[Tensor | None],
    sums_SDr: Tensor,
    u_BNR: Tensor | None,
    feature_BNR: Tensor | None,
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
        sums_SDr: from `forward`.
        u_BNR: likewise, or ``None`` to compute it again.
        feature_BNR: likewise.
        plan: of the layer.
        needs_x: whether the input needs a gradient.
        needs: whether each of the tensors does.
    """
    with torch.cuda.device_of(x_BNC):
        layer = _Layer.of(x_BNC, mask_BN, offsets, tensors, plan)
        to_feature_SDR = layer.mixed(sums_SDr, plan)
        if u_BNR is None:
            u_BNR = layer.reduced()
        if feature_BNR is None:
            feature_BNR = layer.features(u_BNR, to_feature_SDR)
        inside_BNC = masked(cast(grad_BNC, plan.compute), mask_BN)
        grad_feature_BNR, grad_expand, *grad_last = _expand_backward(inside_BNC, feature_BNR, layer, tensors, needs)

        mean = plan.node_scale == "mean"
        grad_u_BNR = torch.empty_like(u_BNR)
        (raw_gather, raw_scatter), (grad_gather, grad_scatter) = u_BNR.chunk(2, -1), grad_u_BNR.chunk(2, -1)
        grad_matrix, grad_psi_l, *vectors_l = scatter_backward(
            raw_scatter,
            layer.up,
            layer.rows,
            layer.reduces[1],
            layer.assigns[1],
            to_feature_SDR,
            layer.conv,
            grad_feature_BNR,
            grad_scatter,
        )
        convs = [] if layer.conv is None else [layer.conv.matrix.float().unsqueeze(0)]
        mixing = Mixing.of(sums_SDr[:, None, :, :-1], sums_SDr[:, None, :, -1], convs, plan, records=True)
        grad_sums, grad_weights, grad_convs = mixing.gradients([grad_matrix.unsqueeze(1).mT])
        grad_psi_v, *vectors_v = gather_backward(
            raw_gather,
            layer.up,
            layer.rows,
            layer.reduces[0],
            layer.assigns[0],
            grad_sums.squeeze(1).contiguous(),
            grad_weights.squeeze(1).contiguous(),
            grad_gather,
            mean=mean,
        )
        grad_x_BNC = None
        if needs_x:
            grad_x_BNC = empty_like_layout(x_BNC, x_BNC.shape[-1])
            add_product(
                grad_BNC,
                layer.rows.valid,
                grad_u_BNR,
                layer.reduce.mT,
                None,
                None,
                grad_x_BNC,
                residual=plan.residual,
            )
        grad_reduces: Sequence[Tensor | None] = (None, None)
        if needs[0] or needs[5]:
            grad_reduces = _sum_of_products(grad_u_BNR, layer.x_BNC, layer.reduce).chunk(2)
    grads = [
        *(grad_reduces[0], *layer.reduces[0].norm_gradients(*vectors_v[2:])),
        *(grad_reduces[1], *layer.reduces[1].norm_gradients(*vectors_l[2:4])),
        *(grad_psi_v, *layer.assigns[0].norm_gradients(*vectors_v[:2])),
        *(grad_psi_l, *layer.assigns[1].norm_gradients(*vectors_l[:2])),
    ]
    if layer.conv is not None:
        grad_conv = grad_convs[0]
        grads += [None if grad_conv is None else grad_conv[0], *layer.conv.norm_gradients(*vectors_l[4:])]
    grads += [grad_expand, *grad_last]
    return grad_x_BNC, [
        cast(grad, tensor.dtype) if need and tensor is not None and grad is not None else None
        for grad, tensor, need in zip(grads, tensors, needs, strict=True)
    ]


def _expand_backward(
    grad_BNC: Tensor, feature_BNR: Tensor, layer: _Layer, tensors: Sequence[Tensor | None], needs: Sequence[bool]
) -> list[Tensor | None]:
    """Gradients of the features, and of the last projection's five tensors and gamma."""
    expand, gamma = layer.expand, layer.gamma
    matrix = scaled(expand, gamma)
    wanted = any(needs[-6:])
    grad_feature, grad_matrix, _ = torch.ops.aten.convolution_backward(
        _as_map(grad_BNC),
        _as_map(feature_BNR),
        matrix[:, :, None, None],
        None,
        *((1, 1), (0, 0), (1, 1), False, (0, 0), 1),
        (True, wanted, False),
    )
    grads: list[Tensor | None] = [_as_nodes(grad_feature), *[None] * 6]
    if not wanted:
        return grads
    # Of gamma * scale * U; gamma * scale is a factor of each row.
    grad_matrix = grad_matrix[:, :, 0, 0].float()
    own = expand.matrix.float()
    weight, bias, mean, var = expand.norm
    factor = 1.0 if gamma is None else gamma.detach().float()
    along = torch.linalg.vecdot(grad_matrix, own)
    if var is None or mean is None:
        grads[1] = grad_matrix * factor
        grads[-1] = along.sum().unsqueeze(0)
        return grads
    inverse = (var.float() + expand.eps).rsqrt()
    scale = inverse if weight is None else weight.detach().float() * inverse
    shift = -mean.float() * scale if bias is None else bias.detach().float() - mean.float() * scale
    grads[1] = grad_matrix * (scale * factor).unsqueeze(1)
    total = grad_BNC.sum((0, 1), dtype=torch.float32)
    grads[2:6] = expand.norm_gradients(along * factor, total * factor)
    grads[-1] = (torch.dot(along, scale) + torch.dot(total, shift)).unsqueeze(0)
    return grads


def _sum_of_products(grad_BNO: Tensor, x_BNC: Tensor, matrix_OC: Tensor) -> Tensor:
    """g^T x, the sum over all nodes, (O, C): the gradient of a convolution's weight."""
    _, grad, _ = torch.ops.aten.convolution_backward(
        _as_map(grad_BNO),
        _as_map(x_BNC),
        matrix_OC[:, :, None, None],
        None,
        *((1, 1), (0, 0), (1, 1), False, (0, 0), 1),
        (False, True, False),
    )
    return grad[:, :, 0, 0]


def _as_map(x_BNC: Tensor) -> Tensor:
    """(B, C, N, 1), a view: contiguous or channels-last."""
    return x_BNC.mT.unsqueeze(-1)


def _as_nodes(x_BCN1: Tensor) -> Tensor:
    """(B, N, C), a view."""
    return x_BCN1.squeeze(-1).mT


def _up(matrices: Sequence[Tensor | None]) -> Tensor:
    """The longest row, 1 at least: without it, a sum over channels might leave float16's range."""
    lengths = [torch.linalg.vector_norm(matrix.float(), dim=1).amax() for matrix in matrices if matrix is not None]
    return torch.stack(lengths).amax().clamp_min(1).unsqueeze(0)
