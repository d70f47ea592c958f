"""The equations as PyTorch operations over all nodes: any norm, any transform, exported programs.

Gradients are autograd's, of any order and in any mode. Where much would be held for the backward pass, the forward
pass is run again there instead, if its norms allow it.

Axes: B batch, N nodes, C channels, R reduced channels, G groups, r = R / G, D latents of one kernel, S samples (B, or
the scenes of packed points). Tensors over nodes are (B, N, channels) whatever their strides.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from latentgnn.config import LatentGNNConfig
from latentgnn.functional import EPS, gather, l2, mix, node_weight, reciprocal, scatter
from latentgnn.norms import is_repeatable, normalize
from latentgnn.projections import Arrangement, Projection
from latentgnn.ranks import added


@dataclass(frozen=True)
class Nodes:
    """Which nodes take part, and which sample each belongs to.

    Args:
        mask_BN: nodes that take part; ``None`` for all.
        offsets: where each sample begins among the nodes of a single row, and the end; ``None`` if rows are samples.
        group: the name of the process group whose processes hold the nodes; empty where this one holds all.
        member_SN: instead of the offsets where these are not known in advance, which nodes of a single row belong to
            each sample; what is done for each sample is then done for all nodes, S times as often as needed.
    """

    mask_BN: Tensor | None = None
    offsets: Sequence[int] | None = None
    group: str = ""
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


def _output(layer: Arrangement, x_BNC: Tensor, nodes: Nodes, compute: torch.dtype) -> Tensor:
    config, groups, mask_BN = layer.config, layer.config.num_groups, nodes.mask_BN
    valid_BN1 = None if mask_BN is None else mask_BN.unsqueeze(-1)
    inside_BNC = x_BNC if valid_BN1 is None else x_BNC.masked_fill(~valid_BN1, 0)
    values = _values(layer, inside_BNC.to(compute), nodes, compute)
    gathers, scatters = [], []
    for index in range(len(config.latents)):
        assigns = [
            _grouped(torch.relu(_projected(way[index], _ungrouped(value), nodes, compute, groups)), groups)
            for way, value in zip(layer.assigns, values, strict=True)
        ]
        gather_assign = scatter_assign = assigns[0]
        if config.symmetric:
            gather_assign = scatter_assign = l2(gather_assign, -1)
        else:
            scatter_assign = l2(assigns[1], -1)
        if valid_BN1 is not None:
            gather_assign = gather_assign * valid_BN1.unsqueeze(2)
        gathers.append(gather_assign)
        scatters.append(scatter_assign)
    contexts = []
    for index, latents in enumerate(_latents(config, values[0], gathers, nodes)):
        contexts.append(_context(latents, scatters[index], nodes))
        if layer.convs:
            contexts[-1] = torch.relu(_projected(layer.convs[index], contexts[-1], nodes, compute, groups))
    context_BNF = contexts[0] if len(contexts) == 1 else torch.cat(contexts, -1)
    out_BNC = _projected(layer.expand, context_BNF, nodes, compute)
    if layer.gamma is not None:
        out_BNC = torch.addcmul(inside_BNC, layer.gamma, out_BNC)
    out_BNC = out_BNC.to(x_BNC.dtype)
    out_BNC = out_BNC if valid_BN1 is None else torch.where(valid_BN1, out_BNC, x_BNC)
    if x_BNC.stride(-1) != 1 and out_BNC.stride(-1) == 1 and not torch.compiler.is_compiling():
        # A map comes back in its own order of strides, whatever the norms and the mask made of it.
        return out_BNC.mT.contiguous().mT
    return out_BNC


def _values(layer: Arrangement, x_BNC: Tensor, nodes: Nodes, compute: torch.dtype) -> list[Tensor]:
    """V, and unless symmetric L: (B, N, G, r)."""
    weight_RC = (
        torch.cat([part.weight for part in layer.reduces]) if len(layer.reduces) > 1 else layer.reduces[0].weight
    )
    scale = None
    if compute == torch.float16:
        # Rows longer than 1 may take a sum over channels out of float16's range.
        scale = torch.linalg.vector_norm(weight_RC.detach().float(), dim=1).amax().clamp_min(1)
        weight_RC = weight_RC / scale
    raw = _product(x_BNC, weight_RC.to(compute))
    raw = raw if scale is None else raw.float() * scale
    parts = raw.chunk(len(layer.reduces), -1)
    return [
        l2(_grouped(_normalized(part.norm, value, nodes), layer.config.num_groups), -1).to(compute)
        for part, value in zip(layer.reduces, parts, strict=True)
    ]


def _latents(
    config: LatentGNNConfig, value_BNGr: Tensor, assigns_BNGD: Sequence[Tensor], nodes: Nodes
) -> Iterator[list[Tensor]]:
    """Z of each kernel: of each part of `Nodes.split`, (B, G, D, r)."""
    values = [value.transpose(1, 2) for value in nodes.split(value_BNGr)]
    assigns = [part.transpose(1, 2) for assign_BNGD in assigns_BNGD for part in nodes.split(assign_BNGD)]
    latents = [gather(value, assign) for value, assign in zip(values * len(assigns_BNGD), assigns, strict=True)]
    if config.symmetric and config.node_scale == "published":
        latents = added(latents, nodes.group) if nodes.group else latents
    else:
        weights = [node_weight(assign, node_scale=config.node_scale) for assign in assigns]
        if nodes.group:
            # Lengths do not add up over processes, their squares do.
            power = 1 if config.node_scale == "mean" else 2
            totals = added([*latents, *(weight**power for weight in weights)], nodes.group)
            latents, powers = totals[: len(assigns)], totals[len(assigns) :]
            inverses = [torch.threshold(each, EPS**power, math.inf) ** (-1 / power) for each in powers]
        else:
            inverses = [reciprocal(weight) for weight in weights]
        latents = [latent * inverse for latent, inverse in zip(latents, inverses, strict=True)]
    return (latents[first : first + len(values)] for first in range(0, len(latents), len(values)))


def _context(latents: Sequence[Tensor], scatter_BNGD: Tensor, nodes: Nodes) -> Tensor:
    """Mix and scatter of one kernel: (B, N, R)."""
    backs = nodes.split(scatter_BNGD)
    return nodes.joined(
        [_scattered(mix(latent), back.transpose(1, 2)) for latent, back in zip(latents, backs, strict=True)]
    )


def _scattered(latent_BGDr: Tensor, assign_BGND: Tensor) -> Tensor:
    """`scatter` of all groups, (B, N, R), with nodes innermost where they are in the assignments."""
    if assign_BGND.stride(-1) == 1 or torch.compiler.is_exporting():
        return scatter(latent_BGDr, assign_BGND).transpose(1, 2).flatten(2)
    # The same product turned, O^T = Y^T Q^T.
    return (latent_BGDr.to(assign_BGND.dtype).mT @ assign_BGND.mT).flatten(1, 2).mT


def _projected(part: Projection, x_BNC: Tensor, nodes: Nodes, compute: torch.dtype, groups: int = 1) -> Tensor:
    """norm(W x), in the type of the products."""
    return _normalized(part.norm, _product(x_BNC, part.weight.to(compute), groups), nodes).to(compute)


def _product(x_BNC: Tensor, weight_OC: Tensor, groups: int = 1) -> Tensor:
    """x W^T; with groups, each group of rows of W takes a group of channels."""
    if groups > 1:
        grouped = [
            _product(x_BNr, weight_Or)
            for x_BNr, weight_Or in zip(x_BNC.chunk(groups, -1), weight_OC.chunk(groups), strict=True)
        ]
        return torch.cat(grouped, -1)
    if x_BNC.stride(-1) == 1 or torch.compiler.is_exporting():
        return F.linear(x_BNC, weight_OC)
    return F.conv1d(x_BNC.mT, weight_OC.unsqueeze(-1)).mT


def _normalized(norm: nn.Module, x_BNF: Tensor, nodes: Nodes) -> Tensor:
    """A norm over the nodes of each sample; a batch norm over those of all."""
    if not nodes.are_packed or not _differs_by_sample(norm):
        return normalize(norm, x_BNF, nodes.mask_BN, nodes.group)
    parts = nodes.split(x_BNF)
    if nodes.member_SN is not None:
        return nodes.joined([normalize(norm, part, nodes.member_SN) for part in parts])
    return nodes.joined([normalize(norm, part, None) for part in parts if part.shape[1] > 0])


def _differs_by_sample(norm: nn.Module) -> bool:
    return not isinstance(norm, nn.Identity | nn.LayerNorm | nn.RMSNorm | nn.modules.batchnorm._BatchNorm)


def _grouped(x_BNF: Tensor, groups: int) -> Tensor:
    """(B, N, G * r) as (B, N, G, r)."""
    return x_BNF.unflatten(-1, (groups, -1))


def _ungrouped(x_BNGr: Tensor) -> Tensor:
    return x_BNGr.flatten(2)
