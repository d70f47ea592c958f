"""The equations as PyTorch operations over all nodes: any norm, any transform, exported programs.

Gradients are autograd's, of any order and in any mode. Where much would be held for the backward pass, the forward
pass is run again there instead, if its norms allow it.

Axes: B batch, N nodes, C channels, R reduced channels, G groups, r = R / G, D latents of one kernel, S samples (B, or
the scenes of packed points). Tensors over nodes are (B, N, channels) whatever their strides.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple
from typing import cast as cast_type

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from latentgnn.functional import cast, gather, l2, mix, node_weight, product, reciprocal, scatter, wide
from latentgnn.modes import is_exporting, is_transformed
from latentgnn.norms import affines, is_repeatable, normalize
from latentgnn.projections import Arrangement


@dataclass(frozen=True)
class Nodes:
    """Which nodes take part, and which sample each belongs to.

    Args:
        mask_BN: nodes that take part; ``None`` for all.
        offsets: where each sample begins among the nodes of a single row, and the end; ``None`` if rows are samples.
        member_SN: instead of the offsets where these are not known in advance, which nodes of a single row belong to
            each sample; what is done for each sample is then done for all nodes, S times as often as needed.
    """

    mask_BN: Tensor | None = None
    offsets: Sequence[int] | None = None
    member_SN: Tensor | None = None

    @property
    def are_packed(self) -> bool:
        """Whether several samples share a row."""
        return self.offsets is not None or self.member_SN is not None

    def split(self, x_BNF: Tensor) -> list[Tensor]:
        """Parts whose rows are samples: all at once, or one for each scene; nodes are in the second dimension."""
        if self.member_SN is not None:
            return [torch.where(_like(self.member_SN, x_BNF), x_BNF, 0)]
        if self.offsets is None:
            return [x_BNF]
        return [x_BNF[:, first:last] for first, last in pairwise(self.offsets)]

    def joined(self, parts: Sequence[Tensor]) -> Tensor:
        """The rows that `split` took apart."""
        if self.member_SN is not None:
            return torch.where(_like(self.member_SN, parts[0]), parts[0], 0).sum(0, keepdim=True)
        return parts[0] if len(parts) == 1 else torch.cat(list(parts), 1)


def members(offsets: Tensor, nodes: int) -> Tensor:
    """Which of the nodes belong to each sample, (S, N), from offsets (S + 1,)."""
    index_N = torch.arange(nodes, device=offsets.device)
    return (offsets[:-1, None] <= index_N) & (index_N < offsets[1:, None])


def _like(member_SN: Tensor, x_BNF: Tensor) -> Tensor:
    return member_SN.view(*member_SN.shape, *[1] * (x_BNF.dim() - 2))


def latent_gnn(layer: Arrangement, x_BNC: Tensor, nodes: Nodes, compute: torch.dtype, *, recompute: bool) -> Tensor:
    """The layer's output for nodes in the last dimension but one.

    Args:
        layer: the parameters.
        x_BNC: input.
        nodes: which take part; the others come back unchanged.
        compute: type of the products over nodes; what is summed over nodes and every norm is at least float32.
        recompute: hold the input alone for the backward pass where the norms allow it, and run the layer again there.

    Returns:
        (B, N, C) in the input's type.
    """
    if recompute and all(is_repeatable(projection.norm) for projection in layer.projections):
        read = [x_BNC, nodes.mask_BN, layer.gamma]
        read += [tensor for part in layer.projections for tensor in (*part.parameters(), *part.buffers())]
        state = [tensor for tensor in read if tensor is not None]
        if any(tensor.requires_grad for tensor in state):
            return _recomputed(layer, x_BNC, nodes, compute, state)
    return _output(layer, x_BNC, nodes, compute)


def _recomputed(
    layer: Arrangement, x_BNC: Tensor, nodes: Nodes, compute: torch.dtype, state: Sequence[Tensor]
) -> Tensor:
    """`_output`, computed again in the backward pass from what it reads, ``state``, which must not have changed."""
    versions = [tensor._version for tensor in state]

    def run(x_BNC: Tensor) -> Tensor:
        if [tensor._version for tensor in state] != versions:
            raise RuntimeError(
                "the layer's input, its mask, or one of its parameters or buffers was modified by an in-place "
                "operation between the forward and the backward pass, which computes the layer again; call backward "
                "first, or change a copy"
            )
        return _output(layer, x_BNC, nodes, compute)

    out: Tensor = checkpoint(run, x_BNC, use_reentrant=False, preserve_rng_state=False, determinism_check="none")
    return out


class Step(NamedTuple):
    """A matrix and what follows it: a norm, or where that is an affine map folded into the matrix, its shift alone."""

    weight: Tensor
    norm: nn.Module | None
    shift: Tensor | None = None


class Steps(NamedTuple):
    """A layer's projections in the order of the equations."""

    reduces: Sequence[Step]
    assigns: Sequence[Sequence[Step]]
    convs: Sequence[Step]
    expand: Step
    gamma: Tensor | None


