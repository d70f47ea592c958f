"""Norms over channels: as an affine map where they are one, and with a node mask where they are not.

Axes: B batch, N nodes, C channels.
"""

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed import get_world_size, is_initialized
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase

from latentgnn.functional import wide

NormFactory = Callable[[int], nn.Module]

_FROZEN_STARTS = (("weight", 1.0), ("bias", 0.0), ("running_mean", 0.0), ("running_var", 1.0))


class FrozenBatchNorm(nn.Module):
    """Batch norm whose statistics and affine parameters are buffers that training does not change.

    Args:
        num_features: number of channels.
        eps: added to the variance.

    Shape: (B, C) or (B, C, N) to the same.
    """

    weight: Tensor
    bias: Tensor
    running_mean: Tensor
    running_var: Tensor

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.num_features = num_features
        self.eps = eps
        for name, start in _FROZEN_STARTS:
            self.register_buffer(name, torch.full((num_features,), start, device=device, dtype=dtype))

    def forward(self, x: Tensor) -> Tensor:
        scale_C, shift_C = _affine_of_statistics(self.running_mean, self.running_var, self.weight, self.bias, self.eps)
        shape = (1, -1, *[1] * (x.dim() - 2))
        return (x * scale_C.view(shape) + shift_C.view(shape)).to(x.dtype)

    def reset_parameters(self) -> None:
        """Make it an identity, but for ``eps``; for buffers that hold nothing yet, as after ``to_empty``."""
        for name, start in _FROZEN_STARTS:
            getattr(self, name).fill_(start)

    def extra_repr(self) -> str:
        return f"{self.num_features}, eps={self.eps}"


def group_norm(channels: int) -> nn.GroupNorm:
    """Group norm with 32 groups, or as many as divide the channels."""
    return nn.GroupNorm(next(groups for groups in range(min(32, channels), 0, -1) if channels % groups == 0), channels)


def no_norm(channels: int) -> nn.Identity:
    """No norm."""
    return nn.Identity()


NORMS: Mapping[str, NormFactory] = MappingProxyType(
    {
        "batch_norm": nn.BatchNorm1d,
        "frozen_batch_norm": FrozenBatchNorm,
        "group_norm": group_norm,
        "layer_norm": nn.LayerNorm,
        "none": no_norm,
    }
)


