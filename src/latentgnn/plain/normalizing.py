"""Norms applied to nodes, with statistics only from nodes in the mask, and in one PyTorch call where possible.

Axes: B batch, N nodes, C channels.
"""

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from latentgnn.batch_statistics import batch_affine, batch_statistics, synchronizes, tracks
from latentgnn.modes import is_eager_on_gpu, is_seen, is_transformed
from latentgnn.norms import affine, is_frozen, norm_tensors, uses_batch_statistics
from latentgnn.numerics import to_dtype, wide


def normalize(
    norm: nn.Module,
    y_BNC: Tensor,
    mask_BN: Tensor | None,
    group: str = "",
    *,
    counted: bool = False,
    factor: Tensor | None = None,
) -> Tensor:
    """Apply a norm to nodes, with statistics from the nodes in the mask alone.

    The result has the wide dtype. If a GPU applies the norm in one call, it has the dtype of ``y_BNC`` instead; the
    call itself computes in the wide dtype.

    Args:
        norm: the norm to apply.
        y_BNC: its input.
        mask_BN: nodes that take part.
        group: name of the process group that shares the nodes; empty if this process holds all of them.
        counted: `count_batch` has counted this batch already.
        factor: (1,), multiplies the result; folded into the norm's weight and bias where possible.

    Raises:
        ValueError: a mask with a norm of an unknown kind.
    """
    as_it_is = mask_BN is None and is_eager_on_gpu(y_BNC) and _reads(norm, y_BNC.dtype)
    if not as_it_is or (isinstance(norm, nn.GroupNorm) and y_BNC.stride(-1) == 1):
        y_BNC = to_dtype(y_BNC, wide(y_BNC.dtype))
    if isinstance(norm, nn.Identity):
        return _times(y_BNC, factor)
    if mask_BN is None and isinstance(norm, _BatchNorm) and _takes_one_call(norm, y_BNC, y_BNC.dtype, group):
        return _batch_norm(norm, y_BNC, factor, counted=counted)
    if as_it_is and is_frozen(norm):
        weight_C, bias_C, mean_C, var_C = norm_tensors(norm)
        eps = cast(float, norm.eps)
        return _times(_one_batch_norm(y_BNC, weight_C, bias_C, mean_C, var_C, False, 0.0, eps), factor)
    if isinstance(norm, nn.LayerNorm):
        return nn.functional.layer_norm(
            y_BNC, norm.normalized_shape, *_vectors(norm, y_BNC, y_BNC.dtype, factor), norm.eps
        )
    if isinstance(norm, nn.RMSNorm):
        weight_C, _ = _vectors(norm, y_BNC, y_BNC.dtype, factor)
        return nn.functional.rms_norm(y_BNC, norm.normalized_shape, weight_C, norm.eps)
    if isinstance(norm, nn.GroupNorm):
        return _group_norm(norm, y_BNC, mask_BN, *_vectors(norm, y_BNC, y_BNC.dtype, factor))
    known = affine(norm)
    if uses_batch_statistics(norm):
        mean_C, var_C, count = batch_statistics(y_BNC, mask_BN)
        known = batch_affine(norm, mean_C, var_C, count, group)
    if known is not None:
        scale_C, shift_C = known
        return y_BNC * _times(scale_C, factor) + _times(shift_C, factor)
    if mask_BN is not None:
        raise ValueError(
            f"a mask needs a norm whose statistics can leave nodes out: batch norm, frozen batch norm, group norm, "
            f"layer norm or none; got {type(norm).__name__}"
        )
    y_BNC = norm(y_BNC.mT).mT
    if factor is None and not torch.is_grad_enabled():
        # Callers may change the result in place, and an unknown norm may keep a reference to it.
        return y_BNC.clone()
    return _times(y_BNC, factor)


def _times(x: Tensor, factor: Tensor | None) -> Tensor:
    return x if factor is None else x * to_dtype(factor, x.dtype)


def _vectors(
    norm: nn.Module, y_BNC: Tensor, dtype: torch.dtype, factor: Tensor | None
) -> tuple[Tensor | None, Tensor | None]:
    """A norm's weight and bias times a factor, in a type."""
    weight_C, bias_C, *_ = norm_tensors(norm)
    if weight_C is None and factor is not None:
        # Dense: PyTorch's batch norm of rows has wrong gradients for a weight of stride 0.
        weight_C = factor.new_ones(y_BNC.shape[-1])
    weight_C, bias_C = (
        None if vector is None else _times(to_dtype(vector, dtype), factor) for vector in (weight_C, bias_C)
    )
    return weight_C, bias_C


def _reads(norm: nn.Module, dtype: torch.dtype) -> bool:
    """Whether PyTorch can apply this norm, of a known kind, to tensors of a dtype in one call.

    A batch norm may have float32 tensors while its input is in half precision.
    """
    if isinstance(norm, nn.Identity):
        return True
    both = isinstance(norm, _BatchNorm) or is_frozen(norm)
    if not both and not isinstance(norm, nn.GroupNorm | nn.LayerNorm | nn.RMSNorm):
        return False
    types = {tensor.dtype for tensor in norm_tensors(norm) if tensor is not None}
    return types <= {dtype} or (both and types == {wide(dtype)})


