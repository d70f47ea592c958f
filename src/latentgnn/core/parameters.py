"""A layer's parameters, in the form that the core multiplies by.

Axes: C channels, R reduced channels, G groups, r = R / G, D latents of all kernels in a group, K kernels, F features
that the output is expanded from (K * R).
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

from torch import Tensor

from latentgnn.by_size import scaling_pays
from latentgnn.core.layouts import cat
from latentgnn.core.plan import Plan
from latentgnn.norms import affines
from latentgnn.numerics import to_dtype, wide
from latentgnn.projections import NormedMatrix


class Parts(NamedTuple):
    """All projections of a layer, by their place; ``assigns`` of each way, then of each kernel."""

    reduces: Sequence[NormedMatrix]
    assigns: Sequence[Sequence[NormedMatrix]]
    convs: Sequence[NormedMatrix]
    expand: NormedMatrix
    gamma: Tensor | None

    @classmethod
    def of(cls, tensors: Sequence[Tensor | None], plan: Plan) -> "Parts":
        """From what `latentgnn.projections.Arrangement.flat` gives."""
        normed = NormedMatrix.each(tensors[:-1])
        ways, kernels = plan.ways, len(plan.latents)
        assigns = [normed[ways + way * kernels : ways + (way + 1) * kernels] for way in range(ways)]
        return cls(normed[:ways], assigns, normed[ways + ways * kernels : -1], normed[-1], tensors[-1])


class Matrices(NamedTuple):
    """The matrices that the core multiplies by, and their shifts, in the wide dtype.

    Affine norms and gamma are folded in; weights and biases of other norms are in `Vectors`.

    Args:
        reduces: (R, C) of each way, unscaled like the expansion: they are large, and `for_nodes` decides whether to
            scale them or their outputs.
        reduce_scale: (ways * R,), or ``None`` for ones; below, ``None`` means ones or zeros too.
        reduce_shift: (ways * R,).
        assigns: (G, D, r) of each way.
        assign_shifts: (G * D,) of each way.
        convs: (G, r, r) of each kernel.
        conv_shifts: (R,) of each kernel.
        expand: (C, F).
        expand_scale: (C,).
        expand_shift: (C,).
    """

    reduces: Sequence[Tensor]
    reduce_scale: Tensor | None
    reduce_shift: Tensor | None
    assigns: Sequence[Tensor]
    assign_shifts: Sequence[Tensor | None]
    convs: Sequence[Tensor]
    conv_shifts: Sequence[Tensor | None]
    expand: Tensor
    expand_scale: Tensor | None
    expand_shift: Tensor | None

    def for_nodes(self, nodes: int, plan: Plan) -> "Matrices":
        """With the scales in the matrices, if that is less work than scaling the outputs for this many nodes."""
        if self.expand_scale is None or plan.compute != wide(plan.compute):
            return self
        reduced = sum(len(matrix) for matrix in self.reduces)
        if not scaling_pays(nodes, channels=len(self.expand), reduced=reduced, features=self.expand.shape[1]):
            return self
        reduces = self.reduces
        if self.reduce_scale is not None:
            scales = self.reduce_scale.split([len(matrix) for matrix in reduces])
            reduces = [_scaled(matrix, scale) for matrix, scale in zip(reduces, scales, strict=True)]
        expand = _scaled(self.expand, self.expand_scale)
        return self._replace(reduces=reduces, reduce_scale=None, expand=expand, expand_scale=None)

    def of_way(self, way: int, plan: Plan) -> "Matrices":
        """With only the reduction of gather (0) or scatter (1); unchanged if they share it."""
        if plan.symmetric:
            return self
        scale, shift = _part(self.reduce_scale, way), _part(self.reduce_shift, way)
        return self._replace(reduces=self.reduces[way : way + 1], reduce_scale=scale, reduce_shift=shift)


class Vectors(NamedTuple):
    """Pairs (weight, bias) of norms with statistics, in the layout of the products before them."""

    reduce: tuple[Tensor | None, Tensor | None]
    assigns: Sequence[tuple[Tensor | None, Tensor | None]]
    conv: tuple[Tensor | None, Tensor | None]
    expand: tuple[Tensor | None, Tensor | None]

    def of_way(self, way: int, plan: Plan) -> "Vectors":
        """With only those of the reduction of gather (0) or scatter (1); unchanged if they share it."""
        weight, bias = self.reduce
        return self if plan.symmetric else self._replace(reduce=(_part(weight, way), _part(bias, way)))


def fold(parts: Parts, plan: Plan) -> Matrices:
    """Fold a layer's projections into matrices; differentiable."""
    dtype, ways, kernels = wide(plan.compute), plan.ways, len(plan.latents)
    flat = [*parts.reduces, *(part for way in parts.assigns for part in way), *parts.convs, parts.expand]
    nothing: list[Tensor | None] = [None] * len(flat)
    _, *columns = zip(*flat, strict=True)
    scales, shifts = (nothing, nothing) if plan.takes_statistics else affines(columns, plan.eps, dtype)
    if parts.gamma is not None and not plan.takes_statistics:
        gamma, scale, shift = to_dtype(parts.gamma, dtype), scales[-1], shifts[-1]
        scales[-1] = gamma.expand(parts.expand.matrix.shape[0]) if scale is None else scale * gamma
        shifts[-1] = _times(shift, gamma)
    matrices = [to_dtype(part.matrix, dtype) for part in flat]
    of_ways = [slice(ways + way * kernels, ways + (way + 1) * kernels) for way in range(ways)]
    convs = slice(ways + ways * kernels, len(flat) - 1)

    def scaled(places: slice) -> list[Tensor]:
        """(G, rows, r) of each."""
        pairs = zip(matrices[places], scales[places], strict=True)
        return [_scaled(matrix, scale).view(plan.groups, -1, matrix.shape[1]) for matrix, scale in pairs]

    return Matrices(
        reduces=matrices[:ways],
        reduce_scale=joined(scales[:ways], 0),
        reduce_shift=joined(shifts[:ways], 0),
        assigns=[cat(scaled(way), 1) for way in of_ways],
        assign_shifts=[latent_vector(shifts[way], plan) for way in of_ways],
        convs=scaled(convs),
        conv_shifts=shifts[convs],
        expand=matrices[-1],
        expand_scale=scales[-1],
        expand_shift=shifts[-1],
    )


