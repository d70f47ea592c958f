"""Shared nodes beside what else spreads over processes, what passes between them, and what they refuse."""

import runpy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from sharing import Case, run
from sweep import NORMS, make_input, make_layer
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_module, distribute_tensor
from torch.nn.parallel import DistributedDataParallel
from torch.profiler import ProfilerActivity, profile

from latentgnn import LatentGNN, shard_nodes

ROOT = Path(__file__).resolve().parents[1]
EXAMPLE, PAGE = ROOT / "examples" / "sharded_strips.py", ROOT / "docs" / "sharding.md"
# Gradients are means over processes, where the loss is a sum.
WRAPPED = {
    "data_parallel": Case("graph_conv", "batch"),
    "fully_shard": Case("graph_conv", "frozen", mask=True),
    "fully_shard batch": Case("groups", "batch", parts=(0, 3)),
}
# In which dimension the nodes are spread, in parts of unequal size.
DTENSORS = {
    "height": (2, Case("graph_conv", "frozen", parts=(5,), mask=True)),
    "height, split parameters": (2, Case("graph_conv", "frozen", parts=(5,))),
    "width": (3, Case("groups_symmetric", "batch", parts=(5,), mask=True)),
    "tokens": (1, Case("mean", "layer", parts=(5,), kind="tokens", mask=True)),
    "offsets": (0, Case("graph_conv_two_kernels", "batch", parts=((6, 0, 3),), kind="offsets")),
    "batch": (0, Case("graph_conv", "frozen", parts=((6, 2, 3),), kind="batch")),
    "a point": (0, Case("graph_conv", "frozen", parts=((1,),), kind="offsets")),
}
# What one process has otherwise than the other, and what is said of it.
DISAGREEMENTS: dict[str, dict[str, Any]] = {
    "channels": {"channels": 64},
    "weights": {"gamma_init": 0.5},
    "latents": {"num_latents": (4, 5)},
    "type": {"dtype": torch.float64},
    "samples": {"samples": 2},
    "norms": {"norm": nn.LayerNorm},
    "kind of layer": {"node_scale": "mean"},
}


def _whole(value: Tensor) -> Tensor:
    return value.full_tensor() if isinstance(value, DTensor) else value


def wrapped() -> dict[str, dict[str, Tensor]]:
    """A layer that shares its nodes inside DDP and FSDP2."""
    rank, mesh = dist.get_rank(), init_device_mesh("cpu", (2,))
    found = {}
    for name, case in WRAPPED.items():
        layer = shard_nodes(case.layer(), mesh)
        module = DistributedDataParallel(layer) if name == "data_parallel" else fully_shard(layer, mesh=mesh)
        results = run(module, case, *case.inputs(2, rank))
        found[name] = {key.replace("module.", ""): _whole(value) for key, value in results.items()}
    return found


def _split(name: str, module: nn.Module, mesh: DeviceMesh) -> None:
    for key, value in list(module.named_parameters(recurse=False)):
        if len(value) > 1:
            module.register_parameter(key, nn.Parameter(distribute_tensor(value, mesh, [Shard(0)])))


def dtensors() -> dict[str, dict[str, Tensor]]:
    """Inputs and parameters that are DTensors."""
    mesh, found = init_device_mesh("cpu", (2,)), {}
    for name, (dimension, case) in DTENSORS.items():
        x, arguments = case.inputs(1)
        layer = distribute_module(case.layer(), mesh, _split if "split" in name else None)
        x = distribute_tensor(x, mesh, [Shard(dimension)]).requires_grad_()
        output = layer(x, **arguments)
        output.sin().sum().backward()
        assert isinstance(output, DTensor)
        assert output.placements == (Shard(dimension),)
        assert x.grad is not None
        gradients = {f"gradient of {key}": value.grad for key, value in layer.named_parameters()}
        learnt = {f"learnt {key}": value for key, value in layer.named_buffers()}
        results = {"output": output.detach(), "gradient": x.grad, **gradients, **learnt}
        found[name] = {key: _whole(value) for key, value in results.items()}
    return found


