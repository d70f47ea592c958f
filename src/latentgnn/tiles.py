"""The layer over tiles of nodes, forward and backward; nothing of the nodes' size waits in between but the input.

This is the layer for norms that are affine maps (frozen or evaluation batch norm, or none), folded into the matrices.
The forward pass reads the input twice: to gather, and to scatter. The backward pass is arranged by hand: it reads the
input and the incoming gradient twice each, recomputes every tile, and needs only the latents' sums beyond the input.

A matrix and its shift are one *affine* tensor (out, in + 1) whose last column is the shift. It is applied to values
with a column of ones beside them, so that most shifts cost no pass of their own; where a node is masked out that
column has a zero, which takes the node out of everything that follows.

Scatter divides twice by a length, of a node's channels and of its assignments. Where the assignments have no shift
the second undoes the first, relu(s Psi W x) = s relu(Psi W x) for s > 0, and the first is left out. Where it saves
operations, scatter is then *direct*: reduction and assignment are one matrix Psi W, with as many rows as latents, and
the channels between them do not exist.

Axes: S samples, N nodes, C channels, R reduced channels, G groups, r = R / G, D latents of all kernels in a group,
K kernels, F features that the output is expanded from. In a tile: s samples, T nodes, E = s * G graphs. Nodes come
before channels, as logical axes of the input whatever its strides, and in memory inside a tile: products of many rows
by few columns keep the threads of a BLAS busier than those of few rows by many columns.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from latentgnn.errors import UserError
from latentgnn.functional import EPS, NodeScale, affinity, l2, length, mix, reciprocal, wide
from latentgnn.machine import nodes_per_tile, prefer_huge_pages, wants_triton

# A cache line, and a vector register of the widest kind.
_ROW_BYTES = 64
# From so many channels on, products that are added to the input are convolutions; so many numbers at once.
_MANY_CHANNELS = 2048
_CONVOLVED = 1 << 18


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
    """The layer's matrices, with every norm and gamma folded in: affine tensors in the wide type but for ``reduce``.

    Args:
        reduce: (R, C) of gather, and of scatter below it unless symmetric, in the type of the products; where scatter
            is direct, (G * D, C) of its reduction and assignment below it.
        reduce_shift: (R,), likewise.
        gather_assign: (G, D, r + 1).
        scatter_assign: likewise; if symmetric, the same tensor. Without the last column where nothing is shifted, and
            ``None`` where scatter is direct.
        graph_conv: (K, G, r, r + 1), or ``None``.
        expand: (C, K * R + 1).
    """

    reduce: Tensor
    reduce_shift: Tensor
    gather_assign: Tensor
    scatter_assign: Tensor | None
    graph_conv: Tensor | None
    expand: Tensor

    def of_gather(self, u_sTR: Tensor) -> Tensor:
        """The part of what ``reduce`` gives that gather starts from."""
        groups, _, width = self.gather_assign.shape
        return u_sTR[..., : groups * (width - 1)]

    def of_scatter(self, u_sTR: Tensor, plan: Plan) -> Tensor:
        """The part of what ``reduce`` gives that scatter starts from."""
        return u_sTR if plan.symmetric else u_sTR[..., self.of_gather(u_sTR).shape[-1] :]


class _Tile(NamedTuple):
    """Where a tile lies: rows and nodes of the input, and its samples among all."""

    rows: slice
    nodes: slice
    samples: slice


class _Part(NamedTuple):
    """A tile of the input: (s, T, C) in the type of the products, and which of its nodes count, (s, T, 1)."""

    x_sTC: Tensor
    valid_sT1: Tensor | None


class _Unit(NamedTuple):
    """Rows of unit length with a one after each, (E, T, F + 1), and what they were multiplied by, (E, T, 1)."""

    value: Tensor
    scale: Tensor


class _Features(NamedTuple):
    """How a tile's output comes about.

    Args:
        feature: what it is expanded from, with a column of ones, (s, T, F + 1).
        source: what assignments are made of, (E, T, r) or with ones (E, T, r + 1); ``None`` where scatter is direct.
        scale: what the source was multiplied by, (E, T, 1), where assignments are shifted.
        assigned: of each kernel, (E, T, D_k + 1); the ones are missing without graph convolution.
    """

    feature: Tensor
    source: Tensor | None
    scale: Tensor | None
    assigned: list[_Unit]


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
    sums_SGDr, squares_SGD = _zero_sums(x_BNC, offsets, weights, plan)
    fused = _triton_kernels(x_BNC.device, weights, plan)
    waiting = _gather(x_BNC, mask_BN, tiles, weights, sums_SGDr, squares_SGD, fused, plan)
    mixed = _mixed(sums_SGDr, squares_SGD, plan)
    latents = [_padded(latent, plan) for latent in _convolving(mixed, weights.graph_conv)]
    scatter_assign = _padded_or_none(weights.scatter_assign, plan)
    expand = weights.expand
    del weights  # before the output is made: where channels are many and nodes few, the reduction counts
    if plan.graph_conv:
        as_convolution = plan.residual and convolves(expand.mT.unsqueeze(0), x_BNC)
        expand = (expand.to(plan.compute).contiguous() if as_convolution else _padded(expand, plan)).unsqueeze(0)
    out_BNC = prefer_huge_pages(like_input(x_BNC))
    expand_sCF, samples = expand, None
    for tile in reversed(tiles):  # what was read last may still be in a cache
        x_sTC, out_sTC = x_BNC[tile.rows, tile.nodes], out_BNC[tile.rows, tile.nodes]
        part = _Part(x_sTC, _valid_nodes(mask_BN, tile))
        if not plan.graph_conv and tile.samples != samples:
            # Of all samples at once, they could be a good part of the input's size.
            samples = tile.samples
            del expand_sCF
            expand_sCF = _expanding([one_SGkr[samples] for one_SGkr in mixed], expand, plan)
        if fused is None:
            feature_sTF = _features(waiting.pop(), part, scatter_assign, latents, tile, plan, keep=False).feature
        else:
            of_tile = [latent[tile.samples] for latent in latents]
            feature_sTF = fused.scatter(waiting.pop(), part.valid_sT1, scatter_assign, of_tile, plan)
        expand_sFC = expand_sCF.expand(feature_sTF.shape[0], -1, -1).mT
        _add_product(x_sTC if plan.residual else None, feature_sTF, expand_sFC, out=out_sTC, most=_CONVOLVED)
        if part.valid_sT1 is not None and not plan.residual:
            out_sTC.copy_(torch.where(part.valid_sT1, out_sTC, x_sTC))
        del feature_sTF, expand_sFC  # before the next tile's
    return out_BNC, sums_SGDr, squares_SGD


def _gather(
    x_BNC: Tensor,
    mask_BN: Tensor | None,
    tiles: Sequence[_Tile],
    weights: Weights,
    sums_SGDr: Tensor,
    squares_SGD: Tensor,
    fused: ModuleType | None,
    plan: Plan,
) -> list[Tensor]:
    """Add every tile to the sums of values and of ones and to those of squared assignments.

    Returns:
        What scatter starts from, of every tile: it comes from the same product as what gather starts from, and waits.
    """
    gather_assign = _padded(weights.gather_assign, plan)
    waiting: list[Tensor] = []
    for tile in tiles:
        part = _part(x_BNC, mask_BN, tile, plan)
        u_sTR = _reduce(weights, part)
        waiting.append(weights.of_scatter(u_sTR, plan).contiguous())
        if fused is not None:
            sums_sGDr, squares_sGD = sums_SGDr[tile.samples], squares_SGD[tile.samples]
            fused.gather(weights.of_gather(u_sTR), part.valid_sT1, gather_assign, sums_sGDr, squares_sGD, plan)
            continue
        unit = _unit(weights.of_gather(u_sTR), part, plan)
        assign_ETD = _apply(unit.value, _of_graphs(gather_assign, part)).relu_()
        if plan.symmetric:
            for kernel in plan.kernels:
                assign_ETD[..., kernel].mul_(_inverse_length(assign_ETD[..., kernel]))
        else:
            squares_SGD[tile.samples].flatten(0, 1).add_(_column_squares(assign_ETD))
        _add_outer(sums_SGDr[tile.samples].flatten(0, 1), assign_ETD, unit.value)
    return waiting


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
    gather_assign, scatter_assign = _padded(weights.gather_assign, plan), _padded_or_none(weights.scatter_assign, plan)
    mixed = _mixed(sums_SGDr, squares_SGD, plan)
    latents = [_padded(latent, plan) for latent in _convolving(mixed, weights.graph_conv)]
    if plan.graph_conv:
        expand_SCF = _padded(weights.expand, plan).unsqueeze(0)
    else:
        expand_SCF = _expanding(mixed, weights.expand, plan)
    grad_gather_assign = torch.zeros_like(weights.gather_assign)
    grad_scatter_assign = None if weights.scatter_assign is None else torch.zeros_like(weights.scatter_assign)
    grad_latents = [_zeros_padded(latent.shape, sums_SGDr) for latent in latents]
    grad_expand_SCF = _zeros_padded(expand_SCF.shape, sums_SGDr)

    # From the output to the latents. For each tile, what gather starts from and the gradient of what scatter starts
    # from wait side by side.
    waiting: list[Tensor] = []
    for tile in tiles:
        part = _part(x_BNC, mask_BN, tile, plan)
        u_sTR = _reduce(weights, part)
        features = _features(weights.of_scatter(u_sTR, plan), part, scatter_assign, latents, tile, plan)
        grad_sTC = grad_BNC[tile.rows, tile.nodes].to(plan.compute)
        if part.valid_sT1 is not None:
            grad_sTC = torch.where(part.valid_sT1, grad_sTC, 0)
        if expand_SCF.shape[0] == 1:
            _add_outer_of_samples(grad_expand_SCF[0], grad_sTC, features.feature)
        else:
            _add_outer(grad_expand_SCF[tile.samples], grad_sTC, features.feature)
        grad_sTF = _apply(grad_sTC, _of_samples(expand_SCF, tile, part)[..., :-1].mT)
        grad_ETF = _features_backward(
            grad_sTF, features, part, scatter_assign, grad_scatter_assign, latents, grad_latents, tile, plan
        )
        if plan.symmetric:
            both_sTR = torch.cat([u_sTR, u_sTR], -1)
            grad_sTR = both_sTR[..., u_sTR.shape[-1] :]
        else:
            both_sTR, grad_sTR = u_sTR, weights.of_scatter(u_sTR, plan)
        _to_graphs(grad_sTR, plan).copy_(grad_ETF.unflatten(0, (-1, plan.groups)))
        waiting.append(both_sTR)

    grad_sums_SGDr, grad_squares_SGD, grad_conv, grad_expand = _mixed_backward(
        grad_latents, grad_expand_SCF, sums_SGDr, squares_SGD, weights, plan
    )

    # From the latents to the input, both ways at once.
    grad_reduce = torch.zeros_like(weights.reduce, dtype=sums_SGDr.dtype)
    grad_shift = torch.zeros_like(weights.reduce_shift, dtype=sums_SGDr.dtype)
    grad_x_BNC = prefer_huge_pages(like_input(x_BNC)) if needs_x else None
    for tile, u_sTR in zip(tiles, waiting, strict=True):
        part = _part(x_BNC, mask_BN, tile, plan)
        of_gather_sTR = weights.of_gather(u_sTR)
        unit = _unit(of_gather_sTR, part, plan)
        grad_ETr = _gather_backward(
            unit,
            _of_graphs(gather_assign, part),
            grad_gather_assign,
            grad_sums_SGDr[tile.samples].flatten(0, 1),
            grad_squares_SGD[tile.samples].flatten(0, 1),
            plan,
        )
        _to_graphs(of_gather_sTR, plan).copy_(grad_ETr.unflatten(0, (-1, plan.groups)))
        grad_sTR = of_gather_sTR + u_sTR[..., of_gather_sTR.shape[-1] :] if plan.symmetric else u_sTR
        _add_outer_of_samples(grad_reduce, grad_sTR, part.x_sTC)
        grad_shift += grad_sTR.sum((0, 1), dtype=grad_shift.dtype)
        if grad_x_BNC is not None:
            base_sTC, out_sTC = grad_BNC[tile.rows, tile.nodes], grad_x_BNC[tile.rows, tile.nodes]
            weight_sRC = weights.reduce.expand(grad_sTR.shape[0], -1, -1)
            _add_product(base_sTC if plan.residual else None, grad_sTR, weight_sRC, out=out_sTC)
            if part.valid_sT1 is not None and not plan.residual:
                out_sTC.copy_(torch.where(part.valid_sT1, out_sTC, base_sTC))
    if plan.symmetric and grad_scatter_assign is not None:
        # One tensor took part twice.
        grad_gather_assign += grad_scatter_assign
    return grad_x_BNC, Weights(grad_reduce, grad_shift, grad_gather_assign, grad_scatter_assign, grad_conv, grad_expand)


def _triton_kernels(device: torch.device, weights: Weights, plan: Plan) -> ModuleType | None:
    """The kernels of the forward pass, where they are asked for and know the layer."""
    if not wants_triton(device):
        return None
    try:
        from latentgnn import triton_kernels
    except ModuleNotFoundError as error:
        if error.name != "triton":
            raise
        raise UserError("LATENTGNN_TRITON=1 needs Triton, which is not installed: pip install triton") from None
    return triton_kernels if triton_kernels.takes(weights, plan) else None


def like_input(x_BNC: Tensor) -> Tensor:
    """Memory for the output, with nodes or channels innermost as in the input."""
    if x_BNC.stride(-1) == 1:
        return x_BNC.new_empty(x_BNC.shape)
    return x_BNC.new_empty(x_BNC.mT.shape).mT


def _zero_sums(x_BNC: Tensor, offsets: Sequence[int] | None, weights: Weights, plan: Plan) -> tuple[Tensor, Tensor]:
    samples = x_BNC.shape[0] if offsets is None else len(offsets) - 1
    shape = (samples, *weights.gather_assign.shape)
    dtype = wide(plan.compute)
    return x_BNC.new_zeros(shape, dtype=dtype), x_BNC.new_zeros(shape[:-1], dtype=dtype)


def _tiles(x_BNC: Tensor, offsets: Sequence[int] | None, weights: Weights, plan: Plan) -> Iterator[_Tile]:
    batch, nodes, _ = x_BNC.shape
    reduced, latents = weights.expand.shape[1] - 1, plan.groups * sum(plan.latents)
    most = nodes_per_tile(x_BNC.device, 3 * reduced + 2 * latents)
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


def rows(shape: Sequence[int], like: Tensor, dtype: torch.dtype) -> Tensor:
    """Memory whose rows begin where vector instructions want them: odd rows slow products by up to a quarter."""
    step = _ROW_BYTES // dtype.itemsize
    return like.new_empty((*shape[:-1], -(-shape[-1] // step) * step), dtype=dtype)[..., : shape[-1]]


def _padded(matrix: Tensor, plan: Plan) -> Tensor:
    """The matrix for products: a copy, unless it is of the right kind."""
    if matrix.dtype == plan.compute and matrix.stride(-2) * matrix.element_size() % _ROW_BYTES == 0:
        return matrix
    return rows(matrix.shape, matrix, plan.compute).copy_(matrix)


def _padded_or_none(matrix: Tensor | None, plan: Plan) -> Tensor | None:
    return None if matrix is None else _padded(matrix, plan)


def _zeros_padded(shape: Sequence[int], like: Tensor) -> Tensor:
    return rows(shape, like, like.dtype).zero_()


def _part(x_BNC: Tensor, mask_BN: Tensor | None, tile: _Tile, plan: Plan) -> _Part:
    x_sTC, valid_sT1 = x_BNC[tile.rows, tile.nodes].to(plan.compute), _valid_nodes(mask_BN, tile)
    return _Part(x_sTC if valid_sT1 is None else torch.where(valid_sT1, x_sTC, 0), valid_sT1)


def _valid_nodes(mask_BN: Tensor | None, tile: _Tile) -> Tensor | None:
    return None if mask_BN is None else mask_BN[tile.rows, tile.nodes].unsqueeze(-1)


def _of_graphs(weight_Goi: Tensor, part: _Part) -> Tensor:
    """A weight of each group for the graphs of a tile, (E, out, in)."""
    samples = part.x_sTC.shape[0]
    return weight_Goi if samples == 1 else weight_Goi.repeat(samples, 1, 1)


def _of_samples(matrices_S: Tensor, tile: _Tile, part: _Part) -> Tensor:
    """The matrices of a tile's samples; one matrix may be everybody's."""
    if matrices_S.shape[0] == 1:
        return matrices_S.expand(part.x_sTC.shape[0], -1, -1)
    return matrices_S[tile.samples]


def _to_graphs(x_sTR: Tensor, plan: Plan) -> Tensor:
    """A view (s, T, G * r) as (s, G, T, r): a group is one more graph."""
    return x_sTR.unflatten(-1, (plan.groups, -1)).transpose(1, 2)


def _apply(x_ETi: Tensor, weight_Eoi: Tensor) -> Tensor:
    """x W^T for each graph or sample; a single one is not worth a batch."""
    if x_ETi.shape[0] == 1:
        return torch.mm(x_ETi[0], weight_Eoi[0].mT).unsqueeze(0)
    return torch.bmm(x_ETi, weight_Eoi.mT)


def _reduce(weights: Weights, part: _Part) -> Tensor:
    """W x + shift, (s, T, R)."""
    x_sTC, weight_CR = part.x_sTC, weights.reduce.mT
    if x_sTC.shape[0] == 1:
        return torch.addmm(weights.reduce_shift, x_sTC[0], weight_CR).unsqueeze(0)
    return torch.baddbmm(weights.reduce_shift, x_sTC, weight_CR.expand(x_sTC.shape[0], -1, -1))


def _add_product(base: Tensor | None, left: Tensor, right: Tensor, *, out: Tensor, most: int | None = None) -> None:
    """out = base + left @ right, in one pass over the result where the types agree.

    A convolution of at most ``most`` numbers at once needs less memory, and no more time while ``left`` is narrow.
    """
    if out.dtype != left.dtype:
        product = torch.matmul(left, right).to(out.dtype)
        out.copy_(product if base is None else product.add_(base))
    elif base is not None and convolves(right, out):
        # A 1x1 convolution into memory of its own, and an addition: oneDNN is at its peak there, and a product that
        # adds to rows far apart is not, by a third.
        weight = right[0].mT.unsqueeze(-1)
        nodes = out.shape[1] if most is None else max(most // (out.shape[0] * out.shape[2]), 1)
        for part in _cut(0, out.shape[1], nodes):
            torch.add(base[:, part].mT, torch.conv1d(left[:, part].mT, weight), out=out[:, part].mT)
    elif out.shape[0] > 1:
        if base is None:
            torch.bmm(left, right, out=out)
        else:
            torch.baddbmm(base, left, right, out=out)
    elif base is None:
        torch.mm(left[0], right[0], out=out[0])
    else:
        torch.addmm(base[0], left[0], right[0], out=out[0])


def convolves(right: Tensor, out: Tensor) -> bool:
    """Whether a product is better a convolution, as measured: on a CPU, many channels, with nodes innermost."""
    many = out.device.type == "cpu" and out.dtype == torch.float32 and out.shape[-1] >= _MANY_CHANNELS
    shared = right.shape[0] == 1 or right.stride(0) == 0
    return many and shared and out.stride(-2) == 1 and torch.backends.mkldnn.is_available()


def _add_outer(total_EFK: Tensor, left_ETF: Tensor, right_ETK: Tensor) -> None:
    """total += left^T right over the nodes of a tile, for each graph or sample, in the wide type."""
    if total_EFK.dtype != left_ETF.dtype:
        # Float16 overflows at sums over many nodes; 1 / sqrt(T) keeps them in range.
        scale = left_ETF.shape[1] ** -0.5 if left_ETF.dtype == torch.float16 else 1.0
        right_ETK = right_ETK if scale == 1.0 else right_ETK * scale
        total_EFK.add_(torch.bmm(left_ETF.mT, right_ETK).to(total_EFK.dtype), alpha=1 / scale)
    elif total_EFK.shape[0] == 1:
        torch.addmm(total_EFK[0], left_ETF[0].mT, right_ETK[0], out=total_EFK[0])
    else:
        torch.baddbmm(total_EFK, left_ETF.mT, right_ETK, out=total_EFK)


def _add_outer_of_samples(total_FK: Tensor, left_sTF: Tensor, right_sTK: Tensor) -> None:
    """`_add_outer` summed over the samples of a tile."""
    _add_outer_of_groups(total_FK.unsqueeze(0), left_sTF, right_sTK)


def _add_outer_of_groups(total_GFK: Tensor, left_ETF: Tensor, right_ETK: Tensor) -> None:
    """`_add_outer` for each group, summed over the samples of a tile."""
    for left_GTF, right_GTK in zip(
        left_ETF.split(total_GFK.shape[0]), right_ETK.split(total_GFK.shape[0]), strict=True
    ):
        _add_outer(total_GFK, left_GTF, right_GTK)


def _column_squares(x_ETF: Tensor) -> Tensor:
    """Sums of squares over nodes, (E, F)."""
    x_ETF = x_ETF.to(wide(x_ETF.dtype))
    # A product with ones: several times as fast on a CPU as a sum over any dimension but the last.
    return torch.matmul(x_ETF.new_ones((1, x_ETF.shape[1])), x_ETF * x_ETF).squeeze(1)


def _inverse_length(x_ETF: Tensor) -> Tensor:
    """1 / length of each row, 0 for what has none: (E, T, 1) in the wide type."""
    x_ETF = x_ETF.to(wide(x_ETF.dtype))
    squares_ET1 = (x_ETF * x_ETF).sum(-1, keepdim=True)
    return torch.where(squares_ET1 > EPS**2, squares_ET1.rsqrt(), 0)


def _unit(u_sTR: Tensor, part: _Part, plan: Plan) -> _Unit:
    u_ETr = _to_graphs(u_sTR, plan).flatten(0, 1)
    scale_ET1 = _inverse_length(u_ETr)
    valid_ET1 = _valid(part, plan)
    if valid_ET1 is not None:
        scale_ET1 = scale_ET1 * valid_ET1
    return _Unit(_with_ones(u_ETr, scale_ET1, valid_ET1, plan), scale_ET1)


def _valid(part: _Part, plan: Plan) -> Tensor | None:
    """Which nodes count, for each graph: (E, T, 1)."""
    return None if part.valid_sT1 is None else part.valid_sT1.repeat_interleave(plan.groups, 0)


def _with_ones(x_ETF: Tensor, scale_ET1: Tensor, valid_ET1: Tensor | None, plan: Plan) -> Tensor:
    """x * scale with a column of ones, or of zeros where nodes do not count."""
    graphs, nodes, features = x_ETF.shape
    y = rows((graphs, nodes, features + 1), x_ETF, plan.compute)
    torch.mul(x_ETF, scale_ET1, out=y[..., :-1])
    _fill_ones(y, valid_ET1)
    return y


def _fill_ones(x_ETF: Tensor, valid_ET1: Tensor | None) -> None:
    if valid_ET1 is None:
        x_ETF[..., -1].fill_(1)
    else:
        x_ETF[..., -1:].copy_(valid_ET1)


def _unit_backward(grad_ETF: Tensor, value_ETF: Tensor, scale_ET1: Tensor) -> Tensor:
    """From the gradient of rows of unit length to that of what they were."""
    grad_ETF, value_ETF = grad_ETF.to(scale_ET1.dtype), value_ETF.to(scale_ET1.dtype)
    along_ET1 = (grad_ETF * value_ETF).sum(-1, keepdim=True)
    return torch.addcmul(grad_ETF, value_ETF, along_ET1, value=-1).mul_(scale_ET1)


def _rectifier_backward_(grad: Tensor, value: Tensor) -> Tensor:
    """Zero the gradient in place where a ReLU gave zero."""
    # Twenty times as fast on a CPU as `masked_fill_` or `where` with a comparison.
    return torch.ops.aten.threshold_backward.grad_input(grad, value, 0, grad_input=grad)


def _gather_backward(
    unit: _Unit,
    assign_EDr: Tensor,
    grad_assign_GDr: Tensor,
    grad_sums_EDr: Tensor,
    grad_squares_ED: Tensor,
    plan: Plan,
) -> Tensor:
    """The gradient of a tile's reduced channels, (E, T, r), from those of the sums; adds to that of the assignment."""
    latents = assign_EDr.shape[1]
    # Assignments and their gradients come from one product, and go back through one.
    both_ETD = _apply(unit.value, torch.cat([assign_EDr, grad_sums_EDr.to(plan.compute)], 1))
    assign_ETD, grad_ETD = both_ETD[..., :latents].relu_(), both_ETD[..., latents:]
    if plan.symmetric:
        for kernel in plan.kernels:
            part_ETk, grad_ETk = assign_ETD[..., kernel], grad_ETD[..., kernel]
            scale_ET1 = _inverse_length(part_ETk)
            part_ETk.mul_(scale_ET1)
            grad_ETk.copy_(_unit_backward(grad_ETk, part_ETk, scale_ET1))
    elif plan.node_scale == "published":
        grad_ETD.addcmul_(assign_ETD, 2 * grad_squares_ED.to(plan.compute).unsqueeze(1))
    _rectifier_backward_(grad_ETD, assign_ETD)
    _add_outer_of_groups(grad_assign_GDr, grad_ETD, unit.value)
    back_ErD = torch.cat([grad_sums_EDr[..., :-1].to(plan.compute), assign_EDr[..., :-1]], 1).mT
    return _unit_backward(_apply(both_ETD, back_ErD), unit.value[..., :-1], unit.scale)


