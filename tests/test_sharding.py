"""Nodes shared between processes: against one process that has them all, in float64."""

import copy
import os
import pickle
import runpy
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from sharing import Case, Results, all_cases, cases, in_processes, run
from sharing_ways import (
    DISAGREEMENTS,
    DTENSORS,
    EXAMPLE,
    WRAPPED,
    counted,
    dtensors,
    example,
    example_image,
    mesh_of_data_and_nodes,
    page,
    refused,
    wrapped,
)
from sweep import make_input, make_layer, relative_error
from torch import Tensor, nn

from latentgnn import LatentGNN, gather_chunks, shard_nodes
from latentgnn.inspection import capture
from latentgnn.ranks import Ranks

PROGRAMS = [all_cases, wrapped, dtensors, counted, refused, example, page]


@pytest.fixture(scope="module")
def of_two(tmp_path_factory: pytest.TempPathFactory) -> Results:
    return in_processes(2, PROGRAMS, tmp_path_factory.mktemp("two"))


@pytest.fixture(scope="module")
def of_three(tmp_path_factory: pytest.TempPathFactory) -> Results:
    return in_processes(3, [all_cases], tmp_path_factory.mktemp("three"))


def _check(
    found: list[dict[str, Tensor]],
    expected: dict[str, Tensor],
    joined: Callable[[list[Tensor]], Tensor],
    gradient: Callable[[list[Tensor]], Tensor],
) -> None:
    for name, value in expected.items():
        parts = [part[name] for part in found]
        if name in ("output", "gradient"):
            result = joined(parts)
        elif name.startswith("learnt"):
            assert all(torch.equal(part, parts[0]) for part in parts), name
            result = parts[0]
        else:
            result = gradient(parts)
        assert result.shape == value.shape, name
        assert relative_error(result, value) < 1e-10, name


def _sum(parts: list[Tensor]) -> Tensor:
    return torch.stack(parts).sum(0)


def _alone(case: Case, processes: int) -> dict[str, Tensor]:
    """One process with all nodes, and no choice of memory or compiler."""
    return run(case.layer(), Case(case.config, kind=case.kind), *case.inputs(processes))


@pytest.mark.parametrize("name", cases(2))
def test_two_processes_are_one(name: str, of_two: Results) -> None:
    case = cases(2)[name]
    _check([result[name] for result in of_two], _alone(case, 2), case.joined, _sum)


@pytest.mark.slow  # three processes, and a compiler
@pytest.mark.parametrize("name", cases(3))
def test_three_processes_are_one(name: str, of_three: Results) -> None:
    case = cases(3)[name]
    _check([result[name] for result in of_three], _alone(case, 3), case.joined, _sum)


@pytest.mark.parametrize("name", WRAPPED)
def test_inside_data_parallel_and_fully_shard(name: str, of_two: Results) -> None:
    """They average over processes what is a sum over processes."""
    case, found = WRAPPED[name], [result[name] for result in of_two]
    _check(found, _alone(case, 2), case.joined, lambda parts: 2 * parts[0])
    assert all(torch.equal(found[0][key], found[1][key]) for key in found[0] if key.startswith("gradient of"))


@pytest.mark.parametrize("name", DTENSORS)
def test_dtensors_spread_over_nodes(name: str, of_two: Results) -> None:
    case = DTENSORS[name][1]
    x, arguments = case.inputs(1)
    layer, x = case.layer(), x.requires_grad_()
    output = layer(x, **arguments)
    output.sin().sum().backward()
    expected = {f"gradient of {key}": value.grad for key, value in layer.named_parameters()}
    expected |= {f"learnt {key}": value for key, value in layer.named_buffers()}
    expected |= {"output": output, "gradient": x.grad}
    for found in of_two:
        _check([found[name]], expected, lambda parts: parts[0], lambda parts: parts[0])  # type: ignore[arg-type]


def test_what_passes_between_processes_does_not_grow_with_the_nodes(of_two: Results) -> None:
    """Two samples of five latents with eight channels: sums and weights forward, features' gradients backward."""
    for found in of_two:
        for height in (2, 40):
            assert found[f"frozen {height}"] == [[2 * 5 * (8 + 1)], [2 * 5 * 8]]
        assert found["batch 2"] == found["batch 40"]
        forward, backward = found["batch 2"]
        # Of each norm the sum and the count, then the squares: two of 8 reduced channels, two of 5 latents, the graph
        # convolution's and the output's.
        norms = [[channels + 1, channels] for channels in (8, 8, 5, 5, 8, 32)]
        assert sorted(forward) == sorted([*(size for norm in norms for size in norm), 90])
        assert sorted(backward) == sorted(forward)


