"""Pictures of a block that are the same for images and scans: its latent graph, the use of latents, the rank."""

import io
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from latentgnn.inspection import BlockStatistics, Seen, SeenKernel, findings
from latentgnn.training.sections import Table

WIDTH = 13.0
"""Width of a figure in inches."""
DPI = 108
HEAT = "inferno"
"""Colour map of weights: dark is low, bright is high."""
INK, QUIET = "#1c1f23", "#5a626b"
NODE_COLOURS = ("#2dd4ff", "#7dff6a", "#ff7bd5", "#ffd84a", "#b49bff", "#ff8a5c")
"""Colours of chosen nodes, in order, visible on dark and bright backgrounds."""

MOST_NODES = len(NODE_COLOURS)
_MOST_LATENTS = 12
_MOST_BARS = 64


@dataclass(frozen=True, kw_only=True)
class Latent:
    """One latent of a block, to be drawn.

    Args:
        number: its index in its kernel.
        kernel: index of the kernel.
        group: index of the channel group.
        usage: its share of the sum of all weights of its latent graph.
        weights: its gather weight of each node, P, in the shape of the nodes.
    """

    number: int
    kernel: int
    group: int
    usage: float
    weights: NDArray[np.float32]

    @property
    def title(self) -> str:
        """Its name and share of use."""
        place = "".join(f"{name} {n}, " for name, n in (("kernel", self.kernel), ("group", self.group)) if n)
        return f"{place}latent {self.number}: {self.usage:.0%}"


def most_used(seen: Seen, block: str, statistics: BlockStatistics) -> list[Latent]:
    """Return the latents that pass on most of the context, from all kernels and groups."""
    sample = seen.sample(block)
    ranked = sorted(
        (
            (usage / len(statistics.graphs), graph.kernel, graph.group, number)
            for graph in statistics.graphs
            for number, usage in enumerate(graph.gather_usage)
        ),
        reverse=True,
    )
    return [
        Latent(
            number=number,
            kernel=kernel,
            group=group,
            usage=usage,
            weights=as_array(_gathered(sample.kernels[kernel], group, number).reshape(sample.shape)),
        )
        for usage, kernel, group, number in ranked[:_MOST_LATENTS]
    ]


def _gathered(kernel: SeenKernel, group: int, number: int) -> Tensor:
    """P of one latent, (N,)."""
    return kernel.raw_gather[group, number] * kernel.scale[group, number]


def as_array(tensor: Tensor) -> NDArray[np.float32]:
    """Convert a tensor to an array for drawing."""
    return tensor.detach().float().cpu().numpy()


def concentration(row: NDArray[np.float32]) -> str:
    """Describe the fraction of nodes that half of a row's weight comes from.

    Example:
        >>> concentration(np.array([0, 6, 2, 2], np.float32))
        'half from 25% of nodes'
        >>> concentration(np.zeros(4, np.float32))
        'it takes in nothing'
    """
    weights = np.sort(row.ravel())[::-1]
    total = float(weights.sum())
    if total <= 0:
        return "it takes in nothing"
    half = float(np.searchsorted(np.cumsum(weights), total / 2) + 1) / weights.size
    return f"half from {half:.0%} of nodes"


