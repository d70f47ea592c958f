"""Nodes shared between processes: against one process that has them all, in float64."""

from pathlib import Path

import pytest
import torch
from sharing import Case, all_cases, cases, in_processes, run
from sweep import relative_error
from torch import Tensor

Results = list[dict[str, dict[str, Tensor]]]


def _results(folder: Path, processes: int) -> Results:
    in_processes(processes, all_cases, folder)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(processes)]


@pytest.fixture(scope="module")
def of_two(tmp_path_factory: pytest.TempPathFactory) -> Results:
    return _results(tmp_path_factory.mktemp("two"), 2)


@pytest.fixture(scope="module")
def of_three(tmp_path_factory: pytest.TempPathFactory) -> Results:
    return _results(tmp_path_factory.mktemp("three"), 3)


def _check(case: Case, found: list[dict[str, Tensor]]) -> None:
    layer = case.layer()
    expected = run(layer, Case(case.config, kind=case.kind), *case.inputs(len(found)))
    for name, value in expected.items():
        parts = [part[name] for part in found]
        if name in ("output", "gradient"):
            joined = case.joined(parts)
        elif name.startswith("learnt"):
            assert all(torch.equal(part, parts[0]) for part in parts), name
            joined = parts[0]
        else:
            joined = torch.stack(parts).sum(0)
        assert joined.shape == value.shape, name
        assert relative_error(joined, value) < 1e-10, name


@pytest.mark.parametrize("name", cases(2))
def test_two_processes_are_one(name: str, of_two: Results) -> None:
    _check(cases(2)[name], [result[name] for result in of_two])


@pytest.mark.parametrize("name", cases(3))
def test_three_processes_are_one(name: str, of_three: Results) -> None:
    _check(cases(3)[name], [result[name] for result in of_three])