@pytest.mark.parametrize("name", DISAGREEMENTS)
def test_processes_that_disagree_are_told_on_all_of_them(name: str, of_two: Results) -> None:
    said = {result[name] for result in of_two}
    assert len(said) == 1
    (message,) = said
    assert f"differ in {name}: " in message
    assert "in process 0; " in message
    assert "in process 1" in message


def test_norms_over_all_nodes_of_a_sample_are_refused(of_two: Results) -> None:
    for result in of_two:
        assert result["group"].startswith("GroupNorm takes statistics over all nodes of a sample")
        assert result["instance"].startswith("InstanceNorm1d takes statistics over all nodes of a sample")


@pytest.mark.slow  # four processes
def test_a_mesh_of_data_and_nodes(tmp_path_factory: pytest.TempPathFactory) -> None:
    found = in_processes(4, [mesh_of_data_and_nodes], tmp_path_factory.mktemp("four"))
    for name in found[0]:
        case = Case("graph_conv", name.split()[-1])

        def joined(parts: list[Tensor], case: Case = case) -> Tensor:
            return torch.cat([case.joined(parts[:2]), case.joined(parts[2:])])

        _check([result[name] for result in found], _alone(case, 2), joined, lambda parts: 4 * parts[0])


def test_what_cannot_be_shared() -> None:
    with pytest.raises(TypeError, match="takes a module, got int"):
        shard_nodes(3, None)  # type: ignore[type-var]
    with pytest.raises(ValueError, match="Linear has no LatentGNN layer"):
        shard_nodes(nn.Linear(2, 2), None)
    with pytest.raises(TypeError, match="takes a process group, a device mesh or None, got str"):
        shard_nodes(LatentGNN(16, num_latents=4), "nodes")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="not in the group"):
        shard_nodes(LatentGNN(16, num_latents=4), torch.distributed.GroupMember.NON_GROUP_MEMBER)  # type: ignore[arg-type]


@pytest.fixture
def group_of_one(tmp_path: Path) -> Iterator[None]:
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


@pytest.mark.usefixtures("group_of_one")
def test_the_example_and_the_page_give_what_one_process_gives(of_two: Results) -> None:
    names = runpy.run_path(str(EXAMPLE))
    model = names["network"](8).double()
    output = names["step"](model, example_image(), 100)
    found = [result["example"] for result in of_two]
    assert [len(part["output"][0, 0]) for part in found] == [6, 5]
    assert relative_error(torch.cat([part["output"] for part in found], 2), output) < 1e-10
    for name, value in model.named_parameters():
        assert relative_error(_sum([part[name] for part in found]), value.grad) < 1e-10, name
    for name, value in page()["page"].items():
        for result in of_two:
            assert relative_error(result["page"][name], value) < 1e-10, name


def test_what_would_see_the_nodes_of_one_process_alone_is_refused() -> None:
    layer = make_layer("graph_conv", "frozen")
    layer._ranks = Ranks("of two", 2)
    with pytest.raises(TypeError, match=r"shares its nodes .* call shard_nodes\(layer, None\)"):
        gather_chunks(layer, [make_input(2, 32, 3, 3)])
    with pytest.raises(ValueError, match=r"'' shares its nodes .* call shard_nodes"), capture(layer):
        pass


@pytest.mark.usefixtures("group_of_one")
def test_alone_in_a_group() -> None:
    """A group of one; copies and pickles share as the layer does, and another process without the group is told."""
    case = Case("graph_conv")
    layer = shard_nodes(nn.Sequential(case.layer()), torch.distributed.group.WORLD)
    x, _ = case.inputs(2)
    expected = case.layer()(x)
    for one in (layer, copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert relative_error(one(x), expected) < 1e-12
    with pytest.raises(ValueError, match="cannot be exported; call shard_nodes"):
        torch.export.export(layer, (x,))
    torch.distributed.destroy_process_group()
    with pytest.raises(RuntimeError, match=r"no process group .* call latentgnn.shard_nodes"):
        layer(x)
    assert relative_error(shard_nodes(layer, None)(x), expected) < 1e-12


@pytest.mark.slow  # three processes
def test_a_process_that_is_killed_is_named_by_the_others() -> None:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = str(found.getsockname()[1])
    program = [sys.executable, str(Path(__file__).parent / "sharing_killed.py")]
    common = {**os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "3"}
    processes = [
        subprocess.Popen(program, env={**common, "RANK": str(rank)}, stderr=subprocess.PIPE, text=True)
        for rank in range(3)
    ]
    said = [process.communicate(timeout=60)[1] for process in processes]
    for rank in (0, 2):
        assert processes[rank].returncode == 1
        assert f"and rank {rank} ends with it: rank 1 is gone, or does not answer" in said[rank]