def _affine_of_statistics(
    mean_C: Tensor, var_C: Tensor, weight_C: Tensor | None, bias_C: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    dtype = wide(mean_C.dtype)
    scale_C = torch.rsqrt(var_C.to(dtype) + eps)
    if weight_C is not None:
        scale_C = scale_C * weight_C
    shift_C = -mean_C * scale_C
    if bias_C is not None:
        shift_C = shift_C + bias_C
    return scale_C, shift_C


def is_frozen(norm: nn.Module) -> bool:
    """Whether a module has the buffers of a frozen batch norm: ours, torchvision's, timm's."""
    return not isinstance(norm, _NormBase) and all(
        isinstance(getattr(norm, name, None), Tensor) for name in ("weight", "bias", "running_mean", "running_var")
    )


def uses_batch_statistics(norm: nn.Module) -> bool:
    """Whether a norm takes its statistics from the batch at hand."""
    return isinstance(norm, _BatchNorm) and (norm.training or norm.running_mean is None)


def is_repeatable(norm: nn.Module) -> bool:
    """Whether it is known that applying a norm again gives the same and changes nothing."""
    known = isinstance(norm, nn.Identity | nn.LayerNorm | nn.RMSNorm | nn.GroupNorm)
    return known or affine(norm) is not None


def affine(norm: nn.Module) -> tuple[Tensor, Tensor] | None:
    """The scale and shift per channel that a norm amounts to, ``None`` where it depends on its input."""
    if is_frozen(norm) or (isinstance(norm, _BatchNorm) and not uses_batch_statistics(norm)):
        return _affine_of_statistics(norm.running_mean, norm.running_var, norm.weight, norm.bias, norm.eps)  # type: ignore[arg-type]
    return None


def fold(norms: list[nn.Module], weight_FC: Tensor) -> tuple[Tensor, Tensor | None] | None:
    """Fold the norms of consecutive output channels into the matrix before them.

    Returns:
        The matrix and the shift (``None`` for zero) after folding, or ``None`` where a norm depends on its input.
    """
    if all(isinstance(norm, nn.Identity) for norm in norms):
        return weight_FC, None
    if any(isinstance(norm, nn.Identity) for norm in norms):
        return None
    affines = [affine(norm) for norm in norms]
    known = [pair for pair in affines if pair is not None]
    if len(known) < len(affines):
        return None
    scale_F, shift_F = (torch.cat(parts) if len(parts) > 1 else parts[0] for parts in zip(*known, strict=True))
    return weight_FC * scale_F[:, None], shift_F


def normalize(norm: nn.Module, y_BNC: Tensor, mask_BN: Tensor | None) -> Tensor:
    """Apply a norm to nodes, with statistics from the nodes in the mask alone, in the wide type.

    Raises:
        ValueError: a mask with a norm of unknown kind, whose statistics nothing is known of.
    """
    y_BNC = y_BNC.to(wide(y_BNC.dtype))
    if isinstance(norm, nn.Identity):
        return y_BNC
    if isinstance(norm, nn.LayerNorm):
        weight_C, bias_C = _widened(norm.weight, y_BNC), _widened(norm.bias, y_BNC)
        return nn.functional.layer_norm(y_BNC, norm.normalized_shape, weight_C, bias_C, norm.eps)
    if isinstance(norm, nn.RMSNorm):
        return nn.functional.rms_norm(y_BNC, norm.normalized_shape, _widened(norm.weight, y_BNC), norm.eps)
    if isinstance(norm, nn.GroupNorm):
        return _group_norm(norm, y_BNC, mask_BN)
    if uses_batch_statistics(norm):
        mean_C, var_C, count = batch_statistics(y_BNC, mask_BN)
        scale_C, shift_C = batch_affine(norm, mean_C, var_C, count)
        return y_BNC * scale_C + shift_C
    known = affine(norm)
    if known is not None:
        return y_BNC * known[0] + known[1]
    if mask_BN is not None:
        raise ValueError(
            f"a mask needs a norm whose statistics can leave nodes out: batch norm, frozen batch norm, group norm, "
            f"layer norm or none; got {type(norm).__name__}"
        )
    return norm(y_BNC.mT).mT


def _widened(parameter: Tensor | None, like: Tensor) -> Tensor | None:
    return None if parameter is None else parameter.to(like.dtype)


def _group_norm(norm: nn.GroupNorm, y_BNC: Tensor, mask_BN: Tensor | None) -> Tensor:
    y_BNGc = y_BNC.unflatten(-1, (norm.num_groups, -1))
    if mask_BN is None:
        var, mean = torch.var_mean(y_BNGc, dim=(1, 3), keepdim=True, correction=0)
    else:
        weight = mask_BN[:, :, None, None].to(y_BNC.dtype)
        total = (weight.sum(1, keepdim=True) * y_BNGc.shape[-1]).clamp(min=1)
        mean = (y_BNGc * weight).sum((1, 3), keepdim=True) / total
        var = ((y_BNGc - mean).square() * weight).sum((1, 3), keepdim=True) / total
    y_BNC = ((y_BNGc - mean) * torch.rsqrt(var + norm.eps)).flatten(2)
    if norm.weight is not None:
        y_BNC = y_BNC * norm.weight + norm.bias
    return y_BNC


class _BatchMoments(torch.autograd.Function):
    """Mean and biased variance over batch and nodes, which keep nothing but their argument for the backward pass."""

    @staticmethod
    def forward(ctx: Any, y_BNC: Tensor) -> tuple[Tensor, Tensor]:
        rows_MC = y_BNC.flatten(0, 1).to(wide(y_BNC.dtype))
        mean_C = rows_MC.mean(0)
        var_C = (rows_MC - mean_C).square_().mean(0)
        ctx.save_for_backward(y_BNC, mean_C)
        return mean_C, var_C

    @staticmethod
    def backward(ctx: Any, grad_mean_C: Tensor, grad_var_C: Tensor) -> Tensor:
        y_BNC, mean_C = ctx.saved_tensors
        count = y_BNC.shape[0] * y_BNC.shape[1]
        return torch.addcmul(grad_mean_C / count, y_BNC - mean_C, grad_var_C * (2 / count)).to(y_BNC.dtype)


def batch_statistics(y_BNC: Tensor, mask_BN: Tensor | None) -> tuple[Tensor, Tensor, Tensor | int]:
    """Mean and biased variance of every channel over the batch's valid nodes, and the number of these nodes."""
    if mask_BN is None:
        mean_C, var_C = _BatchMoments.apply(y_BNC)
        return mean_C, var_C, y_BNC.shape[0] * y_BNC.shape[1]
    y_BNC = y_BNC.to(wide(y_BNC.dtype))
    weight_BN1 = mask_BN.unsqueeze(-1).to(y_BNC.dtype)
    count = weight_BN1.sum()
    total = count.clamp(min=1)
    mean_C = (y_BNC * weight_BN1).sum((0, 1)) / total
    var_C = ((y_BNC - mean_C).square() * weight_BN1).sum((0, 1)) / total
    return mean_C, var_C, count


class Moments(NamedTuple):
    """Of each sample's features: nodes that count, (S, 1, 1); mean, (S, 1, F); sums of products about it, (S, F, F)."""

    nodes: Tensor
    mean: Tensor
    scatter: Tensor


def moments(feature_BNF: Tensor, mask_BN: Tensor | None) -> Moments:
    """Moments of each sample's features over its valid nodes.

    The features are centred first: E[x^2] - E[x]^2 would lose every digit, as a mean is often ten times its spread.
    """
    feature_BNF = feature_BNF.to(wide(feature_BNF.dtype))
    if mask_BN is None:
        count_B11 = feature_BNF.new_full((feature_BNF.shape[0], 1, 1), feature_BNF.shape[1])
        mean_B1F = feature_BNF.sum(1, keepdim=True) / max(feature_BNF.shape[1], 1)
        centred_BNF = feature_BNF - mean_B1F
    else:
        weight_BN1 = mask_BN.unsqueeze(-1).to(feature_BNF.dtype)
        count_B11 = weight_BN1.sum(1, keepdim=True)
        mean_B1F = (feature_BNF * weight_BN1).sum(1, keepdim=True) / count_B11.clamp(min=1)
        centred_BNF = (feature_BNF - mean_B1F) * weight_BN1
    return Moments(count_B11, mean_B1F, centred_BNF.mT @ centred_BNF)


class _Spread(torch.autograd.Function):
    """diag(H^T S H) for symmetric S, (B, 1, C), which keeps S and H alone for the backward pass."""

    @staticmethod
    def forward(ctx: Any, scatter_BFF: Tensor, matrix_BFC: Tensor) -> Tensor:
        ctx.save_for_backward(scatter_BFF, matrix_BFC)
        return (scatter_BFF @ matrix_BFC).mul_(matrix_BFC).sum(1, keepdim=True)

    @staticmethod
    def backward(ctx: Any, grad_B1C: Tensor) -> tuple[Tensor, Tensor]:
        scatter_BFF, matrix_BFC = ctx.saved_tensors
        weighted_BFC = matrix_BFC * grad_B1C
        return weighted_BFC @ matrix_BFC.mT, 2 * (scatter_BFF @ weighted_BFC)


def product_statistics(of_features: Moments, matrix_SFC: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """`batch_statistics` of the product feature @ matrix without the product.

    Each sample's product has the mean q H and the variance diag(H^T Cov(q) H); the samples' means spread in addition.

    Args:
        of_features: moments of each sample's features.
        matrix_SFC: of each sample, or one for all.
    """
    count_S11, mean_S1F, scatter_SFF = of_features
    matrix_SFC = matrix_SFC.to(mean_S1F.dtype).expand(mean_S1F.shape[0], -1, -1)
    mean_S1C, scatter_S1C = mean_S1F @ matrix_SFC, _Spread.apply(scatter_SFF, matrix_SFC)
    count = count_S11.sum()
    total = count.clamp(min=1)
    mean_C = (count_S11 * mean_S1C).sum(0) / total
    var_C = (scatter_S1C + count_S11 * (mean_S1C - mean_C).square()).sum(0) / total
    return mean_C[0], var_C[0], count


def batch_affine(norm: nn.Module, mean_C: Tensor, var_C: Tensor, count: Tensor | int) -> tuple[Tensor, Tensor]:
    """The scale and shift of a batch norm with these batch statistics; updates its running statistics.

    Raises:
        ValueError: a single node in the whole batch, which has no spread.
    """
    assert isinstance(norm, _BatchNorm)
    if isinstance(norm, nn.SyncBatchNorm) and is_initialized() and get_world_size(norm.process_group) > 1:
        mean_C, var_C, count = _over_processes(norm, mean_C, var_C, count)
    elif isinstance(count, int) and count == 1:
        raise ValueError(
            "batch norm in training mode needs more than one node in the batch, got 1; use larger inputs or batches, "
            "eval(), or another norm"
        )
    if norm.training and norm.track_running_stats and norm.running_mean is not None:
        _update_running(norm, mean_C.detach(), var_C.detach(), count)
    return _affine_of_statistics(mean_C, var_C, norm.weight, norm.bias, norm.eps)


def _update_running(norm: _BatchNorm, mean_C: Tensor, var_C: Tensor, count: Tensor | int) -> None:
    assert norm.running_mean is not None
    assert norm.running_var is not None
    assert norm.num_batches_tracked is not None
    norm.num_batches_tracked.add_(1)
    share: float | Tensor = (
        norm.num_batches_tracked.to(var_C.dtype).reciprocal() if norm.momentum is None else norm.momentum
    )
    if isinstance(count, Tensor):
        # A batch whose mask leaves nothing has no statistics to learn from.
        share = (count > 0).to(var_C.dtype) * share
        unbiased_C = var_C * (count / (count - 1).clamp(min=1))
    else:
        unbiased_C = var_C * (count / max(count - 1, 1))
    norm.running_mean.copy_(norm.running_mean + share * (mean_C - norm.running_mean))
    norm.running_var.copy_(norm.running_var + share * (unbiased_C - norm.running_var))


def _over_processes(
    norm: nn.SyncBatchNorm, mean_C: Tensor, var_C: Tensor, count: Tensor | int
) -> tuple[Tensor, Tensor, Tensor]:
    # Imported here: it is missing in builds without distributed support, and nothing else needs it.
    from torch.distributed.nn.functional import all_reduce

    group = norm.process_group
    local = torch.as_tensor(count, dtype=mean_C.dtype, device=mean_C.device)
    sums = all_reduce(torch.cat([mean_C * local, local[None]]), group=group)
    total = sums[-1].detach().clamp(min=1)
    mean_all_C = sums[:-1] / total
    var_all_C = all_reduce(local * (var_C + (mean_C - mean_all_C).square()), group=group) / total
    return mean_all_C, var_all_C, total
