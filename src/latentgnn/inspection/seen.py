"""Inspect the blocks of a network while it runs, and query what each node takes from where.

Axes: N nodes of a sample, G groups, D latents of one kernel; an affinity is Q^T A P.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor, nn

from latentgnn.attachment import CHILD
from latentgnn.files.writing import replacing
from latentgnn.inspection import lines
from latentgnn.inspection.arrays import arrays_of
from latentgnn.inspection.lines import Node
from latentgnn.inspection.recording import SeenBlock, SeenSample, record
from latentgnn.inspection.running import inspected_blocks
from latentgnn.inspection.statistics import BlockStatistics, RunningStatistics
from latentgnn.layer import LatentGNN

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class Seen(Mapping[str, SeenBlock]):
    """The recordings of `capture`: a mapping from block names, in the order of the network, to each block's last call.

    Methods accept a block by its name, by the name of the submodule that it was inserted after, or by its index.
    """

    def __init__(self, names: Sequence[str]) -> None:
        self._names = tuple(names)
        self._blocks: dict[str, SeenBlock] = {}

    def __getitem__(self, block: str | int) -> SeenBlock:
        name = self._name(block)
        if name not in self._blocks:
            raise KeyError(f"the block {name!r} has not run inside `with capture(...)`; call the network there")
        return self._blocks[name]

    def __iter__(self) -> Iterator[str]:
        return (name for name in self._names if name in self._blocks)

    def __len__(self) -> int:
        return len(self._blocks)

    def __repr__(self) -> str:
        blocks = [
            f"{name!r}: {len(block.samples)} x {block.samples[0].shape if block.samples else ()}, "
            f"latents {block.layer.config.latents}"
            for name, block in self.items()
        ]
        return f"Seen({'; '.join(blocks) or 'nothing yet'})"

    def row(
        self, block: str | int, node: Node, *, sample: int = 0, kernel: int | None = None, group: int | None = None
    ) -> Tensor:
        """Return the weights with which a node takes in the values of all nodes: one row of the affinity.

        It takes D x N operations and memory for N numbers; the N x N affinity is not formed. Weights are not negative,
        and a row need not sum to one: with the published scaling its sum grows like sqrt(N). Compare weights within a
        row, but not their magnitude with that of an attention map.

        Args:
            block: which block.
            node: which node of the sample.
            sample: which image of the batch, or which scene of packed points.
            kernel: which kernel; by default the mean over all.
            group: which group of channels; by default the mean over all.

        Returns:
            The shape of the sample's nodes: (H, W) for an image, (N,) for tokens and for the points of a scene, in the
            order in which they were given. Zero at nodes outside the mask, and everywhere for a node outside it.

        Raises:
            KeyError: if there is no such block, or it has not run.
            IndexError: if there is no such node, sample, kernel or group.

        Example:
            >>> net = nn.Sequential(nn.Conv2d(3, 16, 1), LatentGNN(16, num_latents=4)).eval()
            >>> with capture(net) as seen:
            ...     y = net(torch.randn(2, 3, 10, 12))
            >>> seen.row("1", (4, 7), sample=1).shape
            torch.Size([10, 12])
        """
        return self._line(block, node, sample, kernel, group, backwards=False)

    def column(
        self, block: str | int, node: Node, *, sample: int = 0, kernel: int | None = None, group: int | None = None
    ) -> Tensor:
        """Return the weights with which all nodes take in the value of one: who listens to this node.

        Arguments, shapes and errors are those of `row`.
        """
        return self._line(block, node, sample, kernel, group, backwards=True)

    def contributions(
        self, block: str | int, node: Node, *, sample: int = 0, kernel: int | None = None, group: int | None = None
    ) -> Tensor:
        """Return each node's share of the context of one node, with a sign.

        The context of node n is o_n = sum_m a_nm v_m, with the weights a_nm of `row` and the values v_m of the nodes,
        each of unit length. The share of node m is the component of a_nm v_m along o_n, divided by the length of o_n:
        a_nm <v_m, o_n> / ||o_n||^2. Shares sum to one; a negative one means that a node pulls the other way. With
        several kernels or groups, v_m and o_n are concatenated over all of them. This is the context before graph
        convolution and expansion, which act on each node by itself.

        Arguments, shapes and errors are those of `row`. For a node without context, all shares are zero.
        """
        found = self.sample(block, sample)
        index = lines.index_of(node, found)
        kernels = found.kernels[lines.chosen("kernel", kernel, len(found.kernels))]
        groups = lines.chosen("group", group, len(found.values))
        value_GRN = found.values[groups].to(found.kernels[0].scale.dtype)
        total, length = value_GRN.new_zeros(found.nodes), value_GRN.new_zeros(())
        for each in kernels:
            row_GN = lines.row(each, groups, index)
            context_GR1 = value_GRN @ row_GN[..., None]
            total += (row_GN * (context_GR1 * value_GRN).sum(1)).sum(0)
            length += context_GR1.square().sum()
        return (total / length if length > 0 else total).view(found.shape)

    def statistics(self, block: str | int, *, sample: int | None = None) -> BlockStatistics:
        """Return effective rank, row difference, use of latents, dead ones and duplicates, and the block's change.

        All figures are exact over all nodes, computed from D x D sums; no N x N affinity is formed.

        Args:
            block: which block.
            sample: one sample of the batch; by default all of them.

        Raises:
            KeyError: if there is no such block, or it has not run.
            IndexError: if there is no such sample.
            ValueError: if no sample has a node that took part.

        Example:
            >>> net = nn.Sequential(nn.Conv2d(3, 16, 1), LatentGNN(16, num_latents=4, gamma_init=1.0)).eval()
            >>> with capture(net) as seen:
            ...     y = net(torch.randn(2, 3, 10, 12))
            >>> 1 <= seen.statistics("1").effective_rank <= 4
            True
        """
        found = self[block]
        running = RunningStatistics(found.name)
        running.add(found, None if sample is None else [self.sample(block, sample)])
        return running.result()

    def plot(
        self,
        block: str | int,
        node: Node,
        *,
        sample: int = 0,
        kernel: int | None = None,
        group: int | None = None,
        listeners: bool = False,
        image: Tensor | ArrayLike | None = None,
        points: Tensor | ArrayLike | None = None,
    ) -> "Figure":
        """Plot `row`, where a node takes its context from, or `column`, who listens to it.

        How to read it: the red circle is the node; bright nodes are those whose values it takes in. Colours begin at 0
        and end at the row's largest weight. Rows need not sum to one, and their size depends on the number of nodes;
        compare nodes within a picture, and pictures by their pattern. If the pictures of far different nodes look the
        same, the block gives the same context everywhere: `statistics` has a number for it, ``row_difference``. A
        weight says how much of a node's value flows, not whether the network's decision depends on it.

        Args:
            block: which block.
            node: which node of the sample.
            sample: which image of the batch, or which scene of packed points.
            kernel: which kernel; by default the mean over all.
            group: which group of channels; by default the mean over all.
            listeners: plot `column` instead of `row`.
            image: for maps, the input, (H, W), (C, H, W) or (H, W, C) of any size and range, shown beneath.
            points: coordinates of the sample's points, (N, 2) or (N, 3), shown from above and in perspective.

        Returns:
            A `matplotlib.figure.Figure`; a notebook shows it, ``savefig`` writes it.

        Raises:
            UserError: if matplotlib is not installed.
            ValueError: if the image or points have the wrong shape.
        """
        from latentgnn.inspection.pictures import line_figure

        found = self.sample(block, sample)
        index = lines.index_of(node, found)
        ask = self.column if listeners else self.row
        weights = ask(block, index, sample=sample, kernel=kernel, group=group)
        place = lines.place_of(index, found.shape)
        what = "who listens to node" if listeners else "what node"
        title = f"{self[block].name or 'the block'}: {what} {lines.shown(place)}{'' if listeners else ' takes in'}"
        total = f"sum of weights {float(weights.sum()):.3g}"
        return line_figure(weights, place, found.mask, title=f"{title}, {total}", image=image, points=points)

    def plot_latents(
        self,
        block: str | int,
        *,
        sample: int = 0,
        kernel: int = 0,
        group: int = 0,
        scatter: bool = False,
        most: int = 16,
        image: Tensor | ArrayLike | None = None,
        points: Tensor | ArrayLike | None = None,
    ) -> "Figure":
        """Plot a gallery of latents: the nodes that each gathers from, or scatters to; most used latents first.

        How to read it: each panel is one latent with colours of its own, from 0 to its largest assignment. Its title
        gives its number and its share of all weights. Panels that look alike are duplicates, empty ones dead.

        Args:
            block: which block.
            sample: which image of the batch, or which scene of packed points.
            kernel: which kernel.
            group: which group of channels.
            scatter: plot the assignments of scatter instead of gather.
            most: maximum number of latents to show.
            image: as in `plot`.
            points: as in `plot`.

        Raises:
            UserError: if matplotlib is not installed.
            ValueError: if the image or points have the wrong shape, or the sample has no nodes.
        """
        from latentgnn.inspection.pictures import latents_figure

        found = self.sample(block, sample)
        for what, number, count in (("kernel", kernel, len(found.kernels)), ("group", group, len(found.values))):
            lines.chosen(what, number, count)
        graphs = self.statistics(block, sample=sample).graphs
        graph = next(graph for graph in graphs if (graph.kernel, graph.group) == (kernel, group))
        usage = graph.scatter_usage if scatter else graph.gather_usage
        first = sorted(range(len(usage)), key=lambda latent: -usage[latent])[: max(most, 1)]
        seen = found.kernels[kernel]
        shown = f"all {len(usage)} latents" if len(first) == len(usage) else f"{len(first)} of {len(usage)} latents"
        return latents_figure(
            (seen.scatter if scatter else seen.raw_gather)[group],
            found.shape,
            found.mask,
            {latent: f"latent {latent}: {usage[latent]:.1%}" for latent in first},
            title=f"{self[block].name or 'the block'}: where {shown} {'scatter to' if scatter else 'gather from'}, "
            "and their share of all weights",
            image=image,
            points=points,
        )

    def save(self, path: Path | str) -> None:
        """Write all arrays to an NPZ file, in one step.

        Its names are ``BLOCK/gamma``, ``BLOCK/SAMPLE/shape``, ``.../change``, ``.../mask`` where there is one,
        ``.../values`` (G, r, N); and for every kernel ``BLOCK/SAMPLE/kernelK/gather`` and ``.../scatter`` (G, D, N),
        ``.../affinity`` (G, D, D), ``.../latents`` and ``.../mixed`` (G, D, r). ``scatter.T @ affinity @ gather`` of a
        group is its N x N affinity. Half precision is written as float32. Read it with ``numpy.load(path)``.

        Args:
            path: the file; an existing one is replaced.
        """
        with replacing(path) as file:
            arrays: dict[str, Any] = dict(arrays_of(self.values()))
            np.savez(file, **arrays)

    def sample(self, block: str | int, sample: int = 0) -> SeenSample:
        """Return what a block computed for one sample."""
        found = self[block]
        if not -len(found.samples) <= sample < len(found.samples):
            raise IndexError(f"the block {found.name!r} saw {len(found.samples)} samples; got sample={sample}")
        return found.samples[sample]

    def _line(
        self, block: str | int, node: Node, sample: int, kernel: int | None, group: int | None, *, backwards: bool
    ) -> Tensor:
        found = self.sample(block, sample)
        index = lines.index_of(node, found)
        kernels = found.kernels[lines.chosen("kernel", kernel, len(found.kernels))]
        groups = lines.chosen("group", group, len(found.values))
        line_of = lines.column if backwards else lines.row
        total_N = sum(line_of(each, groups, index).mean(0) for each in kernels)
        assert isinstance(total_N, Tensor)
        return (total_N / len(kernels)).view(found.shape)

    def _name(self, block: str | int) -> str:
        if isinstance(block, int):
            if not -len(self._names) <= block < len(self._names):
                raise KeyError(f"no block number {block}, counted from 0; there are {self._listed()}")
            return self._names[block]
        if block in self._names:
            return block
        inserted = f"{block}.{CHILD}" if block else CHILD
        if inserted in self._names:
            return inserted
        raise KeyError(f"no block {block!r}; there are {self._listed()}")

    def _listed(self) -> str:
        return ", ".join(map(repr, self._names))


@contextmanager
def capture(model: nn.Module) -> Iterator[Seen]:
    """Record what every `LatentGNN` and `PackedLatentGNN` in a network computes inside a ``with`` block.

    For each block the last call is kept: assignments of gather and scatter, latents before and after they mix, their
    affinity, and gamma, computed by the same functions as in the layer. These are R + 2 D numbers per node, in the
    dtype in which the layer computes, on its device. Outside the ``with`` block nothing is recorded, no hook remains,
    and the layer runs as usual; inside, its outputs and gradients are the same, and norms in training update their
    statistics once. ``torch.compile`` networks run uncompiled inside.

    Args:
        model: a network with blocks, or a block itself.

    Raises:
        ValueError: if the network has no block, or a block shares its nodes with other processes.

    Example:
        >>> net = nn.Sequential(nn.Conv2d(3, 16, 1), LatentGNN(16, num_latents=4)).eval()
        >>> with capture(net) as seen:
        ...     y = net(torch.randn(2, 3, 10, 12))
        >>> list(seen), seen["1"].gamma
        (['1'], 0.0)
        >>> seen["1"].samples[0].kernels[0].gather.shape  # (groups, latents, nodes)
        torch.Size([1, 4, 120])
    """
    layers = inspected_blocks(model)
    for name, layer in layers.items():
        ranks = layer.arrangement().ranks
        if ranks is not None and ranks.count > 1:
            raise ValueError(
                f"the block {name!r} shares its nodes with other processes, and only those of this process can be "
                "recorded: call shard_nodes(model, None); give it whole inputs"
            )
    seen = Seen(list(layers))
    handles = [
        layer.register_forward_hook(partial(_keep, seen, name), with_kwargs=True) for name, layer in layers.items()
    ]
    try:
        # Compiled code does not see new hooks.
        with torch.compiler.set_stance("force_eager"):
            yield seen
    finally:
        for handle in handles:
            handle.remove()


def _keep(seen: Seen, name: str, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
    assert isinstance(layer, LatentGNN)
    found = record(name, layer, args, kwargs, out)
    if found is not None:
        seen._blocks[name] = found
