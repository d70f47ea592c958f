"""Runs a network for inspection: in evaluation mode, on a batch of any form, on the network's device."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from latentgnn.blocks import blocks_of
from latentgnn.layer import LatentGNN
from latentgnn.modules import evaluating


def inspected_blocks(model: nn.Module) -> dict[str, LatentGNN]:
    """Return the blocks of a network, see `latentgnn.blocks.blocks_of`.

    Raises:
        ValueError: if there is none.
    """
    found = blocks_of(model)
    if not found:
        raise ValueError(
            f"{type(model).__name__} has no LatentGNN or PackedLatentGNN to look into; put one in, as with "
            "latentgnn.insert"
        )
    return found


@contextmanager
def inspecting(model: nn.Module) -> Iterator[None]:
    """Put a network in evaluation mode without gradients, uncompiled; every module's mode is restored afterwards."""
    # Compiled code does not see new hooks.
    with evaluating(model), torch.no_grad(), torch.compiler.set_stance("force_eager"):
        yield


def run(model: nn.Module, inputs: Any) -> Any:
    """Call a network with a tuple of arguments, a mapping of arguments by name, or one argument of any kind."""
    device = next((tensor.device for tensor in (*model.parameters(), *model.buffers())), None)
    if device is not None:
        inputs = tree_map_only(Tensor, lambda tensor: tensor.to(device), inputs)
    if isinstance(inputs, tuple):
        return model(*inputs)
    return model(**inputs) if isinstance(inputs, Mapping) else model(inputs)


@contextmanager
def without(layer: LatentGNN) -> Iterator[None]:
    """Disable a block: it returns its input unchanged."""

    def passed(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], out: Any) -> Any:
        return args[0] if args else kwargs["x"]

    handle = layer.register_forward_hook(passed, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()
