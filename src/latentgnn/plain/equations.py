"""The equations as PyTorch operations over all nodes: any norm, any transform, exported programs.

Autograd computes the gradients, of any order and in any mode. If too much would be held for the backward pass, the
forward pass is run again there, provided the norms allow it.

Axes: B batch, N nodes, C channels, R reduced channels, G groups, r = R / G, D latents of one kernel, S samples (B, or
the scenes of packed points). Tensors over nodes are (B, N, channels) whatever their strides.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from latentgnn.config import LatentGNNConfig
from latentgnn.core.layouts import cat, laid_out_like
from latentgnn.functional import gather, latent_scale, mix, node_weight, scale_of_weight, scatter
from latentgnn.modes import is_exporting, is_traced
from latentgnn.norms import is_repeatable
from latentgnn.numerics import row_bound, to_dtype
from latentgnn.plain.normalizing import count_batch
from latentgnn.plain.samples import Nodes, outside_unchanged
from latentgnn.plain.steps import (
    Step,
    Steps,
    add_,
    apply,
    is_large,
    normalized,
    projected,
    rectified_,
    steps_of,
    to_unit_length_,
)
from latentgnn.projections import Arrangement
from latentgnn.ranks import added


def latent_gnn(layer: Arrangement, x_BNC: Tensor, nodes: Nodes, compute: torch.dtype, *, recompute: bool) -> Tensor:
    """The layer's output, with nodes in the second-to-last dimension.

    Args:
        layer: the parameters.
        x_BNC: input.
        nodes: the nodes that take part; the others are returned unchanged.
        compute: dtype of products over nodes; sums over nodes and norms are in float32 at least.
        recompute: hold only the input for the backward pass and run the layer again there, if the norms allow it.

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
    """`_output`, run again in the backward pass; ``state``, all tensors that it reads, must not change until then."""

    def now() -> list[object]:
        return [(tensor._version, tensor.requires_grad) for tensor in state] + [norm.training for norm in layer.norms]

    before = now()

    def run(x_BNC: Tensor) -> Tensor:
        if now() != before:
            raise RuntimeError(
                "the layer's input, its mask, or one of its parameters or buffers was modified by an in-place "
                "operation, frozen or unfrozen, or a norm switched between training and evaluation, between the "
                "forward and the backward pass, which computes the layer again; call backward first, or change a copy"
            )
        return _output(layer, x_BNC, nodes, compute)

    out: Tensor = checkpoint(run, x_BNC, use_reentrant=False, preserve_rng_state=False, determinism_check="none")
    return out


def _output(layer: Arrangement, x_BNC: Tensor, nodes: Nodes, compute: torch.dtype) -> Tensor:
    counted = nodes.mask_BN is None and not nodes.group and count_batch(layer.norms, x_BNC, compute)
    steps = steps_of(layer, compute, counted=counted)
    inside_BNC = _inside(x_BNC, nodes)
    return _expanded(
        layer, steps, _contexts(layer.config, steps, inside_BNC, nodes, compute), x_BNC, inside_BNC, nodes, compute
    )


def _contexts(
    config: LatentGNNConfig, steps: Steps, inside_BNC: Tensor, nodes: Nodes, compute: torch.dtype
) -> Sequence[Tensor]:
    """O of each kernel, (B, N, R). Unless autograd records, everything else is freed on return."""
    values = values_of(config, steps.reduces, inside_BNC, nodes, compute)
    pairs = [assignments(config, steps, index, values, nodes, compute) for index in range(len(config.latents))]
    contexts = []
    for latents, (_, assign) in zip(
        _latents(config, values[0], [assign for assign, _ in pairs], nodes), pairs, strict=True
    ):
        mixed = [mix(latent) for latent in latents]
        contexts.append(_context(mixed, assign, nodes))
    return contexts


def gathered(layer: Arrangement, x_BNC: Tensor, nodes: Nodes, compute: torch.dtype) -> tuple[Tensor, Tensor]:
    """Gather alone: sums over these nodes of values by assignments, (S, G, D, r), and their weights, (S, G, D).

    Weights are sums of squared assignments, or of assignments where ``node_scale`` is ``mean``.
    """
    config, steps = layer.config, steps_of(layer, compute)
    (value,) = values_of(config, steps.reduces[:1], _inside(x_BNC, nodes), nodes, compute)
    graphs, kernels = [_graphs(part) for part in nodes.split(value)], []
    for step in steps.assigns[0]:
        assigns = nodes.split(_masked(_assigned(config, step, 0, value, nodes, compute), nodes))
        parts = [
            (
                _of_groups(gather(graph, _graphs(assign)), config),
                node_weight(assign.transpose(1, 2), node_scale=config.node_scale).squeeze(-1),
            )
            for graph, assign in zip(graphs, assigns, strict=True)
        ]
        kernels.append([torch.cat(column) for column in zip(*parts, strict=True)])
    sums, weights = (torch.cat(column, 2) for column in zip(*kernels, strict=True))
    return sums, weights


