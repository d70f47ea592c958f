"""The blocks in a network, by name."""

from torch import nn

from latentgnn.layer import LatentGNN


def blocks_of(model: nn.Module) -> dict[str, LatentGNN]:
    """Return every `LatentGNN` and `PackedLatentGNN` in a network, by its name in ``model.named_modules()``."""
    return {name: module for name, module in model.named_modules() if isinstance(module, LatentGNN)}
