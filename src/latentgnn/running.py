"""Runs a layer on its nodes, by the path that `latentgnn.paths` chooses."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from latentgnn import modes, paths
from latentgnn.batch_statistics import tracks, update_running
from latentgnn.core import autograd
from latentgnn.core.parameters import joined, split_latent_vector
from latentgnn.core.plan import Plan
from latentgnn.core.statistics import Statistics
from latentgnn.modes import has_values, is_exporting, is_transformed
from latentgnn.norms import NormKind, is_per_node
from latentgnn.plain import equations, few_calls
from latentgnn.plain.samples import Nodes, members
from latentgnn.projections import Arrangement
from latentgnn.ranks import Ranks, agree


def run(layer: Arrangement, x_BNC: Tensor, mask_BN: Tensor | None, offsets: Tensor | None) -> Tensor:
    """The layer's output by the path that it takes.

    Args:
        layer: the layer's projections.
        x_BNC: input, (B, N, C) any strides.
        mask_BN: nodes that take part; the others are returned unchanged.
        offsets: (S + 1,), boundaries of the samples in a single row of packed nodes; ``None`` if each row is a
            sample.

    Returns:
        (B, N, C) in the input's type.
    """
    compute, without_autocast = products_in(x_BNC)
    with without_autocast:
        if layer.ranks is not None:
            _check_ranks(layer, layer.ranks, x_BNC, offsets, compute)
        if x_BNC.numel() == 0:
            return _empty(layer, x_BNC, offsets, compute)
        traced = torch.compiler.is_compiling() or is_exporting()
        if modes.is_on_gpu(x_BNC) and not traced and x_BNC.shape[1] == 1:
            # The stride of a single node is arbitrary, and cuBLAS refuses some strides.
            x_BNC = x_BNC.clone(memory_format=torch.contiguous_format)
        return _by_path(layer, x_BNC, mask_BN, offsets, compute)


def products_in(x_BNC: Tensor) -> tuple[torch.dtype, AbstractContextManager[None]]:
    """The dtype of products over nodes, and a context to compute them in.

    The context turns autocast off, so that sums over nodes stay in float32.
    """
    device = x_BNC.device.type
    if x_BNC.is_meta or not torch.is_autocast_enabled(device) or x_BNC.dtype == torch.float64:
        return x_BNC.dtype, nullcontext()
    return torch.get_autocast_dtype(device), torch.autocast(device, enabled=False)


def _by_path(
    layer: Arrangement, x_BNC: Tensor, mask_BN: Tensor | None, offsets: Tensor | None, compute: torch.dtype
) -> Tensor:
    path, holds, _ = paths.choose(layer, x_BNC, mask_BN, compute, offsets)
    if path == "core":
        return _core(layer, x_BNC, mask_BN, offsets, compute, holds=holds)
    if path == "few_calls":
        return few_calls.latent_gnn(layer, x_BNC, mask_BN, compute)
    nodes = nodes_of(x_BNC, mask_BN, offsets, layer.ranks)
    return equations.latent_gnn(layer, x_BNC, nodes, compute, recompute=not holds)


def nodes_of(x_BNC: Tensor, mask_BN: Tensor | None, offsets: Tensor | None, ranks: Ranks | None = None) -> Nodes:
    """The `Nodes` of an input, for the plain path."""
    group = ranks.group if ranks else ""
    if offsets is None:
        return Nodes(mask_BN, group=group)
    if is_exporting() or not has_values(offsets):
        return Nodes(mask_BN, group=group, member_SN=members(offsets.to(x_BNC.device), x_BNC.shape[1]))
    if torch.compiler.is_compiling():
        # The values are not known yet.
        rise = (offsets.diff() >= 0).all() & (offsets[-1] == x_BNC.shape[1])
        torch._assert_async(rise, "offsets must rise to the number of points")
    return Nodes(mask_BN, offsets.tolist(), group)


def _check_ranks(layer: Arrangement, ranks: Ranks, x_BNC: Tensor, offsets: Tensor | None, compute: torch.dtype) -> None:
    """Refuse layers that processes cannot share; at the first call, check that all processes agree."""
    config = layer.config
    if is_exporting():
        raise ValueError("a layer whose nodes are shared cannot be exported; call shard_nodes(layer, None) first")
    for norm in layer.norms:
        if not (is_per_node(norm) or isinstance(norm, _BatchNorm)):
            raise ValueError(
                f"{type(norm).__name__} takes statistics over all nodes of a sample, which several processes hold: a "
                "layer whose nodes are shared takes batch norm, frozen batch norm, layer norm, RMS norm or none"
            )
    if torch.compiler.is_compiling() or ranks.agreed or is_transformed() or not has_values(x_BNC):
        return
    read = [x_BNC, *layer.flat()]
    facts = {
        "channels": config.channels,
        "reduced channels": config.reduced_channels,
        "latents": config.latents,
        "kind of layer": [config.symmetric, config.graph_conv, config.residual, config.num_groups, config.node_scale],
        "norms": sorted({f"{type(norm).__name__}{' in training' * norm.training}" for norm in layer.norms}),
        "type": str(compute),
        "samples": x_BNC.shape[0] if offsets is None else len(offsets) - 1,
        "gradients": torch.is_grad_enabled() and any(tensor.requires_grad for tensor in read if tensor is not None),
    }
    if not any(is_traceable_wrapper_subclass(cast(object, tensor)) for tensor in read if tensor is not None):
        facts["weights"] = layer.fingerprint()
    agree(ranks, facts, x_BNC.device)


def _empty(layer: Arrangement, x_BNC: Tensor, offsets: Tensor | None, compute: torch.dtype) -> Tensor:
    """The output for an input without nodes: empty, with zero gradients."""
    samples = x_BNC.shape[0] if offsets is None else len(offsets) - 1
    if layer.ranks is not None and samples:
        # Other processes have nodes and wait for this one's sums, so it runs one node that is masked out.
        rows = x_BNC.shape[0]
        one_BNC = torch.cat([x_BNC, x_BNC.new_zeros(rows, 1, x_BNC.shape[2])], 1)
        none_BN = torch.zeros(rows, 1, dtype=torch.bool, device=x_BNC.device)
        if offsets is not None:
            offsets = torch.nn.functional.pad(offsets[:-1], (0, 1), value=1)
        return _by_path(layer, one_BNC, none_BN, offsets, compute)[:, :0]
    total = x_BNC.new_zeros(1)
    for parameter in (parameter for part in layer.projections for parameter in part.parameters()):
        total = total + parameter.sum()
    return x_BNC + 0 * (total if layer.gamma is None else total + layer.gamma).to(x_BNC.dtype)


def _core(
    layer: Arrangement,
    x_BNC: Tensor,
    mask_BN: Tensor | None,
    offsets: Tensor | None,
    compute: torch.dtype,
    *,
    holds: bool,
) -> Tensor:
    kind = layer.norm_kind
    assert kind is not None
    plan = plan_of(layer, kind, compute, holds=holds)
    out_BNC, statistics = autograd.run(x_BNC, mask_BN, offsets, layer.flat(statistics=kind != "batch"), plan)
    if statistics is not None:
        _learn(layer, statistics, plan, x_BNC.shape[0] * x_BNC.shape[1])
    return out_BNC


def plan_of(layer: Arrangement, kind: NormKind, compute: torch.dtype, *, holds: bool) -> Plan:
    """The core's plan of a layer."""
    config, norms = layer.config, layer.norms
    return Plan(
        groups=config.num_groups,
        latents=config.latents,
        symmetric=config.symmetric,
        graph_conv=config.graph_conv,
        residual=config.residual,
        node_scale=config.node_scale,
        norm=kind,
        eps=tuple(_eps(norm, compute) for norm in norms),
        norm_groups=tuple(norm.num_groups for norm in norms if isinstance(norm, nn.GroupNorm)),
        compute=compute,
        holds=holds,
        group="" if layer.ranks is None else layer.ranks.group,
        ranks=1 if layer.ranks is None else layer.ranks.count,
    )


