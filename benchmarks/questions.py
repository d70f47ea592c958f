"""Questions of a study: data, generated or read, with a network that blocks are put into.

All random numbers of a question come from its seed. `study` accepts any class that follows `Question`, yours too.
"""

import importlib
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from latentgnn.errors import UserError

# Imported by path: the examples are programs and not a package.
_darcy: Any = importlib.import_module("examples.darcy")
# Runs in one process share samples, which can take longer to make than a run.
_made = cache(_darcy.make)


class Question(Protocol):
    """Data and a network.

    Args:
        place: the submodule of the network that a block follows, or several, each followed by a block.
        channels: that the block takes and gives.
        scores: names of the scores, each with the better direction, such as ``lower`` or ``higher``.
    """

    place: str | Sequence[str]
    channels: int
    scores: Mapping[str, str]

    def network(self) -> nn.Module:
        """A network without a block, from torch's own random numbers."""

    def batches(self, seed: int, steps: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Inputs and targets of each step, in an order that the seed alone decides."""

    def loss(self, output: Tensor, target: Tensor) -> Tensor:
        """Of one batch."""

    def score(self, network: nn.Module) -> dict[str, float]:
        """The scores of a network in evaluation mode; those that it does not have are left out."""


class Darcy:
    """Darcy flow (`examples/darcy.py`): relative L2 error, on files or on samples that are made here.

    Args:
        folder: with ``train_16.npz``, ``test_16.npz`` and ``test_32.npz``; ``None`` makes samples.
        size: of the samples that are made, and a test at ``test_sizes`` besides.
        count: of training samples that are made, and a tenth as many to test, the same ground at each size.
        test_sizes: of the tests.
        batch: samples a step.
        lift: cells a side of the first convolution.
    """

    place: str | Sequence[str] = "stages"
    channels = 32
    waves = 0

    def __init__(
        self,
        *,
        folder: str | None = None,
        size: int = 16,
        count: int = 1000,
        test_sizes: tuple[int, ...] = (16, 32),
        batch: int = 20,
        lift: int = 1,
    ) -> None:
        self.lift = lift
        self.errors = [f"relative error at {test} x {test}" for test in test_sizes]
        self.scores = dict.fromkeys(self.errors, "lower")
        self.batch = batch
        if folder is None:
            train = _made(count, size, seed=0)
            tests = [_made(max(count // 10, 1), test, seed=1) for test in test_sizes]
        else:
            files = [Path(folder) / f"{name}.npz" for name in (f"train_{size}", *(f"test_{t}" for t in test_sizes))]
            for file in files:
                if not file.is_file():
                    raise UserError(f"{file}: there is no such file; give the folder of neuraloperator's Darcy files")
            train, *tests = map(_darcy.load, files)
        self.x, self.y = _darcy.inputs(train[0], self.waves), train[1]
        self.tests = tests
        self.mean, self.std = self.y.mean(), self.y.std()

    def network(self) -> nn.Module:
        net: nn.Module = _darcy.network(self.channels, lift=self.lift)
        return net

    def batches(self, seed: int, steps: int) -> Iterator[tuple[Tensor, Tensor]]:
        generator = torch.Generator().manual_seed(seed)
        for _ in range(steps):
            chosen = torch.randint(len(self.x), (self.batch,), generator=generator)
            yield self.x[chosen], self.y[chosen]

    def loss(self, output: Tensor, target: Tensor) -> Tensor:
        error: Tensor = _darcy.relative_error(output[:, 0] * self.std + self.mean, target)
        return error

    def score(self, network: nn.Module) -> dict[str, float]:
        return {name: self.error(network, *test) for name, test in zip(self.errors, self.tests, strict=True)}

    def error(self, network: nn.Module, ground: Tensor, y: Tensor) -> float:
        """The mean over samples, computed for a few at a time."""
        few = zip(ground.split(10), y.split(10), strict=True)
        return sum(self.loss(network(_darcy.inputs(x, self.waves)), true).item() * len(x) for x, true in few) / len(y)


class PointwiseDarcy(Darcy):
    """Darcy flow by a network that sees each node alone, and is tested on grids that it was not trained on.

    Only blocks move information between nodes. Besides the errors, the scores say how much the first block adds on a
    finer grid, as a multiple of what it adds on the first of ``test_sizes``: 1 if it does not depend on the grid.

    Args:
        size: of the samples to train on.
        count: of them, and a tenth as many to test, the same ground at each size.
        test_sizes: of the tests.
        batch: samples a step.
        stages: of the network, with a block each.
    """

    waves = 4

    def __init__(
        self,
        *,
        size: int = 32,
        count: int = 1000,
        test_sizes: tuple[int, ...] = (32, 64, 128),
        batch: int = 10,
        stages: int = 3,
    ) -> None:
        super().__init__(size=size, count=count, test_sizes=test_sizes, batch=batch)
        self.place = [f"stages.{stage}.mix" for stage in range(stages)]
        self.growth = [f"what the first block adds at {test} x {test}" for test in test_sizes[1:]]
        self.scores |= dict.fromkeys(self.growth, "closer to 1")

    def network(self) -> nn.Module:
        net: nn.Module = _darcy.pointwise_network(self.channels, len(self.place), self.waves)
        return net

    def score(self, network: nn.Module) -> dict[str, float]:
        scores = super().score(network)
        sizes = [self.added(network, ground) for ground, _ in self.tests]
        if sizes[0]:
            scores |= {name: size / sizes[0] for name, size in zip(self.growth, sizes[1:], strict=True)}
        return scores

    def added(self, network: nn.Module, ground: Tensor) -> float:
        """Root mean square of what the first block adds to its input, over a few samples; 0 without blocks."""
        squares: list[Tensor] = []

        def see(_: nn.Module, given: tuple[Tensor], output: Tensor) -> None:
            squares.append((output - given[0]).square().mean())

        # Another network in place of this one may have no such place.
        found = [module for name, module in network.named_modules() if name == self.place[0]]
        hooks = [module.register_forward_hook(see) for module in found]
        network(_darcy.inputs(ground[:10], self.waves))
        for hook in hooks:
            hook.remove()
        return sum(squares, torch.zeros(())).sqrt().item()


class Pairs:
    """Pairs of distant cells; each cell must tell whether its partner's level is above 0.

    A map of ``size`` x ``size`` cells has a bank of ``columns`` full columns at its left edge and one at its right;
    between them it is empty. Each cell of the left bank has a partner in the right one, drawn anew for every map. The
    two carry the same mark, one of ``marks`` that no other pair of the map has, and a level each, -1 or 1. A cell that
    knows only itself is right half of the time. By default, the stages before the block look at single cells, so marks
    reach it unmixed, and only the block can move information between cells. A single vector for the whole map would
    have to hold a level for every mark, and with more marks than channels it cannot.

    Args:
        size: cells a side.
        columns: of each bank, which makes ``size * columns`` pairs.
        marks: number of different marks.
        channels: of the network.
        kernel: cells a side of the stages' convolutions.
        batch: maps a step.
        tests: maps to score on.
    """

    place = "stages"
    scores: Mapping[str, str] = {"accuracy": "higher"}

    def __init__(
        self,
        *,
        size: int = 12,
        columns: int = 3,
        marks: int = 36,
        channels: int = 24,
        kernel: int = 1,
        batch: int = 16,
        tests: int = 256,
    ) -> None:
        self.pairs = size * columns
        if 2 * columns > size or self.pairs > marks:
            raise UserError(
                f"two banks of {columns} columns, {self.pairs} pairs of {marks} marks, do not fit in {size} x {size} "
                "cells; a bank takes at most half of the columns, and every pair a mark of its own"
            )
        self.size, self.marks, self.channels, self.kernel, self.batch = size, marks, channels, kernel, batch
        cells = torch.arange(size * size).unflatten(0, (size, size))
        self.banks = cells[:, :columns].flatten(), cells[:, size - columns :].flatten()
        self.test = self.maps(tests, torch.Generator().manual_seed(2**31))

    def maps(self, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Maps (count, marks + 1, size, size), the level last, and what each cell must say, -1 where there is none."""
        left, right = self.banks
        partners = right[torch.rand(count, self.pairs, generator=generator).argsort(1)]
        places = torch.stack([left.expand(count, -1), partners], 2).flatten(1)
        mark = torch.rand(count, self.marks, generator=generator).argsort(1)[:, : self.pairs].repeat_interleave(2, 1)
        above = torch.randint(2, (count, self.pairs, 2), generator=generator)
        x = torch.zeros(count, self.marks + 1, self.size**2)
        rows = torch.arange(count)[:, None]
        x[rows, mark, places] = 1
        x[rows, self.marks, places] = 2.0 * above.flatten(1) - 1
        said = torch.full((count, self.size**2), -1)
        said[rows, places] = above.flip(2).flatten(1)
        square = (self.size, self.size)
        return x.unflatten(2, square), said.unflatten(1, square)

    def network(self) -> nn.Module:
        def stage(width: int) -> nn.Module:
            convolution = nn.Conv2d(width, self.channels, self.kernel, padding=self.kernel // 2, bias=False)
            return nn.Sequential(convolution, nn.BatchNorm2d(self.channels), nn.ReLU())

        width = self.channels
        net = nn.Sequential()
        net.add_module("stages", nn.Sequential(stage(self.marks + 1), stage(width)))
        net.add_module("say", nn.Sequential(nn.Conv2d(width, width, 1), nn.ReLU(), nn.Conv2d(width, 2, 1)))
        return net

    def batches(self, seed: int, steps: int) -> Iterator[tuple[Tensor, Tensor]]:
        generator = torch.Generator().manual_seed(seed)
        for _ in range(steps):
            yield self.maps(self.batch, generator)

    def loss(self, output: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(output, target, ignore_index=-1)

    def score(self, network: nn.Module) -> dict[str, float]:
        x, said = self.test
        right = network(x).argmax(1) == said
        return {"accuracy": right[said >= 0].double().mean().item()}