def _steps(layer: Arrangement, compute: torch.dtype) -> Steps:
    kernels, ways, gamma = len(layer.config.latents), len(layer.reduces), layer.gamma
    weights = [cast(weight, compute) for weight in cast_type(list[Tensor], layer.tensors[::5])]
    if layer.norm_kind == "affine" and compute == wide(compute) and not (is_transformed() or _is_traced()):
        scales, shifts = affines([layer.tensors[place::5] for place in range(1, 5)], layer.eps, compute)
        if gamma is not None:
            scale_C, shift_C = scales[-1], shifts[-1]
            scales[-1] = gamma.expand(len(weights[-1])) if scale_C is None else scale_C * gamma
            shifts[-1], gamma = None if shift_C is None else shift_C * gamma, None
        steps = [
            Step(weight if scale is None else weight * scale.unsqueeze(1), None, shift)
            for weight, scale, shift in zip(weights, scales, shifts, strict=True)
        ]
    else:
        steps = [Step(weight, norm) for weight, norm in zip(weights, layer.norms, strict=True)]
    assigns = [steps[ways + way * kernels : ways + (way + 1) * kernels] for way in range(ways)]
    return Steps(steps[:ways], assigns, steps[ways + ways * kernels : -1], steps[-1], gamma)


def _is_traced() -> bool:
    return torch.compiler.is_compiling() or is_exporting()


def _output(layer: Arrangement, x_BNC: Tensor, nodes: Nodes, compute: torch.dtype) -> Tensor:
    config, groups, mask_BN = layer.config, layer.config.num_groups, nodes.mask_BN
    steps = _steps(layer, compute)
    valid_BN1 = None if mask_BN is None else mask_BN.unsqueeze(-1)
    inside_BNC = x_BNC if valid_BN1 is None else x_BNC.masked_fill(~valid_BN1, 0)
    values = _values(steps.reduces, cast(inside_BNC, compute), nodes, compute, groups)
    contexts = []
    for index in range(len(config.latents)):
        assigns = [
            _grouped(torch.relu(_projected(way[index], _ungrouped(value, groups), nodes, compute, groups)), groups)
            for way, value in zip(steps.assigns, values, strict=True)
        ]
        gather_assign = scatter_assign = assigns[0]
        if config.symmetric:
            gather_assign = scatter_assign = l2(gather_assign, -1)
        else:
            scatter_assign = l2(assigns[1], -1)
        if valid_BN1 is not None:
            gather_assign = gather_assign * (valid_BN1 if groups == 1 else valid_BN1.unsqueeze(2))
        contexts.append(_context(layer, values[0], gather_assign, scatter_assign, nodes))
        if steps.convs:
            contexts[-1] = torch.relu(_projected(steps.convs[index], contexts[-1], nodes, compute, groups))
    context_BNF = contexts[0] if len(contexts) == 1 else torch.cat(contexts, -1)
    out_BNC = _projected(steps.expand, context_BNF, nodes, compute)
    if steps.gamma is not None:
        out_BNC = torch.addcmul(inside_BNC, steps.gamma, out_BNC)
    elif layer.gamma is not None:
        out_BNC = inside_BNC + out_BNC
    out_BNC = cast(out_BNC, x_BNC.dtype)
    out_BNC = out_BNC if valid_BN1 is None else torch.where(valid_BN1, out_BNC, x_BNC)
    if x_BNC.stride(-1) != 1 and out_BNC.stride(-1) == 1 and not torch.compiler.is_compiling():
        # A map comes back in its own order of strides, whatever the norms and the mask made of it.
        return out_BNC.mT.contiguous().mT
    return out_BNC


def _values(
    reduces: Sequence[Step], x_BNC: Tensor, nodes: Nodes, compute: torch.dtype, groups: int
) -> Sequence[Tensor]:
    """V, and unless symmetric L: of unit length, in groups."""
    weight_RC = torch.cat([step.weight for step in reduces]) if len(reduces) > 1 else reduces[0].weight
    scale = None
    if compute == torch.float16:
        # Rows longer than 1 may take a sum over channels out of float16's range.
        scale = torch.linalg.vector_norm(weight_RC.detach().float(), dim=1).amax().clamp_min(1)
        weight_RC = (weight_RC / scale).to(compute)
    shifts = [step.shift for step in reduces if step.shift is not None]
    raw = _product(x_BNC, weight_RC, shift_O=torch.cat(shifts) if shifts else None)
    raw = raw if scale is None else raw.float() * scale
    norms = [step.norm for step in reduces if step.norm is not None]
    if not norms:
        unit = l2(raw.unflatten(-1, (len(reduces) * groups, -1)), -1)
        return unit.unbind(2) if groups == 1 else unit.chunk(len(reduces), 2)
    return [
        cast(l2(_grouped(_normalized(norm, value, nodes), groups), -1), compute)
        for norm, value in zip(norms, raw.chunk(len(reduces), -1), strict=True)
    ]