def _features(
    u_sTR: Tensor,
    part: _Part,
    assign_GDr: Tensor | None,
    latents: list[Tensor],
    tile: _Tile,
    plan: Plan,
    *,
    keep: bool = True,
) -> _Features:
    """Scatter: what the output of a tile is expanded from, and what its backward pass needs if that is to be kept."""
    samples, nodes, _ = part.x_sTC.shape
    valid_ET1 = _valid(part, plan)
    if assign_GDr is None:
        # In place: whoever has u has no more use for it.
        source, scale, assign_ETD = None, None, _to_graphs(u_sTR, plan).flatten(0, 1).relu_()
    else:
        source, scale = _to_graphs(u_sTR, plan).flatten(0, 1), None
        if assign_GDr.shape[2] > source.shape[2]:
            source, scale = _unit(u_sTR, part, plan)
        assign_ETD = _apply(source, _of_graphs(assign_GDr, part)).relu_()
        source = source if keep else None
    del u_sTR
    parts = [assign_ETD[..., kernel] for kernel in plan.kernels]
    scales = [_inverse_length(part_ETk) for part_ETk in parts]
    if scale is None and valid_ET1 is not None:
        scales = [scale_ET1 * valid_ET1 for scale_ET1 in scales]
    width = sum(latent.shape[1] * latent.shape[2] for latent in latents) or plan.groups * assign_ETD.shape[2]
    assigned = []
    if plan.graph_conv:
        for part_ETk, scale_ET1 in zip(parts, scales, strict=True):
            assigned.append(_Unit(_with_ones(part_ETk, scale_ET1, valid_ET1, plan), scale_ET1))
        del assign_ETD, parts, part_ETk
    feature_sTF = rows((samples, nodes, width + 1), part.x_sTC, plan.compute)
    _fill_ones(feature_sTF, part.valid_sT1)
    if plan.graph_conv:
        for one, latent, target_sTr in zip(
            assigned, latents, feature_sTF[..., :-1].chunk(len(latents), -1), strict=True
        ):
            convolved_ETr = _apply(one.value, latent[tile.samples].flatten(0, 1))
            target_sGTr = _to_graphs(target_sTr, plan)
            torch.clamp_min(convolved_ETr.view(target_sGTr.shape), 0, out=target_sGTr)
    else:
        feature_sGTD = _to_graphs(feature_sTF[..., :-1], plan)
        for kernel, part_ETk, scale_ET1 in zip(plan.kernels, parts, scales, strict=True):
            target_sGTk = feature_sGTD[..., kernel]
            shape = target_sGTk.shape[:2]
            torch.mul(part_ETk.unflatten(0, shape), scale_ET1.unflatten(0, shape), out=target_sGTk)
            assigned.append(_Unit(target_sGTk.flatten(0, 1), scale_ET1))
    return _Features(feature_sTF, source, scale, assigned)


