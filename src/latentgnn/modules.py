"""Access to tensors and children of modules without `getattr`, which is slower there than an op on a small tensor.

Also `evaluating`, which sets the mode of a model for a while.
"""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor, nn


def own_tensor(module: nn.Module, name: str) -> Tensor | None:
    """Return a parameter or buffer of a module, ``None`` if it has none of that name."""
    if name in module._parameters:
        return module._parameters[name]
    if name in module._buffers:
        return module._buffers[name]
    # Computed by a parametrization, or stored as a plain attribute.
    found = getattr(module, name, None)
    return found if isinstance(found, Tensor) else None


def child(module: nn.Module, name: str) -> nn.Module:
    """Return a child of a module."""
    found = module._modules[name]
    assert found is not None
    return found


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put a model in evaluation mode; afterwards every module is back in its previous mode."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training