def vectors(parts: Parts, plan: Plan) -> Vectors:
    """Weights and biases of norms with statistics; differentiable."""

    def pair(projected: Sequence[NormedMatrix], join: Callable[[Sequence[Tensor | None]], Tensor | None]):  # type: ignore[no-untyped-def]
        return join([part.weight for part in projected]), join([part.bias for part in projected])

    weight, bias = parts.expand.weight, parts.expand.bias
    if parts.gamma is not None:
        # Dense: PyTorch's batch norm of rows has wrong gradients for a weight of stride 0.
        ones = parts.gamma.new_ones(parts.expand.matrix.shape[0]) if weight is None else weight
        weight = ones * parts.gamma
        bias = _times(bias, parts.gamma)
    return Vectors(
        reduce=pair(parts.reduces, lambda tensors: joined(tensors, 0)),
        assigns=[pair(way, lambda tensors: latent_vector(tensors, plan)) for way in parts.assigns],
        conv=pair(parts.convs, lambda tensors: joined(tensors, 0)),
        expand=(weight, bias),
    )


def latent_vector(parts: Sequence[Tensor | None], plan: Plan) -> Tensor | None:
    """Vectors over the latents of each kernel joined to one, (G * D,), grouped by channel group."""
    if len(parts) == 1:
        return parts[0]
    split = [None if part is None else part.unflatten(0, (plan.groups, -1)) for part in parts]
    together = joined(split, 1)
    return None if together is None else together.flatten()


def split_latent_vector(vector_GD: Tensor, plan: Plan) -> list[Tensor]:
    """Undo `latent_vector`."""
    if len(plan.latents) == 1:
        return [vector_GD]
    return [part.flatten() for part in vector_GD.unflatten(0, (plan.groups, -1)).split(list(plan.latents), 1)]


def joined(parts: Sequence[Tensor | None], dim: int) -> Tensor | None:
    """The parts that are not ``None``, concatenated; ``None`` if all are."""
    known = [part for part in parts if part is not None]
    return cat(known, dim) if known else None


def _part(vector_R: Tensor | None, way: int) -> Tensor | None:
    """Gather's (0) or scatter's (1) part of a vector over both reductions."""
    return None if vector_R is None else vector_R.chunk(2)[way]


def _times(x: Tensor | None, factor: Tensor) -> Tensor | None:
    return None if x is None else x * factor


def _scaled(matrix: Tensor, scale: Tensor | None) -> Tensor:
    return matrix if scale is None else matrix * scale.unsqueeze(1)