def _takes_one_call(norm: _BatchNorm, y_BNC: Tensor, dtype: torch.dtype, group: str) -> bool:
    """Whether PyTorch's batch norm can be called directly on a tensor like ``y_BNC`` of this dtype.

    It does not support transforms, or a batch that is shared between processes.
    """
    if torch.compiler.is_compiling() or is_transformed() or is_traceable_wrapper_subclass(cast(object, y_BNC)):
        return False
    if synchronizes(norm):
        return False
    alike = norm.weight is None or norm.weight.dtype == dtype
    if not alike and not (is_eager_on_gpu(y_BNC) and _reads(norm, dtype)):
        return False
    if not uses_batch_statistics(norm):
        return True
    return not group and norm.momentum is not None and y_BNC.shape[0] * y_BNC.shape[1] > 1


def count_batch(norms: Sequence[nn.Module], x_BNC: Tensor, compute: torch.dtype) -> bool:
    """Add 1 to the batch counters of all norms in one call, if each will be applied in one call; say whether it did.

    Args:
        norms: of a layer.
        x_BNC: its input.
        compute: dtype of products over nodes.
    """
    if not is_eager_on_gpu(x_BNC):
        return False
    # Float16 is normalised as float32 where it could overflow.
    types = {compute, torch.float32} if compute == torch.float16 else {compute}
    counters = []
    for norm in norms:
        if not isinstance(norm, _BatchNorm) or not tracks(norm) or norm.num_batches_tracked is None:
            return False
        if not all(_takes_one_call(norm, x_BNC, dtype, "") for dtype in types):
            return False
        counters.append(norm.num_batches_tracked)
    torch._foreach_add_(counters, 1)
    return True


def _batch_norm(norm: _BatchNorm, y_BNC: Tensor, factor: Tensor | None, *, counted: bool) -> Tensor:
    batch = uses_batch_statistics(norm)
    mean_C, var_C = (norm.running_mean, norm.running_var) if tracks(norm) or not batch else (None, None)
    if tracks(norm) and norm.num_batches_tracked is not None and not counted:
        norm.num_batches_tracked.add_(1)
    weight_C: Tensor | None = norm.weight
    bias_C: Tensor | None = norm.bias
    if factor is not None:
        # In the norm's own dtype, which may be float32 although the input is in half precision.
        known = next((tensor for tensor in (weight_C, mean_C) if tensor is not None), y_BNC)
        weight_C, bias_C = _vectors(norm, y_BNC, known.dtype, factor)
    return _one_batch_norm(y_BNC, weight_C, bias_C, mean_C, var_C, batch, norm.momentum or 0.0, norm.eps)


def _one_batch_norm(
    y_BNC: Tensor,
    weight_C: Tensor | None,
    bias_C: Tensor | None,
    mean_C: Tensor | None,
    var_C: Tensor | None,
    batch: bool,
    momentum: float,
    eps: float,
) -> Tensor:
    arguments = weight_C, bias_C, mean_C, var_C, batch, momentum, eps, torch.backends.cudnn.enabled
    # Three or two dimensions: with four, PyTorch's gradients are wrong for some strides.
    if y_BNC.stride(-1) == 1:
        # On a CPU, strided rows take several times as long as copying them first.
        rows_MC = (y_BNC.contiguous() if y_BNC.is_cpu else y_BNC).flatten(0, 1)
        return torch.batch_norm(rows_MC, *arguments).view(y_BNC.shape)
    return torch.batch_norm(y_BNC.mT, *arguments).mT


def _group_norm(
    norm: nn.GroupNorm, y_BNC: Tensor, mask_BN: Tensor | None, weight_C: Tensor | None, bias_C: Tensor | None
) -> Tensor:
    # PyTorch's backward pass of group norm takes a DTensor's shape for that of its part.
    if mask_BN is None and not is_traceable_wrapper_subclass(cast(object, y_BNC)):
        if y_BNC.stride(-1) != 1:
            # Not `F.group_norm`, which refuses a single node with a channel a group.
            return torch.group_norm(y_BNC.mT, norm.num_groups, weight_C, bias_C, norm.eps).mT
        # A compiler would assume other strides for the result.
        if y_BNC.is_cpu and not is_seen():
            # Nodes as the width of channels-last images: many times as fast as the operations below.
            images_BC1N = y_BNC.contiguous().mT.unsqueeze(2)
            return torch.group_norm(images_BC1N, norm.num_groups, weight_C, bias_C, norm.eps).squeeze(2).mT
    y_BNGc = y_BNC.unflatten(-1, (norm.num_groups, -1))
    if mask_BN is None:
        var, mean = torch.var_mean(y_BNGc, dim=(1, 3), keepdim=True, correction=0)
    else:
        weight = mask_BN[:, :, None, None].to(y_BNC.dtype)
        total = (weight.sum(1, keepdim=True) * y_BNGc.shape[-1]).clamp(min=1)
        mean = (y_BNGc * weight).sum((1, 3), keepdim=True) / total
        var = ((y_BNGc - mean).square() * weight).sum((1, 3), keepdim=True) / total
    y_BNC = ((y_BNGc - mean) * torch.rsqrt(var + norm.eps)).flatten(2)
    y_BNC = y_BNC if weight_C is None else y_BNC * weight_C
    return y_BNC if bias_C is None else y_BNC + bias_C
