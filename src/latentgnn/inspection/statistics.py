"""Statistics of a block over samples: of one call, or of a whole data set in running sums."""

import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from latentgnn.inspection import measures
from latentgnn.inspection.measures import Sums
from latentgnn.inspection.recording import SeenBlock, SeenKernel, SeenSample


@dataclass(frozen=True, kw_only=True)
class Spread:
    """The distribution of a number over samples.

    Args:
        mean: mean over samples.
        std: population standard deviation over samples.
        least: smallest value.
        most: largest value.
    """

    mean: float
    std: float
    least: float
    most: float


@dataclass(frozen=True, kw_only=True)
class GraphStatistics:
    """One latent graph: one kernel in one group of channels.

    Args:
        kernel: index of the kernel.
        group: index of the group.
        latents: D.
        effective_rank: effective rank of the affinity, from 1 to D: `latentgnn.inspection.measures.effective_rank`.
        row_difference: 1 - the mean cosine of all pairs of rows; 0 if every node takes in the same.
        row_sum: mean over nodes of the row sums.
        singular_values: D singular values in descending order, averaged over samples.
        gather_usage: share of each latent as a gathering one in the sum of all weights, D numbers, averaged over
            samples.
        scatter_usage: likewise as a scattering one.
        gathers_nothing: latents without an assignment at any node of any sample.
        is_not_read: latents that no node reads: `latentgnn.inspection.measures.DEAD`.
        duplicates: pairs of latents that gather and scatter alike: `latentgnn.inspection.measures.DUPLICATE`.
    """

    kernel: int
    group: int
    latents: int
    effective_rank: Spread
    row_difference: Spread
    row_sum: Spread
    singular_values: tuple[float, ...]
    gather_usage: tuple[float, ...]
    scatter_usage: tuple[float, ...]
    gathers_nothing: tuple[int, ...]
    is_not_read: tuple[int, ...]
    duplicates: tuple[tuple[int, int], ...]

    @property
    def dead(self) -> tuple[int, ...]:
        """Latents that gather nothing or that no node reads."""
        return tuple(sorted({*self.gathers_nothing, *self.is_not_read}))


@dataclass(frozen=True, kw_only=True)
class BlockStatistics:
    """Statistics of a block over samples.

    Args:
        name: name of the block.
        samples: number of samples with nodes that took part.
        nodes: number of nodes per sample.
        gamma: gamma at the last call; ``None`` for a block without residual connection.
        change: ||output - input|| / ||input||.
        graphs: one entry per kernel and group; groups of a kernel are consecutive.
    """

    name: str
    samples: int
    nodes: Spread
    gamma: float | None
    change: Spread
    graphs: tuple[GraphStatistics, ...]

    @property
    def latents(self) -> int:
        """Number of latents of all kernels and groups."""
        return sum(graph.latents for graph in self.graphs)

    @property
    def dead(self) -> int:
        """Number of dead latents of all kernels and groups."""
        return sum(len(graph.dead) for graph in self.graphs)

    @property
    def duplicates(self) -> int:
        """Number of latents that duplicate another one, of all kernels and groups."""
        return sum(len({second for _, second in graph.duplicates}) for graph in self.graphs)

    @property
    def effective_rank(self) -> float:
        """Mean over kernels, groups and samples."""
        return sum(graph.effective_rank.mean for graph in self.graphs) / len(self.graphs)

    @property
    def row_difference(self) -> float:
        """Mean over kernels, groups and samples."""
        return sum(graph.row_difference.mean for graph in self.graphs) / len(self.graphs)

    def to_dict(self) -> dict[str, Any]:
        """Return all numbers as data for JSON."""
        return asdict(self) | {
            "latents": self.latents,
            "dead": self.dead,
            "effective_rank": self.effective_rank,
            "row_difference": self.row_difference,
        }


