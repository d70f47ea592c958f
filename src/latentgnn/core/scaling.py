"""x * scale + shift, where scale and shift are broadcast to x."""

import torch
from torch import Tensor


def scaled(x: Tensor, scale: Tensor, shift: Tensor | None) -> Tensor:
    """x * scale + shift in new memory; ``None`` is 0."""
    if shift is None or _lies_along(x, scale):
        return x * scale if shift is None else torch.addcmul(shift, x, scale)
    return (x * scale).add_(shift)


def scaled_(x: Tensor, scale: Tensor, shift: Tensor | None) -> Tensor:
    """x * scale + shift in the memory of x; ``None`` is 0."""
    if shift is None or _lies_along(x, scale):
        return x.mul_(scale) if shift is None else torch.addcmul(shift, x, scale, out=x)
    return x.mul_(scale).add_(shift)


def _lies_along(x: Tensor, scale: Tensor) -> bool:
    """Whether a scale lies along what is innermost in x.

    Otherwise `addcmul` has two broadcast operands, and PyTorch computes it one element at a time on a CPU.
    """
    return x.device.type != "cpu" or (x.stride(-1) == 1 and scale.shape[-1] == x.shape[-1])
