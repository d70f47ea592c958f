"""Access to tensors and children of modules without `getattr`, which is slower there than an op on a small tensor."""

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
