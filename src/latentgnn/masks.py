"""Tells every block in a network which of its nodes are valid."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from latentgnn.layer import LatentGNN
from latentgnn.points import PackedLatentGNN

_POOL = {1: F.max_pool1d, 2: F.max_pool2d, 3: F.max_pool3d}
_ADAPTIVE_POOL = {1: F.adaptive_max_pool1d, 2: F.adaptive_max_pool2d, 3: F.adaptive_max_pool3d}


@contextmanager
def node_mask(model: nn.Module, mask: Tensor) -> Iterator[None]:
    """Tell every `LatentGNN` in a network which part of its input is valid, inside a ``with`` block.

    Each layer gets the mask at the resolution of its own feature map. A node is valid if the image cell that it
    represents contains a valid pixel: for an image that is valid up to row ``h``, a stride of ``s`` keeps ``ceil(h /
    s)`` rows, which is what a strided convolution computes from them; and an image with a valid pixel keeps a valid
    node.

    Layers called with their own mask keep it, and the hooks are removed after the block. With activation checkpointing
    the backward pass must be inside the block too, because it runs the layers again. ``torch.compile`` networks run
    uncompiled inside the block, and the block itself must not be compiled.

    Args:
        model: the network.
        mask: (B, *spatial) bool at the resolution of the network's input, True for valid.

    Raises:
        TypeError: if the mask is not bool.
        ValueError: if the mask does not fit a layer's input in batch size or number of spatial dimensions.

    Example:
        >>> net = LatentGNN(16, num_latents=4)
        >>> with node_mask(net, torch.ones(2, 64, 64, dtype=torch.bool)):
        ...     features = net(torch.randn(2, 16, 8, 8))
    """
    if mask.dtype != torch.bool:
        raise TypeError(f"the mask must be bool, True for valid; got {mask.dtype}")
    hook = partial(_pass_mask, mask)
    # Packed points have no padding, and no position in an image.
    layers = [
        module
        for module in model.modules()
        if isinstance(module, LatentGNN) and not isinstance(module, PackedLatentGNN)
    ]
    handles = [layer.register_forward_pre_hook(hook, with_kwargs=True) for layer in layers]
    try:
        # Compiled code does not see new hooks: it would silently ignore the mask, or keep an old one.
        with torch.compiler.set_stance("force_eager"):
            yield
    finally:
        for handle in handles:
            handle.remove()


def _pass_mask(
    mask: Tensor, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    if len(args) > 1 or kwargs.get("mask") is not None:
        return None
    x = args[0] if args else kwargs["x"]
    if mask.ndim != x.ndim - 1 or mask.shape[0] != x.shape[0]:
        raise ValueError(
            f"a mask of shape {tuple(mask.shape)} does not fit a layer's input of shape {tuple(x.shape)}: "
            f"expected (B, *spatial) with B = {x.shape[0]} and {x.ndim - 2} spatial dimensions"
        )
    return args, {**kwargs, "mask": _resize(mask, tuple(x.shape[2:]))}


def _resize(mask: Tensor, size: tuple[int, ...]) -> Tensor:
    """Resize a mask; a node is valid if any pixel of its cell is."""
    full = tuple(mask.shape[1:])
    if full == size:
        return mask
    pixels = mask[:, None].float()
    strides = tuple(-(-pixel_count // node_count) for pixel_count, node_count in zip(full, size, strict=True))
    if tuple(-(-pixel_count // stride) for pixel_count, stride in zip(full, strides, strict=True)) == size:
        nodes = _POOL[len(size)](pixels, strides, ceil_mode=True)
    else:  # no integer stride leads from one size to the other, as after convolutions without padding
        nodes = _ADAPTIVE_POOL[len(size)](pixels, size)
    return nodes[:, 0] > 0
