"""The layer in two processes, as PyTorch spreads modules over them: against one process with the whole batch."""

import socket
from collections.abc import Callable
from pathlib import Path
from typing import cast

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

# Configuration, norm, and whether in training.
LAYERS = [
    ("graph_conv", "frozen", True),
    ("graph_conv", "layer", True),
    ("graph_conv", "batch", True),
    ("groups_symmetric", "batch", False),
    ("groups_symmetric", "group", True),
    ("no_residual", "none", True),
]


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


def given_to(name: tuple[str, str, bool]) -> list[Tensor]:
    """A map, and a mask except with group norm, which then is PyTorch's own."""
    mask = torch.ones(4, 4, 5, dtype=torch.bool)
    mask[0, 1:] = mask[3, :, 2] = False
    return [make_input(4, 32, 4, 5), mask][: 1 if name[1] == "group" else 2]


def _process(rank: int, port: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    mesh = init_device_mesh("cpu", (2,))
    results = {}
    for way, spread in WAYS.items():
        for name in LAYERS:
            layer = make_layer(*name[:2], training=name[2])
            if name[1:] == ("batch", True) and "dtensors" not in way:
                if way == "data_parallel":
                    continue  # it refuses synchronised batch norm without a GPU
                layer = cast(LatentGNN, nn.SyncBatchNorm.convert_sync_batchnorm(layer))
            module = spread(layer, mesh).train(name[2])
            own = distribute_tensor if "dtensors" in way else lambda value, *_, rank=rank: value.chunk(2)[rank]
            output = module(*(own(value, mesh, [Shard(0)]) for value in given_to(name)))
            output.sin().sum().backward()
            # Data-parallel gradients are means over processes.
            share = 1 if "dtensors" in way else 2
            gradients = {key: share * _whole(value.grad) for key, value in layer.named_parameters()}
            results[f"{way}.{name}"] = {"output": _whole(output.detach()), **gradients}
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


@pytest.mark.parametrize("name", LAYERS, ids=str)
@pytest.mark.parametrize("way", WAYS)
def test_two_processes_are_one(
    way: str, name: tuple[str, str, bool], results: list[dict[str, dict[str, Tensor]]]
) -> None:
    """Masks and split parameters too."""
    if way == "data_parallel" and name[1:] == ("batch", True):
        assert f"{way}.{name}" not in results[0]
        return
    layer = make_layer(*name[:2], training=name[2])
    output = layer(*given_to(name))
    output.sin().sum().backward()
    found = [result[f"{way}.{name}"] for result in results]
    outputs = [found[0]["output"]] if "dtensors" in way else [part["output"] for part in found]
    assert relative_error(torch.cat(outputs), output) < 1e-11
    for key, parameter in layer.named_parameters():
        assert relative_error(found[1][key], parameter.grad) < 1e-9, key
