"""The layer over tiles of nodes, forward and backward, keeping nothing of the nodes' size but the input.

This is the layer for norms that are affine maps (frozen or evaluation batch norm, or none), folded into the matrices.
The forward pass reads the input twice: to gather, and to scatter. The backward pass is arranged by hand: it reads the
input and the incoming gradient twice each, recomputes every tile, and needs only the latents' sums beyond the input.

A matrix and its shift are one *affine* tensor (out, in + 1) whose last column is the shift. It is applied to values
with a row of ones below them, so that most shifts cost no pass of their own; where a node is masked out that row has
a zero, which takes the node out of everything that follows.

Axes: S samples, N nodes, C channels, R reduced channels, G groups, r = R / G, D latents of all kernels in a group,
K kernels, F features that the output is expanded from. In a tile: s samples, T nodes, E = s * G graphs. Inside a tile
channels come before nodes whatever the input's strides, so that a sum over channels runs along contiguous nodes.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from latentgnn.functional import EPS, NodeScale, affinity, l2, length, mix, reciprocal, wide
from latentgnn.machine import nodes_per_tile


@dataclass(frozen=True)
class Plan:
    """What kind of layer it is, apart from its numbers.

    Args:
        groups: G.
        latents: D_k of each kernel, in each group.
        symmetric: gather and scatter share reduction and assignment.
        graph_conv: the output is expanded from convolved channels instead of assignments.
        residual: the input is added to the output.
        node_scale: what the latents' sums are divided by.
        compute: type of the products over nodes.
    """

    groups: int
    latents: tuple[int, ...]
    symmetric: bool
    graph_conv: bool
    residual: bool
    node_scale: NodeScale
    compute: torch.dtype

    @property
    def kernels(self) -> list[slice]:
        """Each kernel's latents among all."""
        return [slice(*ends) for ends in pairwise(accumulate(self.latents, initial=0))]


class Weights(NamedTuple):
    """The affine tensors of a layer, in the wide type, with every norm and gamma folded in.

    Args:
        reduce: (R, C + 1) of gather, and of scatter below it unless symmetric.
        gather_assign: (G, D, r + 1).
        scatter_assign: likewise; if symmetric, the same tensor.
        graph_conv: (K, G, r, r + 1), or ``None``.
        expand: (C, K * R + 1).
    """

    reduce: Tensor
    gather_assign: Tensor
    scatter_assign: Tensor
    graph_conv: Tensor | None
    expand: Tensor


class _Tile(NamedTuple):
    """Where a tile lies: rows and nodes of the input, and its samples among all."""

    rows: slice
    nodes: slice
    samples: slice


class _Part(NamedTuple):
    """A tile of the input: (s, C, T) in the type of the products, and which of its nodes count, (E, 1, T)."""

    x_sCT: Tensor
    valid_E1T: Tensor | None


class _Unit(NamedTuple):
    """Columns of unit length with a row of ones below, (E, r + 1, T), and what they were multiplied by, (E, 1, T)."""

    value: Tensor
    scale: Tensor


class _Features(NamedTuple):
    """What a tile's output is expanded from, with a row of ones below, and how it came about."""

    feature: Tensor  # (s, F + 1, T)
    unit: _Unit
    assigned: list[_Unit]  # of each kernel, (E, D_k + 1, T); without graph convolution the row of ones is missing