def scattered(
    layer: Arrangement, x_BNC: Tensor, nodes: Nodes, compute: torch.dtype, latents: Sequence[Tensor]
) -> Tensor:
    """Scatter alone: the output for these nodes from Y of each kernel, (S, G, D_k, r)."""
    config, steps = layer.config, steps_of(layer, compute)
    inside_BNC = _inside(x_BNC, nodes)
    (value,) = values_of(config, steps.reduces[-1:], inside_BNC, nodes, compute)
    contexts, way = [], len(steps.reduces) - 1
    for step, latent in zip(steps.assigns[way], latents, strict=True):
        assign = _assigned(config, step, way, value, nodes, compute)
        own = latent.split([len(part) for part in nodes.split(assign)])
        contexts.append(_context([part.squeeze(1) if config.num_groups == 1 else part for part in own], assign, nodes))
    return _expanded(layer, steps, contexts, x_BNC, inside_BNC, nodes, compute)


def _inside(x_BNC: Tensor, nodes: Nodes) -> Tensor:
    """Zeros at nodes outside the mask, which may hold NaN."""
    return x_BNC if nodes.mask_BN is None else x_BNC.masked_fill(~nodes.mask_BN.unsqueeze(-1), 0)


def values_of(
    config: LatentGNNConfig, reduces: Sequence[Step], x_BNC: Tensor, nodes: Nodes, compute: torch.dtype
) -> Sequence[Tensor]:
    """V, and with a second step also L, (B, N, G, r). The input must be 0 outside its mask."""
    if len(reduces) > 1 and not is_traced() and is_large(reduces[0].weight, x_BNC.shape[0] * x_BNC.shape[1]):
        # Joining the matrices would take longer than a second product.
        return [value for step in reduces for value in values_of(config, [step], x_BNC, nodes, compute)]
    groups = config.num_groups
    weight_RC = cat([step.weight for step in reduces])
    if compute == torch.float16:
        bound = row_bound([weight_RC])
        raw = apply(to_dtype(x_BNC, compute), (weight_RC / bound).to(compute)).float() * bound
    else:
        raw = apply(to_dtype(x_BNC, compute), weight_RC)
    return [
        to_dtype(to_unit_length_(_grouped(normalized(step, value, nodes), groups)), compute)
        for step, value in zip(reduces, raw.chunk(len(reduces), -1), strict=True)
    ]


def assignments(
    config: LatentGNNConfig, steps: Steps, index: int, values: Sequence[Tensor], nodes: Nodes, compute: torch.dtype
) -> tuple[Tensor, Tensor]:
    """P, without its scale over nodes, and Q of one kernel: (B, N, G, D_k); P is 0 outside the mask."""
    assigns = [
        _assigned(config, steps.assigns[way][index], way, value, nodes, compute) for way, value in enumerate(values)
    ]
    return _masked(assigns[0], nodes), assigns[-1]


def _assigned(
    config: LatentGNNConfig, step: Step, way: int, value_BNGr: Tensor, nodes: Nodes, compute: torch.dtype
) -> Tensor:
    """P (way 0) or Q (way 1) of a kernel, or both where the layer is symmetric: (B, N, G, D_k)."""
    groups = config.num_groups
    value_BNR = value_BNGr.squeeze(2) if groups == 1 else value_BNGr.flatten(2)
    assign = _grouped(rectified_(projected(step, value_BNR, nodes, compute, groups)), groups)
    return to_unit_length_(assign) if config.symmetric or way == 1 else assign


def _masked(assign_BNGD: Tensor, nodes: Nodes) -> Tensor:
    return assign_BNGD if nodes.mask_BN is None else assign_BNGD * nodes.mask_BN[..., None, None]


def scale_of_sums(config: LatentGNNConfig, assign_BGND: Tensor) -> Tensor | None:
    """The factor of a kernel's sums, P's scale over nodes, (B, G, D_k, 1); ``None`` if it is 1."""
    if config.symmetric and config.node_scale == "published":
        return None
    return latent_scale(assign_BGND, node_scale=config.node_scale)


