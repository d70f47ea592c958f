"""Records what one call of a block computed, with the functions that run the block.

Axes: B batch, N nodes, C channels, G groups, r = R / G reduced channels per group, D latents of one kernel. Stored
tensors have nodes last, so that the assignments to one latent are contiguous and form a map: (G, D, N).
"""

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from torch.nn.utils.stateless import _reparametrize_module

from latentgnn import functional, running
from latentgnn.core.nodes import blocks, nodes_per_block
from latentgnn.dtensors import whole_parameters
from latentgnn.layer import LatentGNN
from latentgnn.modes import has_values
from latentgnn.norms import is_per_node
from latentgnn.numerics import wide
from latentgnn.plain import equations
from latentgnn.plain.steps import steps_of
from latentgnn.points import PackedLatentGNN, checked_offsets, scenes


@dataclass(frozen=True, kw_only=True)
class SeenKernel:
    """One kernel of a block on one sample: the factors of its affinity Q^T A P, and its latents.

    Args:
        raw_gather: P without its scale over nodes, (G, D, N), zero at nodes that take no part.
        scale: factor that turns `raw_gather` into P, (G, D, 1), in the wide dtype.
        scatter: Q, (G, D, N), zero at nodes that take no part.
        affinity: A, (G, D, D); row d contains the weights with which latent d takes in the others, and sums to one.
        latents: Z, the latents before they mix, (G, D, r).
        mixed: Y = A Z, (G, D, r).
    """

    raw_gather: Tensor
    scale: Tensor
    scatter: Tensor
    affinity: Tensor
    latents: Tensor
    mixed: Tensor

    @property
    def gather(self) -> Tensor:
        """P, (G, D, N), in the wide dtype."""
        return self.raw_gather * self.scale


@dataclass(frozen=True, kw_only=True)
class SeenSample:
    """What a block computed for one sample: an image, a volume, a sequence, or a scene of packed points.

    Args:
        kernels: one entry per kernel.
        values: V, (G, r, N).
        shape: shape of the nodes: (H, W) for a map, (N,) for tokens and points.
        mask: nodes that took part, (N,) bool; ``None`` for all.
        input_length: Euclidean norm of the block's input over the nodes that took part.
        change_length: Euclidean norm over these nodes of what the block added to it, output - input.
    """

    kernels: tuple[SeenKernel, ...]
    values: Tensor
    shape: tuple[int, ...]
    mask: Tensor | None
    input_length: float
    change_length: float

    @property
    def nodes(self) -> int:
        """Number of nodes N, including those that took no part."""
        return int(self.values.shape[-1])

    @property
    def change(self) -> float:
        """How much the block changes its input, ||output - input|| / ||input||; 0 for an input of 0."""
        return self.change_length / self.input_length if self.input_length else 0.0


@dataclass(frozen=True, kw_only=True)
class SeenBlock:
    """One call of a block.

    Args:
        name: name of the block, as in ``model.named_modules()``.
        layer: the block itself.
        gamma: factor that the result was multiplied by; ``None`` for a block without residual connection.
        samples: one entry per sample of the batch.
    """

    name: str
    layer: LatentGNN
    gamma: float | None
    samples: tuple[SeenSample, ...]


class _Call(NamedTuple):
    """Input and output of a block's call, with nodes as the second-last dimension."""

    x_BNC: Tensor
    out_BNC: Tensor
    mask_BN: Tensor | None
    offsets: Tensor | None
    shape: tuple[int, ...] | None


def record(name: str, layer: LatentGNN, args: tuple[Any, ...], kwargs: Mapping[str, Any], out: Any) -> SeenBlock | None:
    """Record a call of a block and what was computed in it; ``None`` if tensors have no data.

    Args:
        name: name of the block.
        layer: the block.
        args: positional arguments of the call.
        kwargs: keyword arguments of the call.
        out: output of the call.
    """
    if not isinstance(out, Tensor) or not has_values(out):
        return None
    with torch.no_grad():
        call = _call(layer, args, kwargs, out)
        compute, _ = running.products_in(call.x_BNC)
        gamma = float(layer.gamma.detach()) if layer.config.residual else None
        # Norms in training update running statistics: here copies of them, as they must not be updated twice.
        own = {key: buffer.clone() for key, buffer in layer.named_buffers()}
        with (
            torch.autocast(call.x_BNC.device.type, enabled=False),
            _reparametrize_module(layer, own | whole_parameters(layer)),
        ):
            samples = _samples(layer, call, compute)
    return SeenBlock(name=name, layer=layer, gamma=gamma, samples=samples)


def _call(layer: LatentGNN, args: tuple[Any, ...], kwargs: Mapping[str, Any], out: Tensor) -> _Call:
    given = inspect.signature(layer.forward).bind(*args, **kwargs).arguments
    x, mask = given["x"], cast(Tensor | None, given.get("mask"))
    if not isinstance(layer, PackedLatentGNN):
        mask_BN = None if mask is None else mask.flatten(1)
        return _Call(x.flatten(2).mT, out.flatten(2).mT, mask_BN, None, tuple(x.shape[2:]))
    if x.is_nested:
        return _Call(x.values()[None], cast(Any, out).values()[None], None, x.offsets().cpu(), None)
    if x.dim() == 3:
        return _Call(x, out, mask, None, (x.shape[1],))
    if (offsets := given.get("offsets")) is not None:
        return _Call(x[None], out[None], None, checked_offsets(offsets, x.shape[0]), None)
    order, offsets = scenes(given["batch"], x.shape[0], given.get("num_scenes"), shared=False)
    if order is not None:
        x, out = x[order], out[order]
    return _Call(x[None], out[None], None, offsets, None)


