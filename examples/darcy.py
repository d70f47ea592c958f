"""Darcy flow: a network learns the pressure in ground of two permeabilities, each value of which depends on all of it.

    python examples/darcy.py --size 32 --count 500 --steps 250 --finer 64 128

A function of each node alone, and blocks that bring to it what is elsewhere; learnt on one grid and tested on finer
ones. The data are made here, after Li et al., "Fourier Neural Operator for Parametric Partial Differential Equations"
(2021): -div(a grad u) = 1 on the unit square, u = 0 on its edge; a is 12 where a Gaussian random field is positive and
3 elsewhere. The defaults run in seconds, and are far too few to learn from. ``benchmarks.study`` compares blocks, in
this network and in one of convolutions.
"""

import argparse
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.sparse import coo_array
from scipy.sparse.linalg import spsolve
from torch import Tensor, nn

from latentgnn import insert

Array = NDArray[np.float64]
HIGH, LOW = 12.0, 3.0
MODES = 128


def random_field(size: int, random: np.random.Generator, modes: int = MODES) -> Array:
    """A Gaussian random field of covariance (-Laplace + 9)^-2, no flux over the edge, on size x size points.

    It is a sum of cosines over the unit square, of which ``modes`` x ``modes`` are drawn whatever the size: the same
    random numbers give the same field on any grid.
    """
    waves = np.pi * np.arange(modes)
    spread = 1 / (waves[:, None] ** 2 + waves**2 + 9)
    coefficients = spread * random.standard_normal((modes, modes))
    coefficients[0, 0] = 0  # without a mean, half of the ground is permeable in expectation
    cosines = np.cos(np.linspace(0, 1, size)[:, None] * waves) * np.where(waves > 0, np.sqrt(2), 1)
    return np.asarray(cosines @ coefficients @ cosines.T)


def permeability(size: int, random: np.random.Generator) -> Array:
    """The coefficient of one sample: 12 where a random field is positive, 3 elsewhere."""
    return np.where(random_field(size, random) > 0, HIGH, LOW)


def solve(a: Array, source: Array | float = 1.0) -> Array:
    """Solve -div(a grad u) = source, u = 0 on the edge, by the five-point scheme.

    The points are a grid over the closed unit square, (n, n), n - 1 steps a side; between two points the coefficient is
    the mean of theirs. The error falls with the square of the step where a and u are smooth.

    Args:
        a: the coefficient at the points, (n, n).
        source: at the points, or one value.

    Returns:
        u at the points, (n, n).
    """
    points = len(a)
    inner = points - 2
    between_rows = (points - 1) ** 2 * (a[:-1, 1:-1] + a[1:, 1:-1]) / 2
    between_columns = (points - 1) ** 2 * (a[1:-1, :-1] + a[1:-1, 1:]) / 2
    number = np.arange(inner * inner).reshape(inner, inner)
    centre = between_rows[:-1] + between_rows[1:] + between_columns[:, :-1] + between_columns[:, 1:]
    rows, columns, values = [number.ravel()], [number.ravel()], [centre.ravel()]
    for first, second, weight in (
        (number[:-1], number[1:], between_rows[1:-1]),
        (number[:, :-1], number[:, 1:], between_columns[:, 1:-1]),
    ):
        rows += [first.ravel(), second.ravel()]
        columns += [second.ravel(), first.ravel()]
        values += [-weight.ravel(), -weight.ravel()]
    entries = (np.concatenate(values), (np.concatenate(rows), np.concatenate(columns)))
    right = np.broadcast_to(source, a.shape)[1:-1, 1:-1].ravel()
    u = np.zeros_like(a)
    u[1:-1, 1:-1] = spsolve(coo_array(entries).tocsc(), right).reshape(inner, inner)
    return u


def make(count: int, size: int, seed: int) -> tuple[Tensor, Tensor]:
    """Samples: whether the ground is permeable, (count, size, size), bool; and the pressure, likewise, float32."""
    random = np.random.default_rng(seed)
    ground = np.stack([permeability(size, random) for _ in range(count)])
    pressure = np.stack([solve(a) for a in ground])
    return torch.from_numpy(ground == HIGH), torch.from_numpy(pressure).float()


def load(path: Path) -> tuple[Tensor, Tensor]:
    """Samples from an ``.npz`` file of ``x`` (n, h, w), bool, and ``y`` (n, h, w), as neuraloperator's are."""
    with np.load(path, allow_pickle=False) as file:
        return torch.from_numpy(file["x"]), torch.from_numpy(file["y"]).float()