def _features_backward(
    grad_sTF: Tensor,
    features: _Features,
    part: _Part,
    assign_GDr: Tensor | None,
    grad_assign_GDr: Tensor | None,
    latents: list[Tensor],
    grad_latents: list[Tensor],
    tile: _Tile,
    plan: Plan,
) -> Tensor:
    """The gradient of what scatter started from; adds to those of the latents and of the assignment.

    (E, T, r), or (E, T, D) where scatter is direct.
    """
    source, kernels = features.source, len(plan.latents)
    if plan.graph_conv:
        _rectifier_backward_(grad_sTF, features.feature[..., :-1])
        grads_ETk = []
        for index, (latent, grad_latent, one) in enumerate(zip(latents, grad_latents, features.assigned, strict=True)):
            grad_ETr = _to_graphs(grad_sTF.chunk(kernels, -1)[index], plan).flatten(0, 1)
            _add_outer(grad_latent[tile.samples].flatten(0, 1), grad_ETr, one.value)
            grads_ETk.append(_apply(grad_ETr, latent[tile.samples].flatten(0, 1)[..., :-1].mT))
    else:
        grad_ETD = _to_graphs(grad_sTF, plan).flatten(0, 1)
        grads_ETk = [grad_ETD[..., kernel] for kernel in plan.kernels]
    before = []
    for grad_ETk, one in zip(grads_ETk, features.assigned, strict=True):
        value_ETk = one.value[..., : grad_ETk.shape[2]]
        grad_ETk = _unit_backward(grad_ETk, value_ETk, one.scale)
        before.append(_rectifier_backward_(grad_ETk.to(plan.compute), value_ETk))
    grad_ETD = before[0] if kernels == 1 else torch.cat(before, -1)
    if source is None or assign_GDr is None or grad_assign_GDr is None:
        return grad_ETD
    _add_outer_of_groups(grad_assign_GDr, grad_ETD, source)
    back_ErD = _of_graphs(assign_GDr, part).mT
    if features.scale is None:
        return _apply(grad_ETD, back_ErD)
    return _unit_backward(_apply(grad_ETD, back_ErD[:, :-1]), source[..., :-1], features.scale).to(plan.compute)


