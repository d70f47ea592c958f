"""Statistics of batch norm in training: of the batch, over all processes if needed, and the running ones.

Axes: B batch, N nodes, C channels.
"""

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn
from torch.distributed import get_world_size, is_initialized
from torch.distributed import group as group_of_all
from torch.nn.modules.batchnorm import _BatchNorm

from latentgnn.modes import is_eager_on_gpu, is_in_function_transform, is_known
from latentgnn.modules import own_tensor
from latentgnn.norms import affine_of_statistics
from latentgnn.numerics import to_dtype, wide
from latentgnn.ranks import added


def tracks(norm: nn.Module) -> bool:
    """Whether a norm updates running statistics from the current batch."""
    return isinstance(norm, _BatchNorm) and norm.training and norm.track_running_stats and norm.running_mean is not None


def synchronizes(norm: nn.Module) -> bool:
    """Whether a norm takes its statistics over several processes."""
    return isinstance(norm, nn.SyncBatchNorm) and is_initialized() and get_world_size(norm.process_group) > 1


def batch_statistics(y_BNC: Tensor, mask_BN: Tensor | None) -> tuple[Tensor, Tensor, Tensor | int]:
    """Mean and biased variance of every channel over the batch's valid nodes, and the number of these nodes."""
    if mask_BN is None:
        var_C, mean_C = torch.var_mean(y_BNC.to(wide(y_BNC.dtype)), dim=(0, 1), correction=0)
        return mean_C, var_C, y_BNC.shape[0] * y_BNC.shape[1]
    y_BNC = y_BNC.to(wide(y_BNC.dtype))
    weight_BN1 = mask_BN.unsqueeze(-1).to(y_BNC.dtype)
    count = weight_BN1.sum()
    total = count.clamp(min=1)
    mean_C = (y_BNC * weight_BN1).sum((0, 1)) / total
    var_C = ((y_BNC - mean_C).square() * weight_BN1).sum((0, 1)) / total
    return mean_C, var_C, count


def batch_affine(
    norm: nn.Module, mean_C: Tensor, var_C: Tensor, count: Tensor | int, group: str = ""
) -> tuple[Tensor, Tensor]:
    """The scale and shift of a batch norm with these batch statistics; updates its running statistics.

    With a process group, or for a synchronised norm, the statistics are over all its processes.

    Raises:
        ValueError: a single node in the whole batch, which has no spread.
    """
    assert isinstance(norm, _BatchNorm)
    if isinstance(norm, nn.SyncBatchNorm) and synchronizes(norm):
        # Use the norm's own group: it may span all data, not only the processes that share this input's nodes.
        own = norm.process_group or group_of_all.WORLD
        assert own is not None
        group = own.group_name
    if group:
        mean_C, var_C, count = _over_processes(mean_C, var_C, count, group)
    elif isinstance(count, int) and is_known(count == 1):
        raise ValueError(
            "batch norm in training mode needs more than one node in the batch, got 1; use larger inputs or batches, "
            "eval(), or another norm"
        )
    if tracks(norm):
        _update_running(norm, mean_C.detach(), var_C.detach(), count)
    return affine_of_statistics(mean_C, var_C, norm.weight, norm.bias, norm.eps)


def update_running(
    norms: Sequence[_BatchNorm], means: Sequence[Tensor], inverses: Sequence[Tensor], count: int
) -> None:
    """Update the running statistics of several norms of equal eps and momentum, in a few calls for all of them.

    Args:
        norms: norms that track statistics.
        means: of the batch, for each norm.
        inverses: 1 / sqrt(variance + eps) of the batch, for each norm, with the biased variance.
        count: nodes of the batch.
    """
    # Rounding may leave less than 0 where all nodes are equal.
    variances_C = torch.cat(list(inverses)).pow_(-2).sub_(norms[0].eps).clamp_min_(0)
    sizes = [len(mean) for mean in means]
    if norms[0].momentum is None:
        for norm, mean_C, var_C in zip(norms, means, variances_C.split(sizes), strict=True):
            _update_running(norm, mean_C, var_C, count)
        return
    torch._foreach_add_([norm.num_batches_tracked for norm in norms if norm.num_batches_tracked is not None], 1)
    unbiased = variances_C.mul_(count / max(count - 1, 1)).split(sizes)
    for name, batch in (("running_mean", means), ("running_var", unbiased)):
        running = [cast(Tensor, own_tensor(norm, name)) for norm in norms]
        torch._foreach_lerp_(
            running, [to_dtype(value, old.dtype) for value, old in zip(batch, running, strict=True)], norms[0].momentum
        )


def _update_running(norm: _BatchNorm, mean_C: Tensor, var_C: Tensor, count: Tensor | int) -> None:
    assert norm.running_mean is not None
    assert norm.running_var is not None
    assert norm.num_batches_tracked is not None
    seen = norm.num_batches_tracked + 1
    share: float | Tensor = seen.to(var_C.dtype).reciprocal() if norm.momentum is None else norm.momentum
    if isinstance(count, Tensor):
        # If the mask leaves no node, there is nothing to learn from.
        share = (count > 0).to(var_C.dtype) * share
        unbiased_C = var_C * (count / (count - 1).clamp(min=1))
    else:
        unbiased_C = var_C * (count / max(count - 1, 1))
    if is_eager_on_gpu(mean_C):
        # One call for each, instead of four.
        for running_C, batch_C in ((norm.running_mean, mean_C), (norm.running_var, unbiased_C)):
            weight = to_dtype(share, running_C.dtype) if isinstance(share, Tensor) else share
            running_C.lerp_(to_dtype(batch_C, running_C.dtype), weight)
        norm.num_batches_tracked.add_(1)
        return
    try:
        norm.running_mean.copy_(norm.running_mean + share * (mean_C - norm.running_mean))
        norm.running_var.copy_(norm.running_var + share * (unbiased_C - norm.running_var))
        norm.num_batches_tracked.copy_(seen)
    except RuntimeError as error:
        if not is_in_function_transform():
            raise
        raise RuntimeError(
            "inside a transform of torch.func, batch norm in training cannot update running statistics that the "
            "transform does not know: call eval(), replace them with torch.func.replace_all_batch_norm_modules_, or "
            "give them to the transformed function as an argument, through torch.func.functional_call"
        ) from error


def _over_processes(mean_C: Tensor, var_C: Tensor, count: Tensor | int, group: str) -> tuple[Tensor, Tensor, Tensor]:
    local = torch.as_tensor(count, dtype=mean_C.dtype, device=mean_C.device)
    sums_C, count = added([mean_C * local, local], group)
    total = count.detach().clamp(min=1)
    mean_all_C = sums_C / total
    (squares_C,) = added([local * (var_C + (mean_C - mean_all_C).square())], group)
    return mean_all_C, squares_C / total, total
