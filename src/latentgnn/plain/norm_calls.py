"""A layer's norms as one PyTorch call each, for GPUs; checks are made once for all norms, not for each.

Axes: B batch, N nodes, O channels of what is normalised.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from latentgnn.batch_statistics import synchronizes, tracks
from latentgnn.numerics import wide
from latentgnn.projections import Arrangement, NormedMatrix

# Called with the input, (B, N, O) or (B, O, N), and the dimension of its channels, 2 or 1; returns (B, N, O).
NormCall = Callable[[Tensor, int], Tensor]


def are_single(layer: Arrangement, x_BNC: Tensor, compute: torch.dtype) -> bool:
    """Whether each norm of a layer is one call for all nodes of an input, in the dtype of the products.

    Args:
        layer: the layer's projections.
        x_BNC: the input.
        compute: dtype of products over nodes.
    """
    kind = layer.norm_kind
    if kind is None or (kind == "group" and x_BNC.stride(-1) == 1):
        return False
    types = {tensor.dtype for column in layer.norm_columns for tensor in column if tensor is not None}
    # A batch norm may have float32 tensors while its input is in half precision.
    if not (types <= {compute} or (kind in ("affine", "batch") and types == {wide(compute)})):
        return False
    if kind != "batch":
        return True
    if x_BNC.shape[0] * x_BNC.shape[1] < 2:
        return False
    return not any(synchronizes(norm) or norm.momentum is None for norm in layer.norms)


def norm_calls(layer: Arrangement) -> list[NormCall]:
    """One call for each norm of a layer that `are_single` accepts. Also counts the batch in norms that track it."""
    counters = [
        counter
        for norm in layer.norms
        if layer.norm_kind == "batch" and tracks(norm) and (counter := norm.num_batches_tracked) is not None
    ]
    if counters:
        torch._foreach_add_(cast(list[Tensor], counters), 1)
    return [_call(layer, norm, part) for norm, part in zip(layer.norms, layer.parts, strict=True)]


def _call(layer: Arrangement, norm: nn.Module, part: NormedMatrix) -> NormCall:
    _, weight_O, bias_O, mean_O, var_O = part
    if layer.norm_kind == "group":
        return partial(_group_norm, (cast(nn.GroupNorm, norm).num_groups, weight_O, bias_O, norm.eps))
    if layer.norm_kind == "layer":
        return partial(_over_channels, torch.layer_norm, (weight_O, bias_O, norm.eps))
    if layer.norm_kind == "rms":
        return partial(_over_channels, torch.rms_norm, (weight_O, norm.eps))
    if isinstance(norm, nn.Identity):
        return _identity
    batch = layer.norm_kind == "batch"
    if batch and not tracks(norm):
        mean_O = var_O = None
    momentum = cast(_BatchNorm, norm).momentum if batch else 0.0
    return partial(
        _batch_norm, (weight_O, bias_O, mean_O, var_O, batch, momentum, norm.eps, torch.backends.cudnn.enabled)
    )


def _identity(y: Tensor, dim: int) -> Tensor:
    return y.mT if dim == 1 else y


def _batch_norm(arguments: Sequence[object], y: Tensor, dim: int) -> Tensor:
    if dim == 1:
        return torch.batch_norm(y, *arguments).mT  # type: ignore[arg-type]
    return torch.batch_norm(y.flatten(0, 1), *arguments).view(y.shape)  # type: ignore[arg-type]


def _group_norm(arguments: Sequence[object], y: Tensor, dim: int) -> Tensor:
    return torch.group_norm(y if dim == 1 else y.mT, *arguments).mT  # type: ignore[arg-type]


def _over_channels(call: Callable[..., Tensor], arguments: Sequence[object], y: Tensor, dim: int) -> Tensor:
    y_BNO = y.mT if dim == 1 else y
    return call(y_BNO, y_BNO.shape[-1:], *arguments)