def _weight_inverse(sums_SGDr: Tensor, squares_SGD: Tensor, plan: Plan) -> Tensor | None:
    """What the latents' sums are multiplied by, (S, G, D, 1); ``None`` for nothing."""
    if plan.node_scale == "mean":
        return reciprocal(sums_SGDr[..., -1:])
    if plan.symmetric:
        return None
    return torch.where(squares_SGD > EPS**2, squares_SGD.rsqrt(), 0).unsqueeze(-1)


def _mixed(sums_SGDr: Tensor, squares_SGD: Tensor, plan: Plan) -> list[Tensor]:
    """Mixed latents of each kernel, (S, G, D_k, r)."""
    inverse_SGD1 = _weight_inverse(sums_SGDr, squares_SGD, plan)
    value_SGDr = sums_SGDr[..., :-1] if inverse_SGD1 is None else sums_SGDr[..., :-1] * inverse_SGD1
    return [mix(value_SGDr[:, :, kernel]) for kernel in plan.kernels]


def _convolving(mixed: list[Tensor], graph_conv: Tensor | None) -> list[Tensor]:
    """Graph convolution moved onto the latents, if there is one.

    For each kernel, the affine tensor (S, G, r, D_k + 1) that takes its assignments to convolved channels.
    """
    if graph_conv is None:
        return []
    return [
        torch.cat([conv[..., :-1] @ one.mT, conv[..., -1:].expand(one.shape[0], -1, -1, -1)], -1)
        for conv, one in zip(graph_conv, mixed, strict=True)
    ]


