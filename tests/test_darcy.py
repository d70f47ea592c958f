"""Darcy flow made by the example: the solver against a known solution, the shipped solutions' scale, and the recipe."""

from itertools import pairwise

import numpy as np
import pytest

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
    errors = [error_of_known_solution(points) for points in (17, 33, 65)]
    assert errors[-1] < 2e-3
    for coarse, fine in pairwise(errors):
        assert coarse / fine == pytest.approx(4, rel=0.1)


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
    energy = np.mean([dctn(darcy.random_field(8, random), norm="ortho") ** 2 for _ in range(4000)], axis=0)
    for mode in ((0, 1), (1, 0), (2, 3), (7, 7)):
        expected = (np.pi**2 * (mode[0] ** 2 + mode[1] ** 2) + 9) ** -2.0
        assert energy[mode] == pytest.approx(expected, rel=0.1), mode
    assert energy[0, 0] == pytest.approx(0, abs=1e-20)