def _latents(
    config: LatentGNNConfig, value_BNGr: Tensor, assigns_BNGD: Sequence[Tensor], nodes: Nodes
) -> Iterator[list[Tensor]]:
    """Z of each kernel: a list with one tensor for each part of `Nodes.split`, shaped as `_graphs` does."""
    values = [_graphs(value) for value in nodes.split(value_BNGr)]
    assigns = [_graphs(part) for assign_BNGD in assigns_BNGD for part in nodes.split(assign_BNGD)]
    latents = [gather(value, assign) for value, assign in zip(values * len(assigns_BNGD), assigns, strict=True)]
    if nodes.group:
        latents = _latents_of_all(config, latents, assigns, nodes.group)
    else:
        scales = [scale_of_sums(config, assign) for assign in assigns]
        pairs = zip(latents, scales, strict=True)
        latents = [latent if scale is None else latent * scale for latent, scale in pairs]
    return (latents[first : first + len(values)] for first in range(0, len(latents), len(values)))


def _latents_of_all(
    config: LatentGNNConfig, latents: Sequence[Tensor], assigns: Sequence[Tensor], group: str
) -> list[Tensor]:
    """Z over the nodes of all processes, from the sums over this process's nodes."""
    if config.symmetric and config.node_scale == "published":
        return added(latents, group)
    weights = [node_weight(assign, node_scale=config.node_scale) for assign in assigns]
    totals = added([*latents, *weights], group)
    pairs = zip(totals[: len(latents)], totals[len(latents) :], strict=True)
    return [latent * scale_of_weight(weight, node_scale=config.node_scale) for latent, weight in pairs]


def _context(mixed: Sequence[Tensor], assign_BNGD: Tensor, nodes: Nodes) -> Tensor:
    """Scatter of one kernel, (B, N, R), from Y of each part of `Nodes.split`."""
    parts = [_scattered(latent, back) for latent, back in zip(mixed, nodes.split(assign_BNGD), strict=True)]
    return nodes.joined(parts)


def _scattered(latent: Tensor, assign_BNGD: Tensor) -> Tensor:
    """`scatter` of all groups, (B, N, R), with nodes innermost where they are in the assignments."""
    out = scatter(latent, _graphs(assign_BNGD))
    if out.dim() == 3:
        return out
    return out.transpose(1, 2).flatten(2) if is_exporting() or out.stride(-1) == 1 else out.mT.flatten(1, 2).mT


def _expanded(
    layer: Arrangement,
    steps: Steps,
    contexts: Sequence[Tensor],
    x_BNC: Tensor,
    inside_BNC: Tensor,
    nodes: Nodes,
    compute: torch.dtype,
) -> Tensor:
    """The output from O of each kernel."""
    if steps.convs:
        groups = layer.config.num_groups
        contexts = [
            rectified_(projected(step, context, nodes, compute, groups))
            for step, context in zip(steps.convs, contexts, strict=True)
        ]
    context_BNF = cat(contexts, -1)
    del contexts
    expanded_BNC = apply(context_BNF, steps.expand.weight)
    # Unless autograd records, this frees the features: the output and its norm need much memory by themselves.
    del context_BNF
    out_BNC = normalized(steps.expand, expanded_BNC, nodes, layer.gamma)
    if layer.gamma is not None:
        # Adding two layouts takes several times as long. Not in half precision: gamma's gradient sums small values.
        out_BNC = add_(laid_out_like(out_BNC, x_BNC), inside_BNC)
    out_BNC = to_dtype(out_BNC, x_BNC.dtype)
    out_BNC = outside_unchanged(out_BNC, x_BNC, nodes.mask_BN)
    # Return the input's order of strides, whatever the norms and the mask did to it.
    return laid_out_like(out_BNC, x_BNC)


def _grouped(x_BNF: Tensor, groups: int) -> Tensor:
    """(B, N, G * r) as (B, N, G, r)."""
    return x_BNF.unsqueeze(2) if groups == 1 else x_BNF.unflatten(-1, (groups, -1))


def _graphs(x_BNGr: Tensor) -> Tensor:
    """Groups as a batch dimension, (B, G, N, r); or (B, N, r) for one group, for which products have cheaper calls."""
    return x_BNGr.squeeze(2) if x_BNGr.shape[2] == 1 else x_BNGr.transpose(1, 2)


def _of_groups(x_BDr: Tensor, config: LatentGNNConfig) -> Tensor:
    """Latents in the form of `_graphs` as (B, G, D, r)."""
    return x_BDr.unsqueeze(1) if config.num_groups == 1 else x_BDr
