"""Darcy flow made by the example: the solver against a known solution, the shipped solutions' scale, and the recipe."""

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch

from examples import darcy


def error_of_known_solution(points: int) -> float:
    """-div(a grad u) = f with a = 1 + x + y^2 and u = sin(pi x) sin(2 pi y), whose f is worked out by hand."""
    x, y = np.meshgrid(np.linspace(0, 1, points), np.linspace(0, 1, points), indexing="ij")
    pi = np.pi
    u = np.sin(pi * x) * np.sin(2 * pi * y)
    a = 1 + x + y**2
    flux = pi * np.cos(pi * x) * np.sin(2 * pi * y) + 2 * y * 2 * pi * np.sin(pi * x) * np.cos(2 * pi * y)
    source = 5 * pi**2 * a * u - flux
    return float(np.abs(darcy.solve(a, source) - u).max())


def test_the_solver_is_of_second_order() -> None:
    """At the sizes that the studies use."""
    sizes = (16, 32, 64, 128)
    errors = [error_of_known_solution(points) for points in sizes]
    assert errors[-1] < 5e-4
    for (coarse, more), (fine, less) in pairwise(zip(sizes, errors, strict=True)):
        assert more / less == pytest.approx(((fine - 1) / (coarse - 1)) ** 2, rel=0.1)


@pytest.mark.parametrize("size", [64, 128])
def test_what_flows_out_of_a_cell_is_what_springs_in_it(size: int) -> None:
    """Of made samples, whose ground jumps: a flux through each side, the mean of two coefficients times the slope."""
    ground = darcy.permeability(size, np.random.default_rng(1))
    pressure, step = darcy.solve(ground), 1 / (size - 1)
    outflow = np.zeros((size - 2, size - 2))
    for axis in (0, 1):
        for way in (-1, 1):
            beyond, there = (np.roll(values, way, axis) for values in (ground, pressure))
            flux = (ground + beyond) / 2 * (pressure - there) / step
            outflow += flux[1:-1, 1:-1] * step
    np.testing.assert_allclose(outflow, step**2, rtol=1e-6)


def test_a_sample_is_the_same_ground_on_any_grid() -> None:
    """Grids of 17 and 33 points share every second point of the finer one; the solutions there come close."""
    (coarse, low), (fine, high) = (darcy.make(3, size, seed=5) for size in (17, 33))
    assert (coarse == fine[:, ::2, ::2]).all()
    assert float(darcy.relative_error(low, high[:, ::2, ::2])) < 0.1


def test_samples_are_as_the_recipe_says() -> None:
    ground, pressure = darcy.make(40, 16, seed=0)
    assert ground.shape == pressure.shape == (40, 16, 16)
    assert 0.3 < ground.double().mean() < 0.7
    edge = np.ones((16, 16), bool)
    edge[1:-1, 1:-1] = False
    assert (pressure[:, edge] == 0).all()
    # By the maximum principle; the mean is the energy, and lies between those in ground of one permeability.
    assert (pressure[:, ~edge] > 0).all()
    most, least = (darcy.solve(np.full((16, 16), alone)).mean() for alone in (darcy.LOW, darcy.HIGH))
    means = pressure.mean((1, 2))
    assert least <= means.min()
    assert means.max() <= most
    again, other = darcy.make(2, 16, seed=0)[0], darcy.make(2, 16, seed=1)[0]
    assert (again == ground[:2]).all()
    assert (again != other).any()


def test_the_field_has_the_spectrum_that_it_names() -> None:
    """Over many draws, the energy of each cosine mode is 1 / (pi^2 |k|^2 + 9)^2."""
    from scipy.fft import dctn

    random = np.random.default_rng(0)
    # Of sums of 8 cosines at 9 points, this transform gives the coefficients: of unit cosines, but for these factors.
    factor = np.where(np.arange(9) > 0, 8 * 2**0.5, 16)
    modes = [dctn(darcy.random_field(9, random, modes=8), type=1) / factor / factor[:, None] for _ in range(4000)]
    energy = np.mean(np.square(modes), axis=0)
    for mode in ((0, 1), (1, 0), (2, 3), (7, 7)):
        expected = (np.pi**2 * (mode[0] ** 2 + mode[1] ** 2) + 9) ** -2.0
        assert energy[mode] == pytest.approx(expected, rel=0.1), mode
    assert energy[0, 0] == pytest.approx(0, abs=1e-20)


def test_neuraloperators_grids_begin_on_the_edge_and_end_a_step_inside(shared: Callable[[str], Path]) -> None:
    """As docs/when.md says of its files: the coarse test is every second point of the fine one, from the first on."""
    (ground, low), (fine, high) = (darcy.load(shared("darcy") / f"test_{size}.npz") for size in (16, 32))
    assert (ground == fine[:, ::2, ::2]).all()
    assert (low == high[:, ::2, ::2]).all()
    first, last = (high[:, row].mean() / high.mean() for row in (0, -1))
    assert first < 0.02
    assert last > 0.1


def test_the_pointwise_network_sees_each_node_alone() -> None:
    """A node of a finer grid at the same place is given the same value."""
    torch.manual_seed(0)
    net = darcy.pointwise_network(width=8, stages=2, waves=3)
    coarse, fine = (net(darcy.inputs(torch.ones(1, size, size, dtype=torch.bool), waves=3)) for size in (5, 9))
    torch.testing.assert_close(coarse, fine[..., ::2, ::2])