def _context(layer: Arrangement, value_BNGr: Tensor, gather_BNGD: Tensor, scatter_BNGD: Tensor, nodes: Nodes) -> Tensor:
    """Gather, mix and scatter of one kernel: (B, N, R)."""
    config, parts = layer.config, []
    for value, assign, back in zip(
        nodes.split(value_BNGr), nodes.split(gather_BNGD), nodes.split(scatter_BNGD), strict=True
    ):
        value_BGNr, assign_BGND, back_BGND = (_graphs(x, config.num_groups) for x in (value, assign, back))
        latent_BGDr = gather(value_BGNr, assign_BGND)
        if not config.symmetric or config.node_scale == "mean":
            latent_BGDr = latent_BGDr * reciprocal(node_weight(assign_BGND, node_scale=config.node_scale))
        parts.append(_scattered(mix(latent_BGDr), back_BGND, config.num_groups))
    return nodes.joined(parts)


def _scattered(latent_BGDr: Tensor, assign_BGND: Tensor, groups: int) -> Tensor:
    """`scatter` of all groups, (B, N, R), with nodes innermost where they are in the assignments."""
    if assign_BGND.stride(-1) == 1 or is_exporting():
        out = scatter(latent_BGDr, assign_BGND)
        return out if groups == 1 else out.transpose(1, 2).flatten(2)
    # The same product turned, O^T = Y^T Q^T.
    out = product(cast(latent_BGDr, assign_BGND.dtype).mT, assign_BGND.mT)
    return out.mT if groups == 1 else out.flatten(1, 2).mT


def _projected(step: Step, x_BNC: Tensor, nodes: Nodes, compute: torch.dtype, groups: int = 1) -> Tensor:
    """norm(W x), in the type of the products."""
    y_BNO = _product(x_BNC, step.weight, groups, step.shift)
    return y_BNO if step.norm is None else cast(_normalized(step.norm, y_BNO, nodes), compute)


def _product(x_BNC: Tensor, weight_OC: Tensor, groups: int = 1, shift_O: Tensor | None = None) -> Tensor:
    """x W^T + shift; with groups, each group of rows of W takes a group of channels."""
    if x_BNC.stride(-1) != 1 and not is_exporting():
        return torch.conv1d(x_BNC.mT, weight_OC.unsqueeze(-1), shift_O, groups=groups).mT
    if groups == 1:
        return F.linear(x_BNC, weight_OC, shift_O)
    pairs = zip(x_BNC.chunk(groups, -1), weight_OC.chunk(groups), strict=True)
    y_BNO = torch.cat([F.linear(x_BNr, weight_Or) for x_BNr, weight_Or in pairs], -1)
    return y_BNO if shift_O is None else y_BNO + shift_O


def _normalized(norm: nn.Module, x_BNF: Tensor, nodes: Nodes) -> Tensor:
    """A norm over the nodes of each sample; a batch norm over those of all."""
    if not nodes.are_packed or not _differs_by_sample(norm):
        return normalize(norm, x_BNF, nodes.mask_BN)
    parts = nodes.split(x_BNF)
    if nodes.member_SN is not None:
        return nodes.joined([normalize(norm, part, nodes.member_SN) for part in parts])
    return nodes.joined([normalize(norm, part, None) for part in parts if part.shape[1] > 0])


def _differs_by_sample(norm: nn.Module) -> bool:
    return not isinstance(norm, nn.Identity | nn.LayerNorm | nn.RMSNorm | nn.modules.batchnorm._BatchNorm)


def _grouped(x_BNF: Tensor, groups: int) -> Tensor:
    """(B, N, G * r) as (B, N, G, r); as it is with a single group."""
    return x_BNF if groups == 1 else x_BNF.unflatten(-1, (groups, -1))


def _ungrouped(x_BNGr: Tensor, groups: int) -> Tensor:
    return x_BNGr if groups == 1 else x_BNGr.flatten(2)


def _graphs(x_BNGr: Tensor, groups: int) -> Tensor:
    """(B, G, N, r): a group is one more graph; as it is with a single group."""
    return x_BNGr if groups == 1 else x_BNGr.transpose(1, 2)
