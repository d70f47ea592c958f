"""Norms over channels: their names, their kinds, and the scale and shift of those that are affine maps.

Axes: B batch, N nodes, C channels.
"""

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Literal, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase

from latentgnn.modules import own_tensor
from latentgnn.numerics import to_dtype, wide

NormFactory = Callable[[int], nn.Module]

# Where a norm's statistics come from: stored ones (an affine map), the batch, a sample's groups of channels, or a
# node's channels.
NormKind = Literal["affine", "batch", "group", "layer", "rms"]

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
        scale_C, shift_C = affine_of_statistics(self.running_mean, self.running_var, self.weight, self.bias, self.eps)
        shape = (1, -1, *[1] * (x.dim() - 2))
        return (x * scale_C.view(shape) + shift_C.view(shape)).to(x.dtype)

    def reset_parameters(self) -> None:
        """Reset to an identity (up to ``eps``); needed after ``to_empty``."""
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


def affine_of_statistics(
    mean_C: Tensor, var_C: Tensor, weight_C: Tensor | None, bias_C: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    dtype = wide(mean_C.dtype)
    scale_C = torch.rsqrt(to_dtype(var_C, dtype) + eps)
    if weight_C is not None:
        scale_C = scale_C * weight_C
    if bias_C is None:
        return scale_C, -mean_C * scale_C
    return scale_C, torch.addcmul(to_dtype(bias_C, dtype), to_dtype(mean_C, dtype), scale_C, value=-1)


def affines(
    columns: Sequence[Sequence[Tensor | None]], eps: Sequence[float], dtype: torch.dtype
) -> tuple[list[Tensor | None], list[Tensor | None]]:
    """Scale and shift of several norms, from their stored statistics.

    Args:
        columns: the norms' weights, biases, running means and running variances.
        eps: of each norm.
        dtype: dtype of the results; a norm without statistics gives ``None``.
    """
    if columns[0][0] is None or not are_alike(columns, eps):
        pairs = [
            (None, None)
            if mean is None or var is None
            else affine_of_statistics(to_dtype(mean, dtype), to_dtype(var, dtype), weight, bias, each)
            for weight, bias, mean, var, each in zip(*columns, eps, strict=True)
        ]
        scales, shifts = zip(*pairs, strict=True)
        return list(scales), list(shifts)
    sizes = [cast(Tensor, weight).shape[0] for weight in columns[0]]
    scale, shift = joined_affine(columns, eps, dtype)
    return list(torch.split_with_sizes(scale, sizes)), list(torch.split_with_sizes(shift, sizes))


def are_alike(columns: Sequence[Sequence[Tensor | None]], eps: Sequence[float]) -> bool:
    """Whether all norms have all tensors that `affines` takes and the same eps, or none has any."""
    missing = {tensor is None for column in columns for tensor in column}
    return len(missing) == 1 and (True in missing or all(each == eps[0] for each in eps))


def joined_affine(
    columns: Sequence[Sequence[Tensor | None]], eps: Sequence[float], dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Scale and shift of several norms that are alike, concatenated.

    They are computed together because a call costs more than its arithmetic. Arguments as in `affines`.
    """
    if torch.is_grad_enabled():
        # Statistics stay apart from weights and biases: joined to them, they would be part of their gradients.
        (weight, bias), (mean, var) = _joined(columns[:2], dtype), _joined(columns[2:], dtype)
    else:
        weight, bias, mean, var = _joined(columns, dtype)
    return affine_of_statistics(mean, var, weight, bias, eps[0])


def _joined(columns: Sequence[Sequence[Tensor | None]], dtype: torch.dtype) -> Sequence[Tensor]:
    """Each column's tensors, concatenated."""
    together = torch.cat([tensor for column in columns for tensor in cast(list[Tensor], column)])
    return to_dtype(together, dtype).chunk(len(columns))


def is_frozen(norm: nn.Module) -> bool:
    """Whether a module has the buffers of a frozen batch norm: ours, torchvision's, timm's."""
    return not isinstance(norm, _NormBase) and all(
        own_tensor(norm, name) is not None for name in ("weight", "bias", "running_mean", "running_var")
    )


def uses_batch_statistics(norm: nn.Module) -> bool:
    """Whether a norm takes its statistics from the current batch."""
    return isinstance(norm, _BatchNorm) and (norm.training or own_tensor(norm, "running_mean") is None)


def is_repeatable(norm: nn.Module) -> bool:
    """Whether a norm is known to give the same result again and to change no state."""
    return isinstance(norm, nn.LayerNorm | nn.RMSNorm | nn.GroupNorm) or is_affine(norm)


def is_affine(norm: nn.Module) -> bool:
    """Whether a norm is a fixed scale and shift per channel, independent of its input."""
    if isinstance(norm, nn.Identity) or is_frozen(norm):
        return True
    return isinstance(norm, _BatchNorm) and not uses_batch_statistics(norm)


def is_per_node(norm: nn.Module) -> bool:
    """Whether a norm treats each node by itself."""
    return is_affine(norm) or isinstance(norm, nn.LayerNorm | nn.RMSNorm)


def kind_of(norms: Sequence[nn.Module]) -> NormKind | None:
    """The kind of all of a layer's norms; ``None`` if they differ or the kind is unknown."""
    first = norms[0]
    if isinstance(first, _BatchNorm):
        first_takes = uses_batch_statistics(first)
        if all(isinstance(norm, _BatchNorm) and uses_batch_statistics(norm) == first_takes for norm in norms):
            return "batch" if first_takes else "affine"
        if first_takes:
            return None
    if all(type(norm) is FrozenBatchNorm for norm in norms):
        # The check below would look at every tensor of every norm, at every call.
        return "affine"
    kinds: tuple[tuple[type[nn.Module], NormKind], ...] = (
        (nn.GroupNorm, "group"),
        (nn.LayerNorm, "layer"),
        (nn.RMSNorm, "rms"),
    )
    for known, kind in kinds:
        if type(first) is known:
            return kind if all(type(norm) is known for norm in norms) else None
    # The reductions are one product, so all of them need a scale and a shift, or none.
    some_are_none = len({isinstance(norm, nn.Identity) for norm in norms}) > 1
    return "affine" if all(is_affine(norm) for norm in norms) and not some_are_none else None


def affine(norm: nn.Module) -> tuple[Tensor, Tensor] | None:
    """The scale and shift per channel of an affine norm; ``None`` for the identity and for any other norm."""
    if isinstance(norm, nn.Identity) or not is_affine(norm):
        return None
    return affine_of_statistics(norm.running_mean, norm.running_var, norm.weight, norm.bias, norm.eps)  # type: ignore[arg-type]


def norm_tensors(norm: nn.Module) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """Weight, bias, running mean and running variance of a norm, ``None`` for what it does not have."""
    if isinstance(norm, nn.Identity):
        return None, None, None, None
    weight, bias = own_tensor(norm, "weight"), own_tensor(norm, "bias")
    if isinstance(norm, nn.GroupNorm | nn.LayerNorm | nn.RMSNorm):
        return weight, bias, None, None
    return weight, bias, own_tensor(norm, "running_mean"), own_tensor(norm, "running_var")
