"""Models that do not fit into memory: recomputed activations, and parameters that are sharded over processes.

Both work on a model's units, the modules that a network repeats one after another, such as a backbone's residual
blocks.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from lightning.fabric.strategies.model_parallel import ModelParallelStrategy
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint

from latentgnn.layer import LatentGNN

_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)


def units(module: nn.Module) -> list[nn.Module]:
    """Return the repeated modules of a network: all members of its module lists, if no member is a single layer.

    LatentGNN blocks are not units, and no unit contains one: they store almost nothing for the backward pass.

    Example:
        >>> from torchvision.models import resnet18
        >>> [type(unit).__name__ for unit in units(resnet18())[:2]], len(units(resnet18()))
        (['BasicBlock', 'BasicBlock'], 8)
    """
    children = [child for child in module.children() if not isinstance(child, LatentGNN)]
    found: list[nn.Module] = []
    for child in children:
        has_block = any(isinstance(inner, LatentGNN) for inner in child.modules())
        has_parameters = any(True for _ in child.parameters())
        is_unit = _lists(module) and not _lists(child) and has_parameters and not has_block
        found += [child] if is_unit else units(child)
    return found


def recompute(modules: Iterable[nn.Module]) -> None:
    """Make modules recompute their activations in the backward pass and store only their inputs until then.

    Outputs and gradients are the same. Random numbers are drawn again identically, and batch norm counts a batch once.
    """
    for module in modules:
        module.forward = partial(_recomputed, module, module.forward)


def sharding_strategy(model: nn.Module, modules: Iterable[nn.Module], processes: int) -> ModelParallelStrategy:
    """Return the strategy by which each process holds a part of parameters, gradients and optimizer state (FSDP2).

    A unit's parameters are whole while the unit runs; parameters outside all units are whole while the model runs.

    Args:
        model: the model with the parameters; the module that is set up may contain it.
        modules: its units.
        processes: number of processes.
    """

    def parallelize(outer: nn.Module, mesh: DeviceMesh) -> nn.Module:
        for module in modules:
            fully_shard(module, mesh=mesh["data_parallel"], reshard_after_forward=True)
        fully_shard(model, mesh=mesh["data_parallel"], reshard_after_forward=False)
        return outer

    return ModelParallelStrategy(parallelize, data_parallel_size=processes, tensor_parallel_size=1)


@contextmanager
def whole(model: nn.Module) -> Iterator[None]:
    """Gather all parameters in every process, so that one process may run the model more often than another."""
    sharded = [module for module in model.modules() if isinstance(module, FSDPModule)]
    for module in sharded:
        module.set_reshard_after_forward(False, recurse=False)
        module.unshard()
    try:
        yield
    finally:
        for module in sharded:
            module.reshard()
            module.set_reshard_after_forward(module is not model, recurse=False)


def gathered(tree: Any) -> Any:
    """Gather the sharded tensors in nested dicts and lists into whole ones; all processes must call it."""
    if isinstance(tree, DTensor):
        # One at a time: a device may not have room for all.
        return tree.full_tensor().cpu()
    if isinstance(tree, dict):
        return {name: gathered(value) for name, value in tree.items()}
    return [gathered(value) for value in tree] if isinstance(tree, list) else tree


def share_out(optimizer: torch.optim.Optimizer) -> None:
    """Keep only this process's shard of an optimizer state that was loaded whole in every process."""
    for parameter, state in optimizer.state.items():
        if isinstance(parameter, DTensor):
            for name, value in state.items():
                if isinstance(value, Tensor) and value.shape == parameter.shape and not isinstance(value, DTensor):
                    state[name] = distribute_tensor(
                        value, parameter.device_mesh, parameter.placements, src_data_rank=None
                    )


def _lists(module: nn.Module) -> bool:
    """Whether a module is a list of modules, none of which is a single layer."""
    children = [child for child in module.children() if not isinstance(child, LatentGNN)]
    return isinstance(module, _CONTAINERS) and bool(children) and all(any(child.children()) for child in children)


def _recomputed(module: nn.Module, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    if not torch.is_grad_enabled():
        return forward(*args, **kwargs)

    def contexts() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        return nullcontext(), _statistics_kept(module)

    return checkpoint(forward, *args, use_reentrant=False, context_fn=contexts, **kwargs)


@contextmanager
def _statistics_kept(module: nn.Module) -> Iterator[None]:
    """Let batch norm update copies of its running statistics, which are discarded afterwards.

    Without running statistics, batch norm would hold other tensors than before, which PyTorch reports as an error.
    """
    kept = [(norm, dict(norm._buffers)) for norm in module.modules() if isinstance(norm, _BatchNorm)]
    for norm, buffers in kept:
        norm._buffers.update({name: value.clone() for name, value in buffers.items() if value is not None})
    try:
        yield
    finally:
        for norm, buffers in kept:
            norm._buffers.update(buffers)
