"""A layer's gather and scatter as separate calls, for callers that have only some of a sample's nodes at a time.

Between the two are the latents' sums over all nodes of a sample, which add up over any partition of the nodes.

Axes: B batch, N nodes, C channels, S samples, G groups, D latents of all kernels in a group, r channels of a group.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from latentgnn import paths, running
from latentgnn.core import halves as core
from latentgnn.core.mix import mixed
from latentgnn.core.plan import Plan
from latentgnn.norms import is_per_node, uses_batch_statistics
from latentgnn.numerics import to_dtype, wide
from latentgnn.plain import equations
from latentgnn.plain.samples import Nodes
from latentgnn.projections import Arrangement


def why_not_halves(layer: Arrangement) -> str | None:
    """Why gather and scatter of a layer cannot be called separately; ``None`` if they can."""
    if layer.ranks is not None:
        return "its nodes are shared between processes: call latentgnn.shard_nodes(layer, None) first"
    for norm in layer.norms:
        if is_per_node(norm):
            continue
        name = type(norm).__name__
        if uses_batch_statistics(norm):
            return f"{name} in training takes statistics of all nodes: call layer.eval(), or use FrozenBatchNorm"
        return (
            f"{name} may take statistics of all nodes of a sample: use batch norm in evaluation, frozen batch norm, "
            "layer norm, RMS norm or none"
        )
    return None


def gather(
    layer: Arrangement, x_BNC: Tensor, mask_BN: Tensor | None, offsets: Sequence[int] | None
) -> tuple[Tensor, Tensor]:
    """The latents' sums over these nodes, (S, G, D, r), and their weights, (S, G, D), in the wide dtype.

    Args:
        layer: its parameters; `why_not_halves` has no objection.
        x_BNC: (B, N, C), N at least 1.
        mask_BN: nodes that take part.
        offsets: boundaries of the samples in a single row of packed nodes; ``None`` if each row is a sample.
    """
    compute, without_autocast = running.products_in(x_BNC)
    with without_autocast:
        if (plan := _plan(layer, x_BNC, mask_BN, offsets, compute)) is None:
            return equations.gathered(layer, x_BNC, Nodes(mask_BN, offsets), compute)
        return core.gather(x_BNC, mask_BN, offsets, layer.flat(), plan)


def scatter(
    layer: Arrangement,
    x_BNC: Tensor,
    mask_BN: Tensor | None,
    offsets: Sequence[int] | None,
    sums_SGDr: Tensor,
    weights_SGD: Tensor,
) -> Tensor:
    """The layer's output for these nodes, (B, N, C), from the sums over all nodes of their samples.

    Args:
        layer: its parameters; `why_not_halves` has no objection.
        x_BNC: (B, N, C), N at least 1.
        mask_BN: nodes that take part; the others are returned unchanged.
        offsets: as `gather` has them.
        sums_SGDr: what `gather` gave, added up over all nodes.
        weights_SGD: likewise.
    """
    compute, without_autocast = running.products_in(x_BNC)
    with without_autocast:
        sums_SGDr, weights_SGD = to_dtype(sums_SGDr, wide(compute)), to_dtype(weights_SGD, wide(compute))
        if (plan := _plan(layer, x_BNC, mask_BN, offsets, compute, sums_SGDr, weights_SGD)) is not None:
            return core.scatter(x_BNC, mask_BN, offsets, sums_SGDr, weights_SGD, layer.flat(), plan)
        latents = mixed(sums_SGDr, weights_SGD, running.plan_of(layer, "affine", compute, holds=False))
        return equations.scattered(layer, x_BNC, Nodes(mask_BN, offsets), compute, latents)


def _plan(
    layer: Arrangement,
    x_BNC: Tensor,
    mask_BN: Tensor | None,
    offsets: Sequence[int] | None,
    compute: torch.dtype,
    *sums: Tensor,
) -> Plan | None:
    """The core's plan; ``None`` if it cannot take the input, or gradients are needed, which it lacks here."""
    read = (x_BNC, *sums, *layer.flat())
    if torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in read):
        return None
    if paths.why_not_core(layer, x_BNC, mask_BN, compute, offsets) is not None:
        return None
    kind = layer.norm_kind
    assert kind is not None
    return running.plan_of(layer, kind, compute, holds=False)