class _Running:
    """Running mean and spread of a sequence of numbers (Welford)."""

    def __init__(self) -> None:
        self.count, self.mean, self._squares = 0, 0.0, 0.0
        self._least, self._most = math.inf, -math.inf

    def add(self, value: float) -> None:
        self.count += 1
        step = value - self.mean
        self.mean += step / self.count
        self._squares += step * (value - self.mean)
        self._least, self._most = min(self._least, value), max(self._most, value)

    def spread(self) -> Spread:
        std = math.sqrt(max(self._squares, 0.0) / self.count)
        return Spread(mean=self.mean, std=std, least=self._least, most=self._most)


class _RunningKernel:
    """Running statistics of one kernel, for all groups."""

    def __init__(self, groups: int) -> None:
        self._total: Sums | None = None
        self._shares: Tensor | None = None
        self._count = 0
        self._spreads = [[_Running() for _ in range(3)] for _ in range(groups)]

    def add(self, kernel: SeenKernel) -> None:
        found = measures.sums(kernel)
        values_GD = measures.singular_values(found, kernel.affinity)
        numbers_3G = torch.stack(
            [
                measures.effective_rank(values_GD),
                measures.row_difference(kernel, found),
                measures.mean_row_sum(found, kernel.affinity),
            ]
        )
        for spreads, numbers in zip(self._spreads, numbers_3G.mT.tolist(), strict=True):
            for running, number in zip(spreads, numbers, strict=True):
                running.add(number)
        shares_3GD = torch.stack([values_GD, *measures.usage(found, kernel.affinity)])
        self._shares = shares_3GD if self._shares is None else self._shares + shares_3GD
        self._total = found if self._total is None else self._total + found
        self._count += 1

    def result(self, kernel: int) -> Iterable[GraphStatistics]:
        assert self._total is not None
        assert self._shares is not None
        nothing, unread = measures.gathers_nothing(self._total), measures.is_not_read(self._total)
        # A dead latent does not count as a duplicate.
        live_GD = ~(nothing | unread)
        alike = measures.duplicates(self._total) & live_GD[..., None] & live_GD[:, None]
        for group, (rank, difference, row_sum) in enumerate(self._spreads):
            values, gathers, scatters = (self._shares[:, group] / self._count).tolist()
            yield GraphStatistics(
                kernel=kernel,
                group=group,
                latents=len(values),
                effective_rank=rank.spread(),
                row_difference=difference.spread(),
                row_sum=row_sum.spread(),
                singular_values=tuple(values),
                gather_usage=tuple(gathers),
                scatter_usage=tuple(scatters),
                gathers_nothing=tuple(nothing[group].nonzero().flatten().tolist()),
                is_not_read=tuple(unread[group].nonzero().flatten().tolist()),
                duplicates=tuple((first, second) for first, second in alike[group].nonzero().tolist()),
            )


class RunningStatistics:
    """Statistics of one block, to which samples are added; it stores only sums, whatever their number.

    Args:
        name: name of the block.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._gamma: float | None = None
        self._nodes, self._change = _Running(), _Running()
        self._kernels: list[_RunningKernel] = []

    def add(self, block: SeenBlock, samples: Iterable[SeenSample] | None = None) -> None:
        """Add samples of a call of the block, by default all; samples without a node that took part are skipped."""
        self._gamma = block.gamma
        for sample in block.samples if samples is None else samples:
            nodes = sample.nodes if sample.mask is None else int(sample.mask.sum())
            if nodes == 0:
                continue
            if not self._kernels:
                self._kernels = [_RunningKernel(len(sample.values)) for _ in sample.kernels]
            self._nodes.add(nodes)
            self._change.add(sample.change)
            for running, kernel in zip(self._kernels, sample.kernels, strict=True):
                running.add(kernel)

    @property
    def has_samples(self) -> bool:
        """Whether any sample with a node that took part was added."""
        return bool(self._kernels)

    def result(self) -> BlockStatistics:
        """Return the statistics of all samples added so far.

        Raises:
            ValueError: if none was added.
        """
        if not self._kernels:
            raise ValueError(f"the block {self._name!r} saw no sample with a node that took part")
        return BlockStatistics(
            name=self._name,
            samples=self._change.count,
            nodes=self._nodes.spread(),
            gamma=self._gamma,
            change=self._change.spread(),
            graphs=tuple(graph for k, running in enumerate(self._kernels) for graph in running.result(k)),
        )
