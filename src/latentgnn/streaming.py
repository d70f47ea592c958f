"""Inputs larger than memory: gather over chunks of nodes, scatter chunk by chunk, and gradients likewise.

The latents' sums can be added over any partition of the nodes. One sweep over the chunks gathers them, and a second one
computes the output of each chunk; the result is that of the layer on all nodes at once.

Axes: B batch, N nodes, C channels, S samples.
"""

import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from latentgnn import halves
from latentgnn.errors import UserError
from latentgnn.layer import LatentGNN, reshape
from latentgnn.numerics import wide
from latentgnn.points import PackedLatentGNN
from latentgnn.projections import Arrangement, bytes_of
from latentgnn.running import products_in
from latentgnn.sums import LatentSums

Array = Tensor | NDArray[Any]


@dataclass(frozen=True)
class Chunk:
    """Some nodes of the samples, with mask and offsets; a bare tensor or array stands for a chunk without these.

    Every chunk has nodes of the same samples, in the same order of samples. It may have any number of nodes of each
    sample, including none.

    Args:
        x: for `LatentGNN`, (B, C, *spatial), such as strips of images; for `PackedLatentGNN`, (n, C) for points of one
            scene, (n, C) with offsets, or (B, n, C). A NumPy array is converted to the layer's dtype and device; a
            tensor must have them already, like the layer's usual input.
        mask: nodes that take part, bool, (B, *spatial) or (B, n).
        offsets: (S + 1,), the start of each scene in the chunk, beginning with 0, and the end.
    """

    x: Array
    mask: Array | None = None
    offsets: Array | None = None


def gather_chunks(
    layer: LatentGNN, chunks: Iterable[Chunk | Array], *, start: LatentSums | None = None, check: bool = True
) -> LatentSums:
    """Run the first sweep: sum up the latents over all chunks. Autograd records nothing.

    Args:
        layer: a layer whose norms act on each node by itself: batch norm in evaluation mode, frozen batch norm, layer
            norm, RMS norm.
        chunks: any iterable: memory-mapped arrays, slices of a safetensors file, points from a reader.
        start: sums over earlier chunks, to continue from.
        check: store a checksum of each chunk, so that `scatter_chunk` can detect changes.

    Raises:
        TypeError: for a chunk of the wrong type, norms with statistics over all nodes, or a layer that shares its nodes
            with other processes.
        ValueError: for a chunk of the wrong shape, other samples than in earlier chunks, or no chunk.
        UserError: for a chunk whose nodes are not finite.

    Example:
        >>> layer = PackedLatentGNN(16, num_latents=4, gamma_init=0.5).eval()
        >>> points = torch.randn(1000, 16)
        >>> sums = gather_chunks(layer, points.split(300))
        >>> outputs = [scatter_chunk(layer, chunk, sums) for chunk in points.split(300)]
        >>> torch.allclose(torch.cat(outputs), layer(points[None])[0], rtol=1e-4, atol=1e-4)
        True
    """
    total, name = start, type(layer).__name__
    for index, chunk in enumerate(chunks):
        with torch.no_grad():
            part = gather_chunk(layer, chunk, check=check)
        if not part.is_finite:
            raise UserError(
                f"chunk {index} (the first is 0): {name} has sums that are not finite there, for some of its "
                f"{part.nodes} nodes are not, or are too large for {part.compute}: leave them out with a mask"
            )
        try:
            total = part if total is None else total + part
        except (UserError, ValueError) as error:
            raise type(error)(f"chunk {index} (the first is 0): {error}") from None
    if total is None:
        raise ValueError(
            f"{name} has nothing to gather from: there is no chunk; an iterator gives its chunks only once"
        )
    return total