def _samples(layer: LatentGNN, call: _Call, compute: torch.dtype) -> tuple[SeenSample, ...]:
    x_BNC, out_BNC, mask_BN, offsets, shape = call
    values_BGRN, assigns = _over_nodes(layer, x_BNC, mask_BN, offsets, compute)
    bounds = None if offsets is None else list(pairwise(offsets.tolist()))
    parts = [(row, slice(None)) for row in range(len(x_BNC))]
    if bounds is not None:
        parts = [(0, slice(first, last)) for first, last in bounds]
    samples = []
    for row, nodes in parts:
        value_GRN = values_BGRN[row, ..., nodes]
        mask_N = None if mask_BN is None else mask_BN[row]
        input_length, change_length = _lengths(x_BNC[row, nodes], out_BNC[row, nodes], mask_N)
        samples.append(
            SeenSample(
                kernels=tuple(_kernel(layer, value_GRN, p[row, ..., nodes], q[row, ..., nodes]) for p, q in assigns),
                values=value_GRN,
                shape=(value_GRN.shape[-1],) if shape is None else shape,
                mask=None if mask_N is None else mask_N.clone(),
                input_length=input_length,
                change_length=change_length,
            )
        )
    return tuple(samples)


def _over_nodes(
    layer: LatentGNN, x_BNC: Tensor, mask_BN: Tensor | None, offsets: Tensor | None, compute: torch.dtype
) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
    """V (B, G, r, N); and for every kernel P, without its scale, and Q, (B, G, D, N)."""
    config, parts = layer.config, layer.arrangement()
    batch, nodes, _ = x_BNC.shape
    steps = steps_of(parts, compute)
    groups, width = config.num_groups, config.reduced_channels // config.num_groups

    def empty(features: int) -> Tensor:
        return x_BNC.new_empty(batch, groups, features, nodes, dtype=compute)

    values = empty(width)
    assigns = [(p := empty(count), p if config.symmetric else empty(count)) for count in config.latents]
    norms = [projection.norm for projection in (*parts.reduces, *(part for way in parts.assigns for part in way))]
    by_node = all(map(is_per_node, norms))
    numbers = config.channels + 4 * (config.reduced_channels + groups * sum(config.latents))
    most = nodes_per_block(x_BNC.device, numbers) if by_node else None
    # Norms of single nodes do not depend on the sample that a node belongs to.
    for block in blocks(x_BNC, None, most):
        mask = None if mask_BN is None else block.of(mask_BN)
        x = block.of(x_BNC) if mask is None else block.of(x_BNC).masked_fill(~mask[..., None], 0)
        here = running.nodes_of(x, mask, None if by_node else offsets)
        found = equations.values_of(config, steps.reduces, x, here, compute)
        values[block.rows, ..., block.nodes] = found[0].permute(0, 2, 3, 1)
        for index, (p, q) in enumerate(assigns):
            gather, scatter = equations.assignments(config, steps, index, found, here, compute)
            p[block.rows, ..., block.nodes] = gather.permute(0, 2, 3, 1)
            if not config.symmetric:
                back = scatter if mask is None else scatter * mask[..., None, None]
                q[block.rows, ..., block.nodes] = back.permute(0, 2, 3, 1)
    return values, assigns


def _kernel(layer: LatentGNN, value_GRN: Tensor, gather_GDN: Tensor, scatter_GDN: Tensor) -> SeenKernel:
    assign_GND = gather_GDN.mT
    latent_GDR, scale_GD1 = (
        functional.gather(value_GRN.mT, assign_GND),
        equations.scale_of_sums(layer.config, assign_GND),
    )
    scale_GD1 = latent_GDR.new_ones(*gather_GDN.shape[:2], 1) if scale_GD1 is None else scale_GD1
    latent_GDR = latent_GDR * scale_GD1
    return SeenKernel(
        raw_gather=gather_GDN,
        scale=scale_GD1,
        scatter=scatter_GDN,
        affinity=functional.affinity(latent_GDR),
        latents=latent_GDR,
        mixed=functional.mix(latent_GDR),
    )


def _lengths(x_NC: Tensor, out_NC: Tensor, mask_N: Tensor | None) -> tuple[float, float]:
    """The norm of the input over the nodes that take part, and that of what was added to it."""
    squares = torch.zeros(2, dtype=torch.float64, device=x_NC.device)
    rows: Sequence[Tensor] = () if mask_N is None else mask_N.split(1 << 16)
    for index, (x, out) in enumerate(zip(x_NC.split(1 << 16), out_NC.split(1 << 16), strict=True)):
        before = x.to(wide(x.dtype))
        added = out.to(wide(out.dtype)) - before
        if mask_N is not None:
            before = before * rows[index][:, None]
        squares += torch.stack([before.square().sum(), added.square().sum()])
    lengths = squares.sqrt().tolist()
    return lengths[0], lengths[1]
