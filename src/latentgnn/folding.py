"""The layer's matrices with their norms and gamma folded in, as `latentgnn.tiles` takes them, and the way back.

Axes: G groups, D latents of all kernels in a group, C channels, R reduced channels, r = R / G.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from latentgnn.functional import wide
from latentgnn.tiles import Plan, Weights, rows


class Projected(NamedTuple):
    """What a matrix and the norm after it do: x to (matrix x) * scale + shift."""

    matrix: Tensor
    scale: Tensor
    shift: Tensor

    def to(self, dtype: torch.dtype) -> "Projected":
        """The same in another type."""
        return Projected(*(part.to(dtype) for part in self))

    def affine(self) -> Tensor:
        """Matrix and shift as one, (out, in + 1)."""
        return torch.cat([self.matrix * self.scale.unsqueeze(1), self.shift.unsqueeze(1)], 1)


class _Parts(NamedTuple):
    """What is projected, by its place in the layer; ``assigns`` of every kernel, gather's before scatter's."""

    reduces: Sequence[Projected]
    assigns: Sequence[Projected]
    convs: Sequence[Projected]
    expand: Projected


def _parts(projected: Sequence[Projected], plan: Plan) -> _Parts:
    ways = 1 if plan.symmetric else 2
    assigns = ways + ways * len(plan.latents)
    return _Parts(projected[:ways], projected[ways:assigns], projected[assigns:-1], projected[-1])


def scatter_assigns(plan: Plan) -> slice:
    """Where among what is projected the assignments of scatter are, in a layer that is not symmetric."""
    kernels = len(plan.latents)
    return slice(2 + kernels, 2 + 2 * kernels)


def shifts_nothing(projected: Sequence[Projected], plan: Plan) -> bool:
    """Whether the assignments of scatter have no shifts, so that it may do without unit lengths or be direct."""
    if plan.symmetric:
        return False
    shifts = [one.shift for one in projected[scatter_assigns(plan)]]
    # Whoever looks at values on an accelerator waits for it.
    return all(shift.device.type == "cpu" and not shift.any() for shift in shifts)


def _is_less_when_direct(projected: Sequence[Projected], plan: Plan) -> bool:
    reduced, channels = projected[0].matrix.shape
    latents = sum(plan.latents)
    return plan.groups * latents * channels < reduced * (channels + latents)


def fold(projected: Sequence[Projected], plan: Plan, *, unshifted: bool = False) -> Weights:
    """The matrices with scales and shifts in them.

    Args:
        projected: the reduction of gather and, unless symmetric, of scatter; the assignments of gather, and unless
            symmetric of scatter, of every kernel; the graph convolution of every kernel, if there are any; the
            expansion.
        plan: of the layer.
        unshifted: the assignments of scatter shift nothing. Where it saves operations, their matrices are folded with
            that of scatter's reduction.
    """
    dtype = wide(plan.compute)
    parts = _parts([one.to(dtype) for one in projected], plan)
    gather_assign, scatter_assign = _assigns(parts, plan)
    direct = unshifted and _is_less_when_direct(projected, plan)
    reduces = _joined(parts, plan) if direct else parts.reduces
    down = _down(reduces, plan)
    if unshifted and plan.compute != torch.float16:  # whose range wants unit lengths
        scatter_assign = scatter_assign[..., :-1]
    expand = parts.expand
    expand_CF = rows((expand.matrix.shape[0], expand.matrix.shape[1] + 1), expand.matrix, dtype)
    torch.mul(expand.matrix, expand.scale.unsqueeze(1), out=expand_CF[:, :-1])
    expand_CF[:, -1] = expand.shift
    return Weights(
        reduce=torch.cat([(one.matrix * (one.scale * down).unsqueeze(1)).to(plan.compute) for one in reduces]),
        reduce_shift=torch.cat([one.shift * down for one in reduces]).to(plan.compute),
        gather_assign=gather_assign,
        scatter_assign=None if direct else scatter_assign,
        graph_conv=torch.stack(_of_groups(parts.convs, plan)) if parts.convs else None,
        expand=expand_CF,
    )


def unfold(grads: Weights, projected: Sequence[Projected], plan: Plan) -> list[Projected]:
    """From the gradients of what `fold` gives to those of what it takes.

    Where the assignments of scatter were taken to shift nothing, their shifts get none.
    """
    direct = grads.scatter_assign is None
    parts = _parts([one.to(grads.reduce.dtype) for one in projected], plan)
    reduces = _joined(parts, plan) if direct else parts.reduces
    down, counts = _down(reduces, plan), [one.matrix.shape[0] for one in reduces]
    pairs = list(zip((grads.reduce * down).split(counts), (grads.reduce_shift * down).split(counts), strict=True))
    assigns = [grads.gather_assign]
    if direct:
        pairs[1], grad_assign = _joined_backward(*pairs[1], parts, plan)
        assigns.append(grad_assign)
    elif not plan.symmetric and grads.scatter_assign is not None:
        missing = grads.gather_assign.shape[2] - grads.scatter_assign.shape[2]
        assigns.append(torch.nn.functional.pad(grads.scatter_assign, (0, missing)))
    affines = [part.flatten(0, 1) for assign in assigns for part in assign.split(list(plan.latents), 1)]
    if grads.graph_conv is not None:
        affines += [part.flatten(0, 1) for part in grads.graph_conv]
    pairs += [(affine[:, :-1], affine[:, -1]) for affine in (*affines, grads.expand)]
    found = []
    for one, (matrix, shift) in zip(projected, pairs, strict=True):
        scale = (matrix * one.matrix).sum(1)
        grad = Projected(matrix * one.scale.to(matrix.dtype).unsqueeze(1), scale, shift)
        found.append(Projected(*(part.to(like.dtype) for part, like in zip(grad, one, strict=True))))
    return found


def _of_groups(parts: Sequence[Projected], plan: Plan) -> list[Tensor]:
    return [one.affine().unflatten(0, (plan.groups, -1)) for one in parts]


def _assigns(parts: _Parts, plan: Plan) -> tuple[Tensor, Tensor]:
    """Assignments of gather and of scatter, (G, D, r + 1)."""
    kernels = len(plan.latents)
    affines = _of_groups(parts.assigns, plan)
    gather_assign = torch.cat(affines[:kernels], 1)
    return gather_assign, gather_assign if plan.symmetric else torch.cat(affines[kernels:], 1)


def _joined(parts: _Parts, plan: Plan) -> list[Projected]:
    """The reductions, scatter's with its assignments as one matrix, (G * D, C)."""
    reduce, assign_GDr = parts.reduces[1].affine().unflatten(0, (plan.groups, -1)), _assigns(parts, plan)[1]
    joined = (assign_GDr[..., :-1] @ reduce).flatten(0, 1)
    return [parts.reduces[0], Projected(joined[:, :-1], joined.new_ones(joined.shape[0]), joined[:, -1])]