def _eps(norm: nn.Module, dtype: torch.dtype) -> float:
    eps = getattr(norm, "eps", 0.0)
    # ``None`` is RMS norm's default.
    return torch.finfo(dtype).eps if eps is None else eps


def _learn(layer: Arrangement, statistics: autograd.BatchStatistics, plan: Plan, count: int) -> None:
    """Update the running statistics of batch norms in training."""
    means: list[Tensor] = []
    inverses: list[Tensor] = []

    def take(found: Statistics | None, split: Callable[[Tensor], Sequence[Tensor]]) -> None:
        if found is not None:
            assert found.mean is not None
            means.extend(split(found.mean))
            inverses.extend(split(found.inverse_std))

    take(statistics.reduce, lambda vector: vector.chunk(len(layer.reduces)))
    for found in statistics.assigns:
        take(found, lambda vector: split_latent_vector(vector, plan))
    take(statistics.conv, lambda vector: vector.chunk(len(layer.convs)))
    parts = statistics.expand
    means.append(cast(Tensor, joined([part.mean for part in parts], 0)))
    inverses.append(cast(Tensor, joined([part.inverse_std for part in parts], 0)))
    learning = [
        (norm, mean, inverse) for norm, mean, inverse in zip(layer.norms, means, inverses, strict=True) if tracks(norm)
    ]
    if learning:
        norms, means, inverses = (list(column) for column in zip(*learning, strict=True))
        update_running(norms, means, inverses, count)