def _expanding(mixed: list[Tensor], expand_CR: Tensor, plan: Plan) -> Tensor:
    """The expansion moved onto the latents: affine tensors (S, C, G * D + 1) that assignments are expanded by."""
    samples, groups = mixed[0].shape[:2]
    every = sum(plan.latents)
    expand_SCF = rows((samples, expand_CR.shape[0], groups * every + 1), expand_CR, plan.compute)
    expand_SCF[..., -1] = expand_CR[:, -1]
    expand_SGCD = expand_SCF[..., :-1].unflatten(2, (groups, every)).transpose(1, 2)
    for kernel, one, expand_GCr in zip(plan.kernels, mixed, _expand_of_kernels(expand_CR, plan), strict=True):
        if expand_SCF.dtype != expand_CR.dtype:
            expand_SGCD[..., kernel] = expand_GCr @ one.mT
            continue
        for expand_GCD, one_GDr in zip(expand_SGCD, one, strict=True):
            for expand_CD, expand_Cr, one_Dr in zip(expand_GCD, expand_GCr, one_GDr, strict=True):
                torch.mm(expand_Cr, one_Dr.mT, out=expand_CD[:, kernel])
    return expand_SCF


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
    plan: Plan,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    """Gradients of the sums, of the graph convolution and of the expansion."""
    grad_conv = None if weights.graph_conv is None else torch.empty_like(weights.graph_conv)
    grad_expand_CR = torch.empty_like(weights.expand)
    inverse_SGD1 = _weight_inverse(sums_SGDr, squares_SGD, plan)
    value_SGDr = sums_SGDr[..., :-1] if inverse_SGD1 is None else sums_SGDr[..., :-1] * inverse_SGD1
    grad_value_SGDr = torch.empty_like(value_SGDr)
    grad_expand_CR[:, -1] = grad_expand[..., -1].sum(0)
    if weights.graph_conv is not None:
        grad_expand_CR[:, :-1] = grad_expand[0, :, :-1]
    grad_SGDC = grad_expand[..., :-1].mT.unflatten(1, (plan.groups, -1)) if weights.graph_conv is None else None
    for index, kernel in enumerate(plan.kernels):
        value = value_SGDr[:, :, kernel]
        unit = l2(value, dim=-1)
        weight = affinity(value)
        if weights.graph_conv is not None and grad_conv is not None:
            grad_matrix, conv = grad_latents[index], weights.graph_conv[index]
            grad_conv[index, ..., :-1] = (grad_matrix[..., :-1] @ (weight @ value)).sum(0)
            grad_conv[index, ..., -1] = grad_matrix[..., -1].sum(0)
            grad = grad_matrix[..., :-1].mT @ conv[..., :-1]
        else:
            assert grad_SGDC is not None
            grad_SGkC = grad_SGDC[:, :, kernel]
            expand_GCr, grad_GCr = (_expand_of_kernels(one, plan)[index] for one in (weights.expand, grad_expand_CR))
            grad_GCr.copy_((grad_SGkC.mT @ (weight @ value)).sum(0))
            grad = grad_SGkC @ expand_GCr
        # mix: Y = A Z with A = softmax(z z^T), z = l2(Z).
        grad_weight = grad @ value.mT
        grad_logits = weight * (grad_weight - (weight * grad_weight).sum(-1, keepdim=True))
        grad_unit = (grad_logits + grad_logits.mT) @ unit
        along = (grad_unit * unit).sum(-1, keepdim=True)
        grad_value_SGDr[:, :, kernel] = weight.mT @ grad + (grad_unit - along * unit) * reciprocal(length(value, -1))
    if inverse_SGD1 is None:
        grad_sums_SGDr = torch.nn.functional.pad(grad_value_SGDr, (0, 1))
        return grad_sums_SGDr, torch.zeros_like(squares_SGD), grad_conv, grad_expand_CR
    grad_inverse_SGD1 = (grad_value_SGDr * sums_SGDr[..., :-1]).sum(-1, keepdim=True)
    grad_sums_SGDr = grad_value_SGDr * inverse_SGD1
    if plan.node_scale == "mean":
        grad_ones_SGD1 = -grad_inverse_SGD1 * inverse_SGD1.square()
        grad_sums_SGDr = torch.cat([grad_sums_SGDr, grad_ones_SGD1], -1)
        return grad_sums_SGDr, torch.zeros_like(squares_SGD), grad_conv, grad_expand_CR
    grad_squares_SGD = -0.5 * (grad_inverse_SGD1 * inverse_SGD1.pow(3)).squeeze(-1)
    return torch.nn.functional.pad(grad_sums_SGDr, (0, 1)), grad_squares_SGD, grad_conv, grad_expand_CR
