"""Layers whose nodes several processes share, and the same inputs for one process that holds them all."""

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from sweep import CONFIGS, make_input, make_layer
from torch import Tensor, nn

from latentgnn import PackedLatentGNN, paths, shard_nodes
from latentgnn.layer import LatentGNN

Results = list[dict[str, Any]]


def in_processes(count: int, programs: Sequence[Callable[[], dict[str, Any]]], folder: Path) -> Results:
    """What functions give in so many processes, with a process group between them."""
    mp.spawn(_started, args=(count, programs, str(folder)), nprocs=count)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(count)]


def _started(rank: int, count: int, programs: Sequence[Callable[[], dict[str, Any]]], folder: str) -> None:
    torch.set_num_threads(1)
    # As in all tests; what compilers warn of is nobody's here who compiles.
    warnings.filterwarnings("error", message=".*latentgnn.*")
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=count)
    results: dict[str, Any] = {}
    for program in programs:
        results.update(program())
    torch.save(results, Path(folder) / f"{rank}.pt")
    dist.destroy_process_group()


@dataclass(frozen=True)
class Case:
    """A layer, and how its nodes are spread.

    Args:
        config: of `sweep.CONFIGS`.
        norm: of `sweep.NORMS`.
        training: the layer is.
        parts: rows of a map's height, or points of each scene, that each process has.
        mask: some nodes take no part.
        kind: ``map``, ``tokens``, ``offsets`` or ``batch``.
        memory: as `latentgnn.paths.memory` takes it.
        compiled: by a compiler that traces, and does not generate code.
    """

    config: str
    norm: str = "frozen"
    training: bool = True
    parts: tuple[Any, ...] = (5, 2)
    mask: bool = False
    kind: str = "map"
    memory: Any = "auto"
    compiled: bool = False

    def layer(self) -> LatentGNN:
        made = make_layer(self.config, self.norm, training=self.training)
        if self.kind == "map":
            return made
        packed = PackedLatentGNN.from_config(made.config, dtype=torch.float64).train(self.training)
        packed.load_state_dict(made.state_dict())
        return packed

    def inputs(self, processes: int, rank: int | None = None) -> tuple[Tensor, dict[str, Any]]:
        """Those of a rank, or of one process that has all; the arguments by name."""
        if self.kind in ("offsets", "batch"):
            return self._points(processes, rank)
        height = sum(self.parts[:processes])
        first = sum(self.parts[: rank or 0])
        own = slice(None) if rank is None else slice(first, first + self.parts[rank])
        x, taken = (
            make_input(2, 32, height, 3),
            torch.rand(2, height, 3, generator=torch.Generator().manual_seed(3)) > 0.3,
        )
        x, taken = x[:, :, own], taken[:, own]
        if self.kind == "tokens":
            x, taken = x.flatten(2).mT, taken.flatten(1)
        return x, {"mask": taken} if self.mask else {}

    def _points(self, processes: int, rank: int | None) -> tuple[Tensor, dict[str, Any]]:
        """Each scene's points, the first process's before the second's."""
        counts = torch.tensor(self.parts[:processes])
        scenes = torch.cat([torch.arange(counts.shape[1]).repeat_interleave(own) for own in counts])
        holders = torch.arange(processes).repeat_interleave(counts.sum(1))
        x = make_input(len(scenes), 32)
        if rank is not None:
            x, scenes = x[holders == rank], scenes[holders == rank]
        elif self.kind == "offsets":
            x, scenes = x[scenes.argsort(stable=True)], scenes.sort().values
        if self.kind == "batch":
            return x, {"batch": scenes, **({} if rank is None else {"num_scenes": counts.shape[1]})}
        return x, {"offsets": nn.functional.pad(scenes.bincount(minlength=counts.shape[1]).cumsum(0), (1, 0))}

    def joined(self, parts: Sequence[Tensor]) -> Tensor:
        """What processes have of the nodes, in the order of one process that has all."""
        if self.kind == "map":
            return torch.cat(list(parts), 2)
        if self.kind == "tokens":
            return torch.cat(list(parts), 1)
        if self.kind == "batch":
            return torch.cat(list(parts))
        counts = self.parts[: len(parts)]
        split = [part.split(list(own)) for part, own in zip(parts, counts, strict=True)]
        return torch.cat([of_rank[scene] for scene in range(len(counts[0])) for of_rank in split])


def run(layer: nn.Module, case: Case, x: Tensor, arguments: dict[str, Any]) -> dict[str, Tensor]:
    """Output, gradients, and statistics that were learnt."""
    x = x.clone().requires_grad_()
    called = torch.compile(layer, backend="aot_eager", fullgraph=case.kind == "map") if case.compiled else layer
    with paths.memory(case.memory):
        output = called(x, **arguments)
        # A loss that is the sum of the parts', and differs from node to node.
        output.sin().mul(x.detach() + 2).sum().backward()
    assert x.grad is not None
    gradients = {f"gradient of {name}": value.grad for name, value in layer.named_parameters()}
    learnt = {f"learnt {name}": value.clone() for name, value in layer.named_buffers()}
    return {"output": output.detach(), "gradient": x.grad, **gradients, **learnt}  # type: ignore[dict-item]


def cases(processes: int) -> dict[str, Case]:
    """What is run in so many processes."""
    if processes == 3:
        made = [Case("graph_conv", norm, parts=(1, 2, 0), compiled=True) for norm in ("frozen", "batch", "layer")]
        made += [
            Case("graph_conv_two_kernels", parts=(3, 0, 2)),
            Case("groups_symmetric", "batch", parts=(0, 4, 1), mask=True),
            Case("mean", "batch", parts=(2, 2, 2)),
            Case("graph_conv", kind="offsets", parts=((2, 0, 3), (0, 0, 0), (4, 5, 0))),
        ]
        return {str(case): case for case in made}
    made = [Case(config, norm) for config in CONFIGS for norm in ("frozen", "batch")]
    made += [Case("graph_conv_two_kernels", norm) for norm in ("layer", "rms", "none")]
    made += [Case("groups_graph_conv", norm, False) for norm in ("batch", "torchvision_frozen")]
    made += [Case(*what, parts=(0, 4)) for what in (("graph_conv", "frozen"), ("mean_symmetric", "batch"))]
    made += [Case("graph_conv", norm, mask=True, parts=(3, 1)) for norm in ("frozen", "batch", "layer")]
    made += [Case("groups", "batch", mask=True, parts=(4, 0)), Case("no_residual_graph_conv", mask=True, parts=(4, 0))]
    made += [Case("graph_conv_two_kernels", compiled=True)]
    made += [Case("graph_conv", memory=memory) for memory in ("hold", "recompute")]
    made += [Case("graph_conv", norm, kind="tokens", mask=True) for norm in ("frozen", "layer")]
    scenes = ((3, 0, 5, 0), (2, 4, 0, 0))
    made += [
        Case("graph_conv_two_kernels", norm, kind=kind, parts=scenes)
        for norm in ("frozen", "batch", "layer")
        for kind in ("offsets", "batch")
    ]
    made += [Case("symmetric", "batch", kind="batch", parts=((0, 0), (2, 4)))]
    return {str(case): case for case in made}


def all_cases() -> dict[str, dict[str, Tensor]]:
    """What each process does with `cases`."""
    count, rank = dist.get_world_size(), dist.get_rank()
    return {
        name: run(shard_nodes(case.layer(), dist.group.WORLD), case, *case.inputs(count, rank))
        for name, case in cases(count).items()
    }