def gather_chunk(layer: LatentGNN, chunk: Chunk | Array, *, check: bool = True) -> LatentSums:
    """Return the sums over one chunk, with gradients if autograd records; ``+`` adds sums of several chunks."""
    own, nodes = _layer(layer), _Nodes.of(layer, chunk)
    x_BNC = nodes.x_BNC
    config, reduced = layer.config, layer.config.reduced_channels // layer.config.num_groups
    if x_BNC.shape[1]:
        sums, weights = halves.gather(own, x_BNC, nodes.mask_BN, nodes.offsets)
    else:
        sums = x_BNC.new_zeros(nodes.samples, config.num_groups, sum(config.latents), reduced)
        weights = sums[..., 0]
    return LatentSums(
        # In float64, so that the number of chunks does not affect the precision; they are few numbers.
        sums=sums.to("cpu", torch.float64),
        weights=weights.to("cpu", torch.float64),
        layer=own.fingerprint(),
        compute=_name(products_in(x_BNC)[0]),
        counts=torch.tensor([nodes.count]),
        checksums=torch.tensor([_checksum(chunk)] if check else [], dtype=torch.int64),
    )


def scatter_chunk(layer: LatentGNN, chunk: Chunk | Array, sums: LatentSums, *, check: bool = True) -> Tensor:
    """Run the second sweep: the layer's output for the nodes of a chunk, from the sums over all of them.

    Args:
        layer: the layer that gathered.
        chunk: one of the chunks that were gathered, in any order.
        sums: sums over all chunks.
        check: refuse a chunk that differs from those that were gathered; without it, the nodes may be divided
            otherwise.

    Returns:
        The output, in the shape of the chunk and the layer's dtype; if autograd records, with gradients for chunk,
        parameters and sums.

    Raises:
        TypeError: as `gather_chunks` does.
        ValueError: likewise.
        UserError: if layer, weights or dtype differ from those of the sums, or a chunk has changed.
    """
    own, nodes = _layer(layer), _Nodes.of(layer, chunk)
    _check_sums(own, nodes, sums)
    if check and (nodes.count, _checksum(chunk)) not in sums.seen:
        if not len(sums.checksums):
            raise UserError("the sums were gathered with check=False: pass check=False here too")
        raise UserError(
            f"this chunk of {nodes.count} nodes is none of the {len(sums.counts)} that the sums were gathered from, or "
            "has changed since: gather again; or, if the same nodes are in other chunks now, say check=False"
        )
    if not nodes.x_BNC.shape[1]:
        return nodes.x.clone()
    device, dtype = nodes.x_BNC.device, wide(products_in(nodes.x_BNC)[0])
    given = sums.sums.to(device, dtype), sums.weights.to(device, dtype)
    return nodes.like_the_chunk(halves.scatter(own, nodes.x_BNC, nodes.mask_BN, nodes.offsets, *given))


def backward_chunk(layer: LatentGNN, chunk: Chunk | Array, sums: LatentSums) -> None:
    """Run the third sweep, in training: propagate the gradients of the sums to a chunk and the parameters.

    Before it, ``requires_grad_()`` must have been called on the sums, and ``backward()`` on the losses of all chunks.
    Gradients are added to those of the second sweep.

    Args:
        layer: the layer that gathered.
        chunk: one of the chunks that were gathered.
        sums: sums over all chunks, with gradients.

    Raises:
        ValueError: if the sums have no gradients.
        UserError: as `scatter_chunk` does.
    """
    if sums.sums.grad is None:
        raise ValueError(
            "the sums have no gradients: call sums.requires_grad_() before scatter_chunk, and backward() on the losses "
            "of all chunks before backward_chunk"
        )
    _check_sums(_layer(layer), _Nodes.of(layer, chunk), sums)
    part = gather_chunk(layer, chunk, check=False)
    if part.sums.requires_grad:
        # A symmetric layer with the published scaling does not use the weights.
        grad_weights = torch.zeros_like(sums.weights) if sums.weights.grad is None else sums.weights.grad
        torch.autograd.backward([part.sums, part.weights], [sums.sums.grad, grad_weights])


def _layer(layer: LatentGNN) -> Arrangement:
    if not isinstance(layer, LatentGNN):
        raise TypeError(f"expected a LatentGNN or PackedLatentGNN, got {type(layer).__name__}")
    own = layer.arrangement()
    if any(is_traceable_wrapper_subclass(tensor) for tensor in own.flat() if tensor is not None):
        raise TypeError(f"{type(layer).__name__} has parameters that are split over processes: put them together first")
    if own.ranks is not None and own.ranks.count > 1:
        raise TypeError(
            f"{type(layer).__name__} shares its nodes with other processes, and sums over chunks are those of this one "
            "alone: call shard_nodes(layer, None), and add the sums of all processes with + before scatter_chunk"
        )
    if (reason := halves.why_not_halves(own)) is not None:
        raise TypeError(f"{type(layer).__name__} cannot take its nodes in chunks: {reason}")
    return own