def _joined_backward(
    grad_matrix: Tensor, grad_shift: Tensor, parts: _Parts, plan: Plan
) -> tuple[tuple[Tensor, Tensor], Tensor]:
    """From the gradients of the joined matrix and its shift to those of the reduction's and of the assignments."""
    grad_GDC = torch.cat([grad_matrix, grad_shift.unsqueeze(1)], 1).unflatten(0, (plan.groups, -1))
    reduce_GrC, assign_GDr = parts.reduces[1].affine().unflatten(0, (plan.groups, -1)), _assigns(parts, plan)[1]
    grad_reduce = (assign_GDr[..., :-1].mT @ grad_GDC).flatten(0, 1)
    grad_assign_GDr = torch.nn.functional.pad(grad_GDC @ reduce_GrC.mT, (0, 1))
    return (grad_reduce[:, :-1], grad_reduce[:, -1]), grad_assign_GDr


def _down(reduces: Sequence[Projected], plan: Plan) -> Tensor | float:
    """Rows longer than 1 may take a sum over channels out of float16's range; unit length comes next anyway."""
    if plan.compute != torch.float16:
        return 1.0
    lengths = [torch.linalg.vector_norm(one.matrix.float(), dim=1) * one.scale.float().abs() for one in reduces]
    return torch.cat(lengths).amax().clamp_min(1).reciprocal()