def inputs(ground: Tensor, waves: int = 0) -> Tensor:
    """(n, h, w) to (n, 3 + 2 waves, h, w): the ground as -1 and 1, each point's place, and cosines of its place."""
    rows, columns = (torch.linspace(0, 1, size) for size in ground.shape[1:])
    places = torch.stack(torch.meshgrid(rows, columns, indexing="ij"))
    cosines = [torch.cos(torch.pi * wave * places) for wave in range(1, waves + 1)]
    known = torch.cat([places, *cosines]).expand(len(ground), -1, -1, -1)
    return torch.cat([2 * ground[:, None].float() - 1, known], 1)


def network(width: int = 32, stages: int = 3, lift: int = 1) -> nn.Sequential:
    """(n, 3, h, w) to (n, 1, h, w), a first convolution of ``lift`` x ``lift``; a block goes after ``stages``."""
    net = nn.Sequential()
    net.add_module("lift", nn.Conv2d(3, width, lift, padding=lift // 2))
    layers = [nn.Sequential(nn.Conv2d(width, width, 3, padding=1), nn.GELU()) for _ in range(stages)]
    net.add_module("stages", nn.Sequential(*layers))
    net.add_module("project", nn.Sequential(nn.Conv2d(width, 2 * width, 1), nn.GELU(), nn.Conv2d(2 * width, 1, 1)))
    return net


class Stage(nn.Module):
    """What a block at ``mix`` brings from elsewhere, then a function of each node alone, added to its input."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.mix = nn.Identity()
        self.each = nn.Sequential(nn.Conv2d(width, 2 * width, 1), nn.GELU(), nn.Conv2d(2 * width, width, 1))

    def forward(self, x: Tensor) -> Tensor:
        x = self.mix(x)
        return x + self.each(x)


def pointwise_network(width: int = 32, stages: int = 4, waves: int = 4) -> nn.Sequential:
    """(n, 3 + 2 waves, h, w) to (n, 1, h, w), each node alone; blocks go at ``stages.K.mix``.

    Nothing in it knows the grid, so that a block whose sums over nodes are means gives a network for all grids.
    """
    net = nn.Sequential()
    first = nn.Conv2d(3 + 2 * waves, 2 * width, 1)
    net.add_module("lift", nn.Sequential(first, nn.GELU(), nn.Conv2d(2 * width, width, 1)))
    net.add_module("stages", nn.Sequential(*(Stage(width) for _ in range(stages))))
    net.add_module("project", nn.Sequential(nn.Conv2d(width, 2 * width, 1), nn.GELU(), nn.Conv2d(2 * width, 1, 1)))
    return net


def relative_error(predicted: Tensor, true: Tensor) -> Tensor:
    """The length of the error over that of the truth, in the mean over samples, (n, h, w) each."""
    return ((predicted - true).flatten(1).norm(dim=1) / true.flatten(1).norm(dim=1)).mean()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=16, help="points a side (16)")
    parser.add_argument("--count", type=int, default=64, help="samples to train on, and a tenth as many to test (64)")
    parser.add_argument("--steps", type=int, default=20, help="of training, 10 samples each (20)")
    parser.add_argument("--latents", type=int, default=32, help="of each block (32)")
    parser.add_argument("--finer", type=int, nargs="*", help="sizes to test at besides (twice the size)")
    parser.add_argument("--save", type=Path, help=".npz file that keeps the training samples")
    given = parser.parse_args()

    ground, pressure = make(given.count, given.size, seed=0)
    if given.save:
        np.savez_compressed(given.save, x=ground.numpy(), y=pressure.numpy())
    torch.manual_seed(0)
    net = pointwise_network(stages=3)
    # Each latent is a mean over its nodes, so that what is learnt on one grid holds on another.
    insert(net, {f"stages.{stage}.mix": given.latents for stage in range(3)}, reduction=1, node_scale="mean")
    optimizer = torch.optim.AdamW(net.parameters(), lr=2e-3, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, given.steps)
    mean, scale = pressure.mean(), pressure.std()

    def predict(ground: Tensor) -> Tensor:
        return net(inputs(ground, waves=4))[:, 0] * scale + mean

    for step in range(given.steps):
        chosen = torch.randint(len(ground), (10,))
        loss = relative_error(predict(ground[chosen]), pressure[chosen])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % max(given.steps // 10, 1) == 0:
            print(f"step {step}: relative error {loss.item():.3f}")
    net.eval()
    for size in (given.size, *([2 * given.size] if given.finer is None else given.finer)):
        ground, pressure = make(max(given.count // 10, 1), size, seed=1)
        with torch.no_grad():
            error = relative_error(predict(ground), pressure)
        print(f"{len(ground)} samples that it has not seen, at {size} x {size}: relative error {error.item():.3f}")


if __name__ == "__main__":
    main()