def strength(values: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return weights relative to the largest, ignoring a few outliers that would make all others dark."""
    top = float(np.quantile(values, 0.998)) if values.size else 0.0
    top = top if top > 0 else float(values.max(initial=0.0))
    return np.clip(values / top, 0, 1) if top > 0 else np.zeros_like(values)


def draw_graph(figure: Any, seen: Seen, block: str, statistics: BlockStatistics) -> None:
    """Draw the first latent graph as a matrix, the use of its latents, and the singular values of the affinity.

    Args:
        figure: a matplotlib figure, or a part of one.
        seen: what was recorded for one sample.
        block: name of the block.
        statistics: statistics of the block.
    """
    graph = statistics.graphs[0]
    order = np.argsort(graph.gather_usage)[::-1]
    affinity = as_array(seen.sample(block).kernels[0].affinity[0])[np.ix_(order, order)]
    matrix, usage, spectrum = figure.subplots(1, 3, width_ratios=(1, 1.25, 1.25))
    shown = matrix.imshow(affinity, cmap=HEAT, vmin=0, interpolation="nearest")
    figure.colorbar(shown, ax=matrix, shrink=0.8)
    many = f", kernel 0, group 0 of {len(statistics.graphs)} graphs" if len(statistics.graphs) > 1 else ""
    matrix.set_title(f"latent graph{many}", fontsize=10, color=INK)
    matrix.set_xlabel("takes in from latent, most used first", fontsize=9)
    matrix.set_ylabel("latent", fontsize=9)
    count = min(len(order), _MOST_BARS)
    places = np.arange(count)
    usage.bar(places - 0.2, 100 * np.array(graph.gather_usage)[order][:count], 0.4, color="#0b6bb8", label="gathers")
    usage.bar(places + 0.2, 100 * np.array(graph.scatter_usage)[order][:count], 0.4, color="#c8500a", label="scatters")
    usage.axhline(100 / len(order), color=QUIET, linewidth=0.8, linestyle="--", label="an equal share")
    usage.set_title(f"use of latents, %: {len(graph.dead)} of {len(order)} dead", fontsize=10, color=INK)
    usage.set_xlabel("latent, most used first", fontsize=9)
    usage.legend(frameon=False, fontsize=8)
    values = np.array(graph.singular_values)
    largest = values.max(initial=0.0)
    spectrum.plot(np.arange(1, len(values) + 1), values / largest if largest else values, color="#0a7d57", marker=".")
    spectrum.axvline(graph.effective_rank.mean, color=QUIET, linewidth=0.8, linestyle="--")
    rank = f"effective rank {graph.effective_rank.mean:.1f} of {len(values)}"
    spectrum.set_title(f"singular values of the affinity: {rank}", fontsize=10, color=INK)
    spectrum.set_xlabel("number", fontsize=9)
    spectrum.set_ylim(0, 1.05)
    for axes in (matrix, usage, spectrum):
        axes.tick_params(labelsize=8, colors=QUIET)
        axes.xaxis.get_major_locator().set_params(integer=True)
    matrix.yaxis.get_major_locator().set_params(integer=True)
    for axes in (usage, spectrum):
        axes.spines[["top", "right"]].set_visible(False)


def figures_table(statistics: BlockStatistics) -> Table:
    """Return a table of a block's figures on one input."""
    rows = (
        ("gamma", "none" if statistics.gamma is None else f"{statistics.gamma:.3g}"),
        ("changes its input by", f"{statistics.change.mean:.1%}"),
        ("nodes", f"{statistics.nodes.mean:,.0f}"),
        ("rows differ (0: all nodes take in the same)", f"{statistics.row_difference:.3f}"),
        ("effective rank", f"{statistics.effective_rank:.1f}"),
        ("dead latents", f"{statistics.dead} of {statistics.latents}"),
        ("latents that do what another does", f"{statistics.duplicates}"),
    )
    return Table(title="Figures", columns=("", ""), rows=rows)


def in_words(statistics: BlockStatistics) -> str:
    """Explain the figures in words."""
    return " ".join(f"{text[0].upper()}{text[1:]}" for text in map(str, findings(statistics)))


def png_of(figure: Any) -> bytes:
    """Return a figure as the content of a PNG file."""
    stream = io.BytesIO()
    figure.savefig(stream, format="png", dpi=DPI)
    return stream.getvalue()


def grid(count: int, most_columns: int) -> tuple[int, int]:
    """Return rows and columns for a number of panels.

    Example:
        >>> grid(12, 6), grid(4, 6), grid(7, 6)
        ((2, 6), (1, 6), (2, 6))
    """
    return max(1, -(-count // most_columns)), most_columns
