"""The layer in two processes, as PyTorch spreads modules over them: against one process with the whole batch."""

import socket
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from sweep import make_input, make_layer, relative_error
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_module, distribute_tensor

from latentgnn import LatentGNN

NORMS = ["frozen", "layer"]


def _fully_sharded(layer: LatentGNN, mesh: DeviceMesh) -> nn.Module:
    return fully_shard(layer, mesh=mesh)


def _replicated(layer: LatentGNN, mesh: DeviceMesh) -> nn.Module:
    return distribute_module(layer, mesh)


def _sharded(layer: LatentGNN, mesh: DeviceMesh) -> nn.Module:
    def shard(name: str, module: nn.Module, mesh: DeviceMesh) -> None:
        for key, value in list(module.named_parameters(recurse=False)):
            placement = Shard(0) if value.shape[0] > 1 else Replicate()
            module.register_parameter(key, nn.Parameter(distribute_tensor(value, mesh, [placement])))

    return distribute_module(layer, mesh, shard)


def _data_parallel(layer: LatentGNN, mesh: DeviceMesh) -> nn.Module:
    return nn.parallel.DistributedDataParallel(layer)


WAYS: dict[str, Callable[[LatentGNN, DeviceMesh], nn.Module]] = {
    "fully_shard": _fully_sharded,
    "replicated_dtensors": _replicated,
    "sharded_dtensors": _sharded,
    "data_parallel": _data_parallel,
}


def _whole(value: Tensor) -> Tensor:
    return value.full_tensor() if isinstance(value, DTensor) else value


def _process(rank: int, port: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    mesh = init_device_mesh("cpu", (2,))
    x, results = make_input(4, 32, 4, 5), {}
    for way, spread in WAYS.items():
        for norm in NORMS:
            layer = make_layer("graph_conv", norm, training=True)
            module = spread(layer, mesh)
            output = module(distribute_tensor(x, mesh, [Shard(0)]) if "dtensors" in way else x.chunk(2)[rank])
            output.sin().sum().backward()
            # Data-parallel gradients are means over processes.
            share = 1 if "dtensors" in way else 2
            gradients = {name: share * _whole(value.grad) for name, value in layer.named_parameters()}
            results[f"{way}.{norm}"] = {"output": _whole(output.detach()), **gradients}
    torch.save(results, Path(folder) / f"{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, dict[str, Tensor]]]:
    folder = tmp_path_factory.mktemp("processes")
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = int(found.getsockname()[1])
    mp.spawn(_process, args=(port, str(folder)), nprocs=2)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(2)]


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("way", WAYS)
def test_two_processes_are_one(way: str, norm: str, results: list[dict[str, dict[str, Tensor]]]) -> None:
    layer = make_layer("graph_conv", norm, training=True)
    output = layer(make_input(4, 32, 4, 5))
    output.sin().sum().backward()
    found = [result[f"{way}.{norm}"] for result in results]
    outputs = [found[0]["output"]] if "dtensors" in way else [part["output"] for part in found]
    assert relative_error(torch.cat(outputs), output) < 1e-11
    for name, parameter in layer.named_parameters():
        assert relative_error(found[1][name], parameter.grad) < 1e-9, name