def forward(
    x_BNC: Tensor, mask_BN: Tensor | None, offsets: Sequence[int] | None, weights: Weights, plan: Plan
) -> tuple[Tensor, Tensor, Tensor]:
    """The layer's output and the latents' sums that `backward` needs.

    Args:
        x_BNC: input; a transposed view is as good as a contiguous tensor.
        mask_BN: nodes that take part; the others come back unchanged.
        offsets: where each sample begins among the nodes of a single row, and the end; ``None`` if rows are samples.
        weights: affine tensors.
        plan: of the layer.

    Returns:
        The output, (B, N, C) in the input's type and order of strides; the sums of values and of ones,
        (S, G, D, r + 1); the sums of squared assignments, (S, G, D).
    """
    tiles = list(_tiles(x_BNC, offsets, weights, plan))
    gather_reduce, scatter_reduce = _reductions(weights, plan)
    sums_SGDr, squares_SGD = empty_sums(x_BNC, offsets, weights, plan)
    for tile in tiles:
        part = _part(x_BNC, mask_BN, tile, plan)
        unit = _unit(_reduce(gather_reduce, part, plan), part.valid_E1T, plan)
        assign_EDT = _gather_assign(_per_graph(weights.gather_assign, part, plan), unit, plan)
        _add_outer(sums_SGDr[tile.samples].flatten(0, 1), assign_EDT, unit.value)
        if not plan.symmetric:
            squares_SGD[tile.samples].flatten(0, 1).add_(_squares(assign_EDT, dim=2))

    latents, expand = _mixed(sums_SGDr, squares_SGD, weights.graph_conv, weights.expand, plan)
    out_BNC = like_input(x_BNC)
    for tile in tiles:
        part = _part(x_BNC, mask_BN, tile, plan)
        features = _features(_reduce(scatter_reduce, part, plan), part, weights, latents, tile, plan)
        expand_sCF = _of_samples(expand, tile, part).to(plan.compute)
        x_sCT, out_sCT = x_BNC[tile.rows, tile.nodes].mT, out_BNC[tile.rows, tile.nodes].mT
        _add_product(x_sCT if plan.residual else None, expand_sCF, features.feature, out=out_sCT)
        if mask_BN is not None and not plan.residual:
            out_sCT.copy_(torch.where(mask_BN[tile.rows, tile.nodes].unsqueeze(1), out_sCT, x_sCT))
    return out_BNC, sums_SGDr, squares_SGD