def counted() -> dict[str, list[list[int]]]:
    """Numbers in each all-reduce, forward and backward, for inputs of some heights; nothing else may pass."""
    found = {}
    for norm in ("frozen", "batch"):
        for height in (2, 40):
            layer = shard_nodes(make_layer("graph_conv", norm, training=True), dist.group.WORLD)
            x = make_input(2, 32, height, 3).requires_grad_()
            layer(x)  # the first call compares the processes
            output, forward = _reduced(lambda layer=layer, x=x: layer(x))
            _, backward = _reduced(lambda output=output: output.sum().backward())
            found[f"{norm} {height}"] = [forward, backward]
    return found


def _reduced(call: Callable[[], Any]) -> tuple[Any, list[int]]:
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as profiler:
        result = call()
    events = profiler.events() or []
    passed = [event.name for event in events if event.name.startswith("c10d::")]
    sizes = [event.input_shapes[0][0] for event in events if event.name == "gloo:all_reduce"]
    assert passed == ["c10d::allreduce_"] * len(sizes)
    return result, sizes


def refused() -> dict[str, str]:
    """What is said where processes disagree, and where a norm cannot be shared."""
    rank, found = dist.get_rank(), {}
    for name, other in DISAGREEMENTS.items():
        given = {"channels": 32, "num_latents": 4, "norm": nn.Identity, "samples": 1, "dtype": torch.float32}
        given.update(other if rank == 1 else {})
        samples = given.pop("samples")
        layer = shard_nodes(LatentGNN(**given), dist.group.WORLD)
        found[name] = _said(layer, torch.zeros(samples, given["channels"], 5, dtype=given["dtype"]))
    for norm in ("group", "instance"):
        found[norm] = _said(
            shard_nodes(LatentGNN(32, num_latents=4, norm=NORMS[norm]), dist.group.WORLD), torch.zeros(1, 32, 5)
        )
    return found


def _said(layer: nn.Module, x: Tensor) -> str:
    try:
        layer(x)
    except ValueError as error:
        return str(error)
    return ""


def example() -> dict[str, dict[str, Tensor]]:
    """A step of the example's network on this process's strip."""
    names = runpy.run_path(str(EXAMPLE))
    model = shard_nodes(names["network"](8).double(), dist.group.WORLD)
    strip = names["strip"](example_image())
    output = names["step"](model, strip, 100)
    return {"example": {"output": output, **{key: value.grad for key, value in model.named_parameters()}}}


def example_image() -> Tensor:
    """Of 11 rows, for strips of unequal height."""
    return make_input(2, 3, 11, 7)


def page() -> dict[str, dict[str, Tensor]]:
    """What the first program of the page learns."""
    program = PAGE.read_text().split("```py\n")[1].split("```")[0]
    assert "dist.init_process_group()\n" in program
    names: dict[str, Any] = {}
    torch.set_default_dtype(torch.float64)
    try:
        exec(program.replace("dist.init_process_group()\n", "").replace("dist.destroy_process_group()\n", ""), names)
    finally:
        torch.set_default_dtype(torch.float32)
    return {"page": {name: value.detach() for name, value in names["network"].named_parameters()}}


def mesh_of_data_and_nodes() -> dict[str, dict[str, Tensor]]:
    """Four processes: two halves of the batch, each over two; the layer fully sharded over all."""
    mesh: DeviceMesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "nodes"))
    found = {}
    for name in ("frozen", "layer", "batch"):
        case = Case("graph_conv", name)
        # Without a GPU, DDP takes no synchronised batch norm.
        for way in ("data_parallel", "fully_shard", "hybrid")[name == "batch" :]:
            layer = shard_nodes(nn.SyncBatchNorm.convert_sync_batchnorm(case.layer()), mesh["nodes"])
            if way == "data_parallel":
                module: nn.Module = DistributedDataParallel(layer)
            else:
                module = fully_shard(layer, mesh=mesh if way == "hybrid" else init_device_mesh("cpu", (4,)))
            x, _ = case.inputs(2, mesh.get_local_rank("nodes"))
            own = mesh.get_local_rank("data")
            results = run(module, case, x[own : own + 1], {})
            found[f"{way} {name}"] = {key.replace("module.", ""): _whole(value) for key, value in results.items()}
    return found
