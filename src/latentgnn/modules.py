"""What a module has, without `getattr`: that takes longer on modules than an operation on a small tensor."""

from torch import Tensor, nn


def own_tensor(module: nn.Module, name: str) -> Tensor | None:
    """A parameter or a buffer of a module, ``None`` where it has none of that name."""
    if name in module._parameters:
        return module._parameters[name]
    if name in module._buffers:
        return module._buffers[name]
    # What a parametrization computes, or a module keeps as a plain attribute.
    found = getattr(module, name, None)
    return found if isinstance(found, Tensor) else None


def child(module: nn.Module, name: str) -> nn.Module:
    """A child of a module."""
    found = module._modules[name]
    assert found is not None
    return found