def backward(
    grad_BNC: Tensor,
    x_BNC: Tensor,
    mask_BN: Tensor | None,
    offsets: Sequence[int] | None,
    weights: Weights,
    sums_SGDr: Tensor,
    squares_SGD: Tensor,
    plan: Plan,
    *,
    needs_x: bool,
) -> tuple[Tensor | None, Weights]:
    """Gradients of the input, if it needs one, and of the affine tensors.

    Args:
        grad_BNC: of the output.
        x_BNC: as `forward` had it, like all that follow.
        mask_BN: nodes that take part.
        offsets: of the samples.
        weights: affine tensors.
        sums_SGDr: from `forward`.
        squares_SGD: from `forward`.
        plan: of the layer.
        needs_x: whether to find the input's gradient.
    """
    tiles = list(_tiles(x_BNC, offsets, weights, plan))
    gather_reduce, scatter_reduce = _reductions(weights, plan)
    grads = Weights(*(None if weight is None else torch.zeros_like(weight) for weight in weights))  # type: ignore[arg-type]
    latents, expand = _mixed(sums_SGDr, squares_SGD, weights.graph_conv, weights.expand, plan)
    grad_latents = [torch.zeros_like(latent) for latent in latents]
    grad_expand = torch.zeros_like(expand)
    reduced = weights.reduce.shape[0] if plan.symmetric else weights.reduce.shape[0] // 2

    # From the output to the latents. What each tile's reduced channels receive is kept, R / C of the input's size.
    grads_reduced: list[Tensor] = []
    for tile in tiles:
        part = _part(x_BNC, mask_BN, tile, plan)
        features = _features(_reduce(scatter_reduce, part, plan), part, weights, latents, tile, plan)
        grad_sCT = grad_BNC[tile.rows, tile.nodes].mT.to(plan.compute)
        if mask_BN is not None:
            grad_sCT = torch.where(mask_BN[tile.rows, tile.nodes].unsqueeze(1), grad_sCT, 0)
        if expand.shape[0] == 1:
            _add_outer_of_samples(grad_expand[0], grad_sCT, features.feature)
        else:
            _add_outer(grad_expand[tile.samples], grad_sCT, features.feature)
        grad_sFT = _product(_of_samples(expand, tile, part)[:, :, :-1].mT.to(plan.compute), grad_sCT)
        grad_sRT = grad_sCT.new_empty((grad_sCT.shape[0], weights.reduce.shape[0], grad_sCT.shape[2]))
        grad_ErT = _features_backward(grad_sFT, features, weights, grads, latents, grad_latents, tile, plan)
        grad_sRT[:, -reduced:] = grad_ErT.view(-1, reduced, grad_sRT.shape[2])
        grads_reduced.append(grad_sRT)

    grad_sums_SGDr, grad_squares_SGD = _mixed_backward(
        grad_latents, grad_expand, sums_SGDr, squares_SGD, weights, grads, plan
    )

    # From the latents to the input, both ways at once.
    grad_x_BNC = like_input(x_BNC) if needs_x else None
    weight_CR = weights.reduce[:, :-1].mT.to(plan.compute).contiguous()
    for tile, grad_sRT in zip(tiles, grads_reduced, strict=True):
        part = _part(x_BNC, mask_BN, tile, plan)
        unit = _unit(_reduce(gather_reduce, part, plan), part.valid_E1T, plan)
        grad_squares_ED = grad_squares_SGD[tile.samples].flatten(0, 1)
        grad_ErT = _gather_backward(
            unit, weights, grads, grad_sums_SGDr[tile.samples].flatten(0, 1), grad_squares_ED, plan
        )
        own = grad_sRT[:, :reduced]
        gathered_sRT = grad_ErT.view(own.shape)
        own.copy_(own + gathered_sRT if plan.symmetric else gathered_sRT)
        _add_outer_of_samples(grads.reduce[:, :-1], grad_sRT, part.x_sCT)
        grads.reduce[:, -1] += grad_sRT.sum((0, 2), dtype=grads.reduce.dtype)
        if grad_x_BNC is not None:
            base_sCT = grad_BNC[tile.rows, tile.nodes].mT
            out_sCT = grad_x_BNC[tile.rows, tile.nodes].mT
            weight_sCR = weight_CR.expand(grad_sRT.shape[0], -1, -1)
            _add_product(base_sCT if plan.residual else None, weight_sCR, grad_sRT, out=out_sCT)
            if mask_BN is not None and not plan.residual:
                out_sCT.copy_(torch.where(mask_BN[tile.rows, tile.nodes].unsqueeze(1), out_sCT, base_sCT))
    if plan.symmetric:
        # One tensor took part twice; its gradient is all in the first place.
        grads = grads._replace(gather_assign=grads.gather_assign + grads.scatter_assign)
    return grad_x_BNC, grads


def like_input(x_BNC: Tensor) -> Tensor:
    """Memory for the output, with nodes or channels innermost as in the input."""
    if x_BNC.stride(-1) == 1:
        return x_BNC.new_empty(x_BNC.shape)
    return x_BNC.new_empty(x_BNC.mT.shape).mT


def empty_sums(x_BNC: Tensor, offsets: Sequence[int] | None, weights: Weights, plan: Plan) -> tuple[Tensor, Tensor]:
    """Zeros for the sums of a pass over the nodes: (S, G, D, r + 1) and (S, G, D)."""
    samples = x_BNC.shape[0] if offsets is None else len(offsets) - 1
    shape = (samples, *weights.gather_assign.shape)
    dtype = wide(plan.compute)
    return x_BNC.new_zeros(shape, dtype=dtype), x_BNC.new_zeros(shape[:-1], dtype=dtype)