@dataclass(frozen=True)
class _Nodes:
    """A chunk in the form of the layer's equations."""

    x: Tensor
    x_BNC: Tensor
    mask_BN: Tensor | None
    offsets: list[int] | None = None
    channels_last: bool = False

    @classmethod
    def of(cls, layer: LatentGNN, chunk: Chunk | Array) -> "_Nodes":
        chunk = chunk if isinstance(chunk, Chunk) else Chunk(chunk)
        x = _input(layer, chunk.x)
        mask = None if chunk.mask is None else _tensor(chunk.mask, x.device)
        offsets = None if chunk.offsets is None else _tensor(chunk.offsets, torch.device("cpu"))
        if isinstance(layer, PackedLatentGNN):
            given = x[None] if x.dim() == 2 and offsets is None else x
            x_BNC, mask_BN, ends = layer.points_of(given, offsets, mask)
            return cls(x, x_BNC, mask_BN, None if ends is None else ends.tolist(), channels_last=True)
        if offsets is not None:
            raise ValueError("LatentGNN takes maps, without offsets; PackedLatentGNN takes packed points")
        return cls(x, *layer.nodes_of(x, mask))

    @property
    def samples(self) -> int:
        return len(self.x_BNC) if self.offsets is None else len(self.offsets) - 1

    @property
    def count(self) -> int:
        return self.x_BNC.shape[0] * self.x_BNC.shape[1]

    def like_the_chunk(self, out_BNC: Tensor) -> Tensor:
        return reshape(out_BNC if self.channels_last else out_BNC.mT, self.x.shape)


def _input(layer: LatentGNN, x: object) -> Tensor:
    if isinstance(x, Tensor):
        return x
    if not isinstance(x, np.ndarray) or x.dtype.kind != "f":
        kind = f"an array of {x.dtype}" if isinstance(x, np.ndarray) else type(x).__name__
        raise TypeError(f"a chunk must be a floating-point tensor or NumPy array, or a Chunk of them; got {kind}")
    weight = layer.gather_reduce.weight
    # PyTorch supports only native byte order, and warns about read-only memory, such as that of a memory map.
    plain = x.dtype.newbyteorder("=")
    return torch.from_numpy(np.require(x, plain, ["C", "W"])).to(weight.device, weight.dtype)


def _tensor(x: Array, device: torch.device) -> Tensor:
    return torch.from_numpy(np.array(x)).to(device) if isinstance(x, np.ndarray) else x


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _check_sums(layer: Arrangement, nodes: _Nodes, sums: LatentSums) -> None:
    now = layer.fingerprint()
    if sums.layer != now:
        raise UserError(
            f"the sums are of a layer with the fingerprint {sums.layer}, this one has {now}: take the layer and the "
            "weights that gathered them, or gather again"
        )
    compute = _name(products_in(nodes.x_BNC)[0])
    if sums.compute != compute:
        raise UserError(
            f"the sums were gathered with products in {sums.compute}, this chunk is scattered with {compute}: "
            "use the same type, and the same autocast, for both"
        )
    if nodes.samples != len(sums.sums):
        raise ValueError(f"the sums are of {len(sums.sums)} samples, this chunk has {nodes.samples}: give it the same")


def _checksum(chunk: Chunk | Array) -> int:
    """Checksum of a chunk as given. CRC-32 takes a few nanoseconds per node, and only has to detect accidents."""
    chunk, value = chunk if isinstance(chunk, Chunk) else Chunk(chunk), 0
    for part in (chunk.x, chunk.mask, chunk.offsets):
        shape = None if part is None else (tuple(part.shape), str(part.dtype).removeprefix("torch."))
        value = zlib.crc32(repr(shape).encode(), value)
        if part is not None:
            value = zlib.crc32(_bytes(part), value)
    return value


def _bytes(x: Array) -> memoryview:
    if isinstance(x, Tensor):
        return bytes_of(x)
    return np.ascontiguousarray(x).reshape(-1).view(np.uint8).data