def _tiles(x_BNC: Tensor, offsets: Sequence[int] | None, weights: Weights, plan: Plan) -> Iterator[_Tile]:
    batch, nodes, channels = x_BNC.shape
    most = nodes_per_tile(x_BNC.device, channels + 2 * weights.reduce.shape[0] + 2 * plan.groups * sum(plan.latents))
    if offsets is not None:
        for sample, (first, last) in enumerate(pairwise(offsets)):
            for part in _cut(first, last, most):
                yield _Tile(slice(0, 1), part, slice(sample, sample + 1))
        return
    together = max(most // nodes, 1)
    for first in range(0, batch, together):
        rows = slice(first, min(first + together, batch))
        for part in _cut(0, nodes, most):
            yield _Tile(rows, part, rows)


def _cut(first: int, last: int, most: int) -> Iterator[slice]:
    """Pieces of equal length, of at most `most` nodes."""
    pieces = -(-(last - first) // most)
    length = -(-(last - first) // max(pieces, 1))
    return (slice(start, min(start + length, last)) for start in range(first, last, max(length, 1)))


def _reductions(weights: Weights, plan: Plan) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Matrix and shift, (R, C) and (R, 1), for gather and for scatter, in the type of the products."""
    reduce = weights.reduce
    if plan.compute == torch.float16:
        # Rows longer than 1 may take a sum over channels out of float16's range; unit length comes next anyway.
        reduce = reduce / torch.linalg.vector_norm(reduce[:, :-1], dim=1).amax().clamp_min(1)
    pairs = [
        (half[:, :-1].to(plan.compute).contiguous(), half[:, -1:].to(plan.compute))
        for half in reduce.chunk(1 if plan.symmetric else 2)
    ]
    return pairs[0], pairs[-1]


def _part(x_BNC: Tensor, mask_BN: Tensor | None, tile: _Tile, plan: Plan) -> _Part:
    x_sCT = x_BNC[tile.rows, tile.nodes].mT.to(plan.compute)
    if mask_BN is None:
        return _Part(x_sCT, None)
    valid_s1T = mask_BN[tile.rows, tile.nodes].unsqueeze(1)
    valid_E1T = valid_s1T.repeat_interleave(plan.groups, 0)
    return _Part(torch.where(valid_s1T, x_sCT, 0), valid_E1T)


def _per_graph(weight_Goi: Tensor, part: _Part, plan: Plan) -> Tensor:
    """A weight of each group for the graphs of a tile, (E, out, in), in the type of the products."""
    samples = part.x_sCT.shape[0]
    return weight_Goi.to(plan.compute).expand(samples, -1, -1, -1).flatten(0, 1)


def _of_samples(matrices: Tensor, tile: _Tile, part: _Part) -> Tensor:
    """The matrices of a tile's samples; one matrix may be everybody's."""
    return matrices.expand(part.x_sCT.shape[0], -1, -1) if matrices.shape[0] == 1 else matrices[tile.samples]


def _reduce(matrix_and_shift: tuple[Tensor, Tensor], part: _Part, plan: Plan) -> Tensor:
    """W x + shift, (E, r, T)."""
    matrix_RC, shift_R1 = matrix_and_shift
    x_sCT = part.x_sCT
    if x_sCT.shape[0] == 1:
        u_sRT = torch.addmm(shift_R1, matrix_RC, x_sCT[0]).unsqueeze(0)
    else:
        u_sRT = torch.baddbmm(shift_R1, matrix_RC.expand(x_sCT.shape[0], -1, -1), x_sCT)
    return u_sRT.view(-1, matrix_RC.shape[0] // plan.groups, u_sRT.shape[2])


def _product(left: Tensor, right: Tensor) -> Tensor:
    """A product for each graph or sample; a single one is not worth a batch."""
    if left.shape[0] == 1:
        return torch.mm(left[0], right[0]).unsqueeze(0)
    return torch.bmm(left, right)


def _add_product(base: Tensor | None, left: Tensor, right: Tensor, *, out: Tensor) -> None:
    """out = base + left @ right, in one pass over the result where the types agree."""
    if out.dtype != left.dtype:
        product = _product(left, right).to(out.dtype)
        out.copy_(product if base is None else product.add_(base))
    elif out.shape[0] > 1:
        if base is None:
            torch.bmm(left, right, out=out)
        else:
            torch.baddbmm(base, left, right, out=out)
    elif base is None:
        torch.mm(left[0], right[0], out=out[0])
    else:
        torch.addmm(base[0], left[0], right[0], out=out[0])


def _add_outer(total: Tensor, left: Tensor, right: Tensor) -> None:
    """total += left @ right^T over the nodes of a tile, for each graph or sample, in the wide type."""
    if total.dtype == left.dtype:
        if total.shape[0] == 1:
            total[0].addmm_(left[0], right[0].mT)
        else:
            total.baddbmm_(left, right.mT)
        return
    # Float16 overflows at sums over many nodes; 1 / sqrt(T) on both sides keeps them in range.
    scale = left.shape[-1] ** -0.5 if left.dtype == torch.float16 else 1.0
    total.add_(_product(left, right.mT if scale == 1.0 else (right * scale).mT).to(total.dtype), alpha=1 / scale)


def _add_outer_of_samples(total: Tensor, left: Tensor, right: Tensor) -> None:
    """`_add_outer` summed over samples as well."""
    for one_left, one_right in zip(left, right, strict=True):
        _add_outer(total.unsqueeze(0), one_left.unsqueeze(0), one_right.unsqueeze(0))


def _add_outer_of_groups(total_G: Tensor, left_E: Tensor, right_E: Tensor) -> None:
    """`_add_outer` for each group, summed over the samples of a tile."""
    groups = total_G.shape[0]
    for start in range(0, left_E.shape[0], groups):
        _add_outer(total_G, left_E[start : start + groups], right_E[start : start + groups])


def _squares(x: Tensor, dim: int) -> Tensor:
    x = x.to(wide(x.dtype))
    return (x * x).sum(dim)


def _inverse_length(x_EFT: Tensor) -> Tensor:
    """1 / length over channels, 0 for what has none: (E, 1, T) in the wide type."""
    # Several times as fast on a CPU as `vector_norm`, which is slow along any dimension but the last.
    squares_ET = _squares(x_EFT, dim=1)
    return torch.where(squares_ET > EPS**2, squares_ET.rsqrt(), 0).unsqueeze(1)


def _unit(u_ErT: Tensor, valid_E1T: Tensor | None, plan: Plan) -> _Unit:
    scale_E1T = _inverse_length(u_ErT)
    if valid_E1T is not None:
        scale_E1T = scale_E1T * valid_E1T
    return _Unit(_with_ones(u_ErT, scale_E1T, valid_E1T, plan), scale_E1T)


def _with_ones(x_EFT: Tensor, scale_E1T: Tensor, valid_E1T: Tensor | None, plan: Plan) -> Tensor:
    """x * scale with a row of ones below, or of zeros where nodes do not count."""
    graphs, features, nodes = x_EFT.shape
    y = x_EFT.new_empty((graphs, features + 1, nodes), dtype=plan.compute)
    torch.mul(x_EFT, scale_E1T, out=y[:, :-1])
    if valid_E1T is None:
        y[:, -1:].fill_(1)
    else:
        y[:, -1:].copy_(valid_E1T)
    return y


def _unit_backward(grad_EFT: Tensor, value_EFT: Tensor, scale_E1T: Tensor) -> Tensor:
    """From the gradient of columns of unit length to that of what they were."""
    grad_EFT = grad_EFT.to(scale_E1T.dtype)
    along_E1T = (grad_EFT * value_EFT).sum(1, keepdim=True)
    return torch.addcmul(grad_EFT, value_EFT.to(grad_EFT.dtype), along_E1T, value=-1).mul_(scale_E1T)


def _gather_assign(assign_EDr: Tensor, unit: _Unit, plan: Plan) -> Tensor:
    assign_EDT = _product(assign_EDr, unit.value).relu_()
    if plan.symmetric:
        for kernel in plan.kernels:
            assign_EDT[:, kernel].mul_(_inverse_length(assign_EDT[:, kernel]))
    return assign_EDT


def _gather_backward(
    unit: _Unit,
    weights: Weights,
    grads: Weights,
    grad_sums_EDr: Tensor,
    grad_squares_ED: Tensor,
    plan: Plan,
) -> Tensor:
    """The gradient of a tile's reduced channels, (E, r, T), from those of the sums; adds to that of the assignment."""
    latents = grad_sums_EDr.shape[1]
    samples = grad_sums_EDr.shape[0] // plan.groups
    assign_EDr = weights.gather_assign.to(plan.compute).expand(samples, -1, -1, -1).flatten(0, 1)
    # Assignments and their gradients come from one product, and go back through one.
    both_E2Dr = torch.cat([assign_EDr, grad_sums_EDr.to(plan.compute)], 1)
    both_E2DT = _product(both_E2Dr, unit.value)
    assign_EDT, grad_EDT = both_E2DT[:, :latents].relu_(), both_E2DT[:, latents:]
    if plan.symmetric:
        for kernel in plan.kernels:
            part, grad = assign_EDT[:, kernel], grad_EDT[:, kernel]
            scale_E1T = _inverse_length(part)
            part.mul_(scale_E1T)
            grad.copy_(_unit_backward(grad, part, scale_E1T))
    elif plan.node_scale == "published":
        grad_EDT.addcmul_(assign_EDT, 2 * grad_squares_ED.to(plan.compute).unsqueeze(2))
    grad_EDT.copy_(torch.where(assign_EDT > 0, grad_EDT, 0))
    _add_outer_of_groups(grads.gather_assign, grad_EDT, unit.value)
    other_ErD = torch.cat([grad_sums_EDr[:, :, :-1].to(plan.compute), assign_EDr[:, :, :-1]], 1).mT
    return _unit_backward(_product(other_ErD, both_E2DT), unit.value[:, :-1], unit.scale).to(plan.compute)


def _features(
    u_ErT: Tensor, part: _Part, weights: Weights, latents: list[Tensor], tile: _Tile, plan: Plan
) -> _Features:
    """Scatter: what the output of a tile is expanded from."""
    unit = _unit(u_ErT, part.valid_E1T, plan)
    assign_EDT = _product(_per_graph(weights.scatter_assign, part, plan), unit.value).relu_()
    parts = [assign_EDT[:, kernel] for kernel in plan.kernels]
    scales = [_inverse_length(assign_EkT) for assign_EkT in parts]
    samples, nodes = part.x_sCT.shape[0], assign_EDT.shape[2]
    ones = 1 if part.valid_E1T is None else part.valid_E1T[:: plan.groups, 0]
    if not plan.graph_conv:
        feature_sFT = assign_EDT.new_empty((samples, plan.groups * assign_EDT.shape[1] + 1, nodes))
        feature_sGDT = feature_sFT[:, :-1].unflatten(1, (plan.groups, -1))
        assigned = []
        for kernel, assign_EkT, scale_E1T in zip(plan.kernels, parts, scales, strict=True):
            target = feature_sGDT[:, :, kernel]
            torch.mul(assign_EkT.view(target.shape), scale_E1T.view(samples, plan.groups, 1, nodes), out=target)
            assigned.append(_Unit(target.reshape(assign_EkT.shape), scale_E1T))
        feature_sFT[:, -1] = ones
        return _Features(feature_sFT, unit, assigned)
    reduced = u_ErT.shape[1] * plan.groups
    feature_sFT = assign_EDT.new_empty((samples, len(parts) * reduced + 1, nodes))
    feature_sKGrT = feature_sFT[:, :-1].unflatten(1, (len(parts), plan.groups, -1))
    assigned = [
        _Unit(_with_ones(assign_EkT, scale_E1T, part.valid_E1T, plan), scale_E1T)
        for assign_EkT, scale_E1T in zip(parts, scales, strict=True)
    ]
    for index, (latent, one) in enumerate(zip(latents, assigned, strict=True)):
        convolved_ErT = _product(latent[tile.samples].flatten(0, 1).to(plan.compute), one.value)
        target = feature_sKGrT[:, index]
        torch.clamp_min(convolved_ErT.view(target.shape), 0, out=target)
    feature_sFT[:, -1] = ones
    return _Features(feature_sFT, unit, assigned)


def _features_backward(
    grad_sFT: Tensor,
    features: _Features,
    weights: Weights,
    grads: Weights,
    latents: list[Tensor],
    grad_latents: list[Tensor],
    tile: _Tile,
    plan: Plan,
) -> Tensor:
    """The gradient of a tile's reduced channels, (E, r, T); adds to those of the latents and of the assignment."""
    samples, _, nodes = grad_sFT.shape
    unit = features.unit
    grads_EkT = []
    if plan.graph_conv:
        grad_sFT = torch.where(features.feature[:, :-1] > 0, grad_sFT, 0)
        grad_KErT = grad_sFT.unflatten(1, (len(plan.latents), plan.groups, -1)).transpose(0, 1).flatten(1, 2)
        for latent, grad_latent, one, grad_ErT in zip(latents, grad_latents, features.assigned, grad_KErT, strict=True):
            _add_outer(grad_latent[tile.samples].flatten(0, 1), grad_ErT, one.value)
            latent_Erk = latent[tile.samples].flatten(0, 1)[:, :, :-1].to(plan.compute)
            grads_EkT.append(_unit_backward(_product(latent_Erk.mT, grad_ErT), one.value[:, :-1], one.scale))
    else:
        grad_EDT = grad_sFT.view(samples * plan.groups, -1, nodes)
        grads_EkT = [
            _unit_backward(grad_EDT[:, kernel], one.value, one.scale)
            for kernel, one in zip(plan.kernels, features.assigned, strict=True)
        ]
    positive = [
        torch.where(one.value[:, : grad.shape[1]] > 0, grad, 0).to(plan.compute)
        for one, grad in zip(features.assigned, grads_EkT, strict=True)
    ]
    grad_EDT = positive[0] if len(positive) == 1 else torch.cat(positive, 1)
    _add_outer_of_groups(grads.scatter_assign, grad_EDT, unit.value)
    assign_EDr = weights.scatter_assign[:, :, :-1].to(plan.compute).expand(samples, -1, -1, -1).flatten(0, 1)
    grad_ErT = _unit_backward(_product(assign_EDr.mT, grad_EDT), unit.value[:, :-1], unit.scale)
    return grad_ErT.to(plan.compute)


def _weight_inverse(sums_SGDr: Tensor, squares_SGD: Tensor, plan: Plan) -> Tensor | None:
    """What the latents' sums are multiplied by, (S, G, D, 1); ``None`` for nothing."""
    if plan.node_scale == "mean":
        return reciprocal(sums_SGDr[..., -1:])
    if plan.symmetric:
        return None
    return torch.where(squares_SGD > EPS**2, squares_SGD.rsqrt(), 0).unsqueeze(-1)


def _mixed(
    sums_SGDr: Tensor, squares_SGD: Tensor, graph_conv: Tensor | None, expand_CR: Tensor, plan: Plan
) -> tuple[list[Tensor], Tensor]:
    """Mix the latents, and move the graph convolution or the expansion onto them.

    Returns:
        With graph convolution, for each kernel the affine tensor (S, G, r, D_k + 1) that takes its assignments to
        convolved channels, and the expansion (1, C, K * R + 1). Without, nothing and the expansion (S, C, G * D + 1)
        from assignments.
    """
    inverse_SGD1 = _weight_inverse(sums_SGDr, squares_SGD, plan)
    value_SGDr = sums_SGDr[..., :-1] if inverse_SGD1 is None else sums_SGDr[..., :-1] * inverse_SGD1
    mixed = [mix(value_SGDr[:, :, kernel]) for kernel in plan.kernels]
    if graph_conv is not None:
        latents = [
            torch.cat([conv[..., :-1] @ one.mT, conv[..., -1:].expand(one.shape[0], -1, -1, -1)], -1)
            for conv, one in zip(graph_conv, mixed, strict=True)
        ]
        return latents, expand_CR.unsqueeze(0)
    expanded = [one @ expand.mT for one, expand in zip(mixed, _expand_of_kernels(expand_CR, plan), strict=True)]
    expand_SCF = torch.cat(expanded, 2).flatten(1, 2).mT
    shift_SC1 = expand_CR[:, -1:].expand(expand_SCF.shape[0], -1, -1)
    return [], torch.cat([expand_SCF, shift_SC1], 2)


def _expand_of_kernels(expand_CR: Tensor, plan: Plan) -> list[Tensor]:
    """The expansion's columns of each kernel, (G, C, r)."""
    kernels = len(plan.latents)
    return list(expand_CR[:, :-1].unflatten(1, (kernels, plan.groups, -1)).permute(1, 2, 0, 3))


def _mixed_backward(
    grad_latents: list[Tensor],
    grad_expand: Tensor,
    sums_SGDr: Tensor,
    squares_SGD: Tensor,
    weights: Weights,
    grads: Weights,
    plan: Plan,
) -> tuple[Tensor, Tensor]:
    """Gradients of the sums; sets those of the graph convolution and the expansion."""
    inverse_SGD1 = _weight_inverse(sums_SGDr, squares_SGD, plan)
    value_SGDr = sums_SGDr[..., :-1] if inverse_SGD1 is None else sums_SGDr[..., :-1] * inverse_SGD1
    grad_value_SGDr = torch.empty_like(value_SGDr)
    grads.expand[:, -1] = grad_expand[..., -1].sum(0)
    if weights.graph_conv is not None:
        grads.expand[:, :-1] = grad_expand[0, :, :-1]
    grad_SGDC = grad_expand[..., :-1].mT.unflatten(1, (plan.groups, -1)) if weights.graph_conv is None else None
    for index, kernel in enumerate(plan.kernels):
        value = value_SGDr[:, :, kernel]
        unit = l2(value, dim=-1)
        weight = affinity(value)
        if weights.graph_conv is not None and grads.graph_conv is not None:
            grad_matrix, conv = grad_latents[index], weights.graph_conv[index]
            grads.graph_conv[index, ..., :-1] = (grad_matrix[..., :-1] @ (weight @ value)).sum(0)
            grads.graph_conv[index, ..., -1] = grad_matrix[..., -1].sum(0)
            grad = grad_matrix[..., :-1].mT @ conv[..., :-1]
        else:
            assert grad_SGDC is not None
            grad_SGkC = grad_SGDC[:, :, kernel]
            expand_GCr, grad_GCr = (_expand_of_kernels(one, plan)[index] for one in (weights.expand, grads.expand))
            grad_GCr.copy_((grad_SGkC.mT @ (weight @ value)).sum(0))
            grad = grad_SGkC @ expand_GCr
        # mix: Y = A Z with A = softmax(z z^T), z = l2(Z).
        grad_weight = grad @ value.mT
        grad_logits = weight * (grad_weight - (weight * grad_weight).sum(-1, keepdim=True))
        grad_unit = (grad_logits + grad_logits.mT) @ unit
        along = (grad_unit * unit).sum(-1, keepdim=True)
        grad_value_SGDr[:, :, kernel] = weight.mT @ grad + (grad_unit - along * unit) * reciprocal(length(value, -1))
    if inverse_SGD1 is None:
        return torch.nn.functional.pad(grad_value_SGDr, (0, 1)), torch.zeros_like(squares_SGD)
    grad_inverse_SGD1 = (grad_value_SGDr * sums_SGDr[..., :-1]).sum(-1, keepdim=True)
    grad_sums_SGDr = grad_value_SGDr * inverse_SGD1
    if plan.node_scale == "mean":
        grad_ones_SGD1 = -grad_inverse_SGD1 * inverse_SGD1.square()
        return torch.cat([grad_sums_SGDr, grad_ones_SGD1], -1), torch.zeros_like(squares_SGD)
    grad_squares_SGD = -0.5 * (grad_inverse_SGD1 * inverse_SGD1.pow(3)).squeeze(-1)
    return torch.nn.functional.pad(grad_sums_SGDr, (0, 1)), grad_squares_SGD
