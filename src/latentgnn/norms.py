"""Norms over channels: as an affine map where they are one, and with a node mask where they are not.

Axes: B batch, N nodes, C channels.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Literal
from typing import cast as cast_type

import torch
from torch import Tensor, nn
from torch.distributed import get_world_size, is_initialized
from torch.distributed import group as group_of_all
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from latentgnn import launches
from latentgnn.functional import cast, wide
from latentgnn.modes import is_in_function_transform, is_transformed
from latentgnn.modules import own_tensor
from latentgnn.ranks import added

NormFactory = Callable[[int], nn.Module]

# What statistics norms take: those that they have (an affine map), or those of the batch, of a sample's groups of
# channels, of a node's channels.
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


def affine_of_statistics(
    mean_C: Tensor, var_C: Tensor, weight_C: Tensor | None, bias_C: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    dtype = wide(mean_C.dtype)
    scale_C = torch.rsqrt(cast(var_C, dtype) + eps)
    if weight_C is not None:
        scale_C = scale_C * weight_C
    if bias_C is None:
        return scale_C, -mean_C * scale_C
    return scale_C, torch.addcmul(cast(bias_C, dtype), cast(mean_C, dtype), scale_C, value=-1)


def affines(
    columns: Sequence[Sequence[Tensor | None]], eps: Sequence[float], dtype: torch.dtype
) -> tuple[list[Tensor | None], list[Tensor | None]]:
    """Scale and shift of each of several norms, from the statistics that it has collected.

    Args:
        columns: the norms' weights, biases, running means and running variances.
        eps: of each norm.
        dtype: of the results, which are ``None`` for a norm without statistics.
    """
    if columns[0][0] is None or not are_alike(columns, eps):
        pairs = [
            (None, None)
            if mean is None or var is None
            else affine_of_statistics(cast(mean, dtype), cast(var, dtype), weight, bias, each)
            for weight, bias, mean, var, each in zip(*columns, eps, strict=True)
        ]
        scales, shifts = zip(*pairs, strict=True)
        return list(scales), list(shifts)
    sizes = [cast_type(Tensor, weight).shape[0] for weight in columns[0]]
    scale, shift = joined_affine(columns, eps, dtype)
    return list(torch.split_with_sizes(scale, sizes)), list(torch.split_with_sizes(shift, sizes))


def are_alike(columns: Sequence[Sequence[Tensor | None]], eps: Sequence[float]) -> bool:
    """Whether each of several norms has all tensors that `affines` takes, and all have one eps; or none has any."""
    missing = {tensor is None for column in columns for tensor in column}
    return len(missing) == 1 and (True in missing or all(each == eps[0] for each in eps))


def joined_affine(
    columns: Sequence[Sequence[Tensor | None]], eps: Sequence[float], dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Scale and shift of several norms that are alike, one after the other.

    All norms at once: they are small, and each call costs more than its arithmetic. Arguments are those of `affines`.
    """
    # Statistics are not joined with what is learnt, whose gradient they would otherwise have too.
    weight, bias = _joined(columns[:2], dtype)
    mean, var = _joined(columns[2:], dtype)
    return affine_of_statistics(mean, var, weight, bias, eps[0])


def _joined(columns: Sequence[Sequence[Tensor | None]], dtype: torch.dtype) -> Iterator[Tensor]:
    """The tensors of each column one after the other."""
    together = torch.cat([tensor for column in columns for tensor in cast_type(list[Tensor], column)])
    return iter(cast(together, dtype).chunk(len(columns)))


def is_frozen(norm: nn.Module) -> bool:
    """Whether a module has the buffers of a frozen batch norm: ours, torchvision's, timm's."""
    return not isinstance(norm, _NormBase) and all(
        own_tensor(norm, name) is not None for name in ("weight", "bias", "running_mean", "running_var")
    )


def uses_batch_statistics(norm: nn.Module) -> bool:
    """Whether a norm takes its statistics from the batch at hand."""
    return isinstance(norm, _BatchNorm) and (norm.training or own_tensor(norm, "running_mean") is None)


def is_repeatable(norm: nn.Module) -> bool:
    """Whether it is known that applying a norm again gives the same and changes nothing."""
    return isinstance(norm, nn.LayerNorm | nn.RMSNorm | nn.GroupNorm) or is_affine(norm)


def is_affine(norm: nn.Module) -> bool:
    """Whether a norm amounts to a scale and a shift per channel, whatever its input."""
    if isinstance(norm, nn.Identity) or is_frozen(norm):
        return True
    return isinstance(norm, _BatchNorm) and not uses_batch_statistics(norm)


def kind_of(norms: Sequence[nn.Module]) -> NormKind | None:
    """What kind all of a layer's norms are, ``None`` if they differ or are of none that is known."""
    first = norms[0]
    if isinstance(first, _BatchNorm):
        first_takes = uses_batch_statistics(first)
        if all(isinstance(norm, _BatchNorm) and uses_batch_statistics(norm) == first_takes for norm in norms):
            return "batch" if first_takes else "affine"
        if first_takes:
            return None
    kinds: tuple[tuple[type[nn.Module], NormKind], ...] = (
        (nn.GroupNorm, "group"),
        (nn.LayerNorm, "layer"),
        (nn.RMSNorm, "rms"),
    )
    for known, kind in kinds:
        if type(first) is known:
            return kind if all(type(norm) is known for norm in norms) else None
    # Reductions are multiplied by together, and either all of them have a scale and a shift or none has.
    some_are_none = len({isinstance(norm, nn.Identity) for norm in norms}) > 1
    return "affine" if all(is_affine(norm) for norm in norms) and not some_are_none else None


def affine(norm: nn.Module) -> tuple[Tensor, Tensor] | None:
    """The scale and shift per channel that a norm amounts to, ``None`` where it depends on its input or has none."""
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


def synchronizes(norm: nn.Module) -> bool:
    """Whether a norm takes its statistics over several processes."""
    return isinstance(norm, nn.SyncBatchNorm) and is_initialized() and get_world_size(norm.process_group) > 1


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

    The result is in the wide type, or where a GPU applies the norm in one call, which computes in that type inside, in
    the type of what it is applied to.

    Args:
        norm: to apply.
        y_BNC: what it is applied to.
        mask_BN: nodes that take part.
        group: the name of the process group whose processes hold the nodes; empty where this one holds all.
        counted: the batch is in the norm's counter already, by `count_batch`.
        factor: (1,), what the result is multiplied by; in the norm's weight and bias it costs nothing.

    Raises:
        ValueError: a mask with a norm of unknown kind, whose statistics nothing is known of.
    """
    as_it_is = mask_BN is None and launches.pay(y_BNC) and _reads(norm, y_BNC.dtype)
    if not as_it_is or (isinstance(norm, nn.GroupNorm) and y_BNC.stride(-1) == 1):
        y_BNC = cast(y_BNC, wide(y_BNC.dtype))
    if isinstance(norm, nn.Identity):
        return _times(y_BNC, factor)
    if mask_BN is None and isinstance(norm, _BatchNorm) and _takes_one_call(norm, y_BNC, y_BNC.dtype, group):
        return _batch_norm(norm, y_BNC, factor, counted=counted)
    if as_it_is and is_frozen(norm):
        weight_C, bias_C, mean_C, var_C = norm_tensors(norm)
        eps = cast_type(float, norm.eps)
        return _times(_one_batch_norm(y_BNC, weight_C, bias_C, mean_C, var_C, False, 0.0, eps), factor)
    if isinstance(norm, nn.LayerNorm):
        return nn.functional.layer_norm(y_BNC, norm.normalized_shape, *_vectors(norm, y_BNC, factor), norm.eps)
    if isinstance(norm, nn.RMSNorm):
        weight_C, _ = _vectors(norm, y_BNC, factor)
        return nn.functional.rms_norm(y_BNC, norm.normalized_shape, weight_C, norm.eps)
    if isinstance(norm, nn.GroupNorm):
        return _group_norm(norm, y_BNC, mask_BN, *_vectors(norm, y_BNC, factor))
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
    return _times(norm(y_BNC.mT).mT, factor)


def _times(x: Tensor, factor: Tensor | None) -> Tensor:
    return x if factor is None else x * cast(factor, x.dtype)


def _vectors(norm: nn.Module, y_BNC: Tensor, factor: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """A norm's weight and bias times a factor, in the type of what it is applied to."""
    weight_C, bias_C, *_ = norm_tensors(norm)
    if weight_C is None and factor is not None:
        # Dense: PyTorch's batch norm of rows has wrong gradients for a weight of stride 0.
        weight_C = factor.new_ones(y_BNC.shape[-1])
    weight_C, bias_C = (
        None if vector is None else _times(cast(vector, y_BNC.dtype), factor) for vector in (weight_C, bias_C)
    )
    return weight_C, bias_C


def _reads(norm: nn.Module, dtype: torch.dtype) -> bool:
    """Whether PyTorch applies a norm of a known kind to tensors of a type in one call.

    Batch norms may have tensors of the wide type beside those of a half type.
    """
    if isinstance(norm, nn.Identity):
        return True
    both = isinstance(norm, _BatchNorm) or is_frozen(norm)
    if not both and not isinstance(norm, nn.GroupNorm | nn.LayerNorm | nn.RMSNorm):
        return False
    types = {tensor.dtype for tensor in norm_tensors(norm) if tensor is not None}
    return types <= {dtype} or (both and types == {wide(dtype)})


def _takes_one_call(norm: _BatchNorm, y_BNC: Tensor, dtype: torch.dtype, group: str) -> bool:
    """Whether PyTorch's batch norm may be called on a tensor like one, of a type, as it is.

    It knows no transforms and no parts of a batch.
    """
    if torch.compiler.is_compiling() or is_transformed() or is_traceable_wrapper_subclass(cast_type(object, y_BNC)):
        return False
    if synchronizes(norm):
        return False
    alike = norm.weight is None or norm.weight.dtype == dtype
    if not alike and not (launches.pay(y_BNC) and _reads(norm, dtype)):
        return False
    if not uses_batch_statistics(norm):
        return True
    return not group and norm.momentum is not None and y_BNC.shape[0] * y_BNC.shape[1] > 1


def count_batch(norms: Sequence[nn.Module], x_BNC: Tensor, compute: torch.dtype) -> bool:
    """Count a batch in the counters of all norms in one call, if each learns from it in one call.

    Args:
        norms: of a layer.
        x_BNC: its input.
        compute: type of the products over nodes.
    """
    if not launches.pay(x_BNC):
        return False
    # Float16 is normalised as float32 where it might be out of range.
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
    # Tensors of the wide type may be beside those of a half type.
    weight_C, bias_C = (norm.weight, norm.bias) if factor is None else _vectors(norm, y_BNC, factor)
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
        # On a CPU, rows with gaps take several times as long as a copy.
        rows_MC = (y_BNC.contiguous() if y_BNC.is_cpu else y_BNC).flatten(0, 1)
        return torch.batch_norm(rows_MC, *arguments).view(y_BNC.shape)
    return torch.batch_norm(y_BNC.mT, *arguments).mT


def _group_norm(
    norm: nn.GroupNorm, y_BNC: Tensor, mask_BN: Tensor | None, weight_C: Tensor | None, bias_C: Tensor | None
) -> Tensor:
    # PyTorch's backward pass of group norm takes a DTensor's shape for that of its part.
    if mask_BN is None and not is_traceable_wrapper_subclass(cast_type(object, y_BNC)):
        if y_BNC.stride(-1) != 1:
            return nn.functional.group_norm(y_BNC.mT, norm.num_groups, weight_C, bias_C, norm.eps).mT
        if y_BNC.is_cpu:
            # Nodes as the width of images whose channels lie innermost: many times as fast as the operations below.
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

    With a process group, or that of a synchronised norm, the statistics are those of its processes together.

    Raises:
        ValueError: a single node in the whole batch, which has no spread.
    """
    assert isinstance(norm, _BatchNorm)
    if isinstance(norm, nn.SyncBatchNorm) and synchronizes(norm):
        # Its own group, for it may be a larger one: that of all data, and not of one input's nodes alone.
        own = norm.process_group or group_of_all.WORLD
        assert own is not None
        group = own.group_name
    if group:
        mean_C, var_C, count = _over_processes(mean_C, var_C, count, group)
    elif isinstance(count, int) and count == 1:
        raise ValueError(
            "batch norm in training mode needs more than one node in the batch, got 1; use larger inputs or batches, "
            "eval(), or another norm"
        )
    if tracks(norm):
        _update_running(norm, mean_C.detach(), var_C.detach(), count)
    return affine_of_statistics(mean_C, var_C, norm.weight, norm.bias, norm.eps)


def tracks(norm: nn.Module) -> bool:
    """Whether a batch norm learns running statistics from the batch at hand."""
    return isinstance(norm, _BatchNorm) and norm.training and norm.track_running_stats and norm.running_mean is not None


def update_running(
    norms: Sequence[_BatchNorm], means: Sequence[Tensor], inverses: Sequence[Tensor], count: int
) -> None:
    """Update the running statistics of norms with one eps and one momentum, in a few calls for all.

    Args:
        norms: that track statistics.
        means: of the batch, for each norm.
        inverses: 1 / sqrt(variance + eps) of the batch, for each norm, with the biased variance.
        count: nodes of the batch.
    """
    variances_C, sizes = torch.cat(list(inverses)).pow_(-2).sub_(norms[0].eps), [len(mean) for mean in means]
    if norms[0].momentum is None:
        for norm, mean_C, var_C in zip(norms, means, variances_C.split(sizes), strict=True):
            _update_running(norm, mean_C, var_C, count)
        return
    torch._foreach_add_([norm.num_batches_tracked for norm in norms if norm.num_batches_tracked is not None], 1)
    unbiased = variances_C.mul_(count / max(count - 1, 1)).split(sizes)
    for name, batch in (("running_mean", means), ("running_var", unbiased)):
        running = [cast_type(Tensor, own_tensor(norm, name)) for norm in norms]
        torch._foreach_lerp_(
            running, [cast(value, old.dtype) for value, old in zip(batch, running, strict=True)], norms[0].momentum
        )


def _update_running(norm: _BatchNorm, mean_C: Tensor, var_C: Tensor, count: Tensor | int) -> None:
    assert norm.running_mean is not None
    assert norm.running_var is not None
    assert norm.num_batches_tracked is not None
    seen = norm.num_batches_tracked + 1
    share: float | Tensor = seen.to(var_C.dtype).reciprocal() if norm.momentum is None else norm.momentum
    if isinstance(count, Tensor):
        # A batch whose mask leaves nothing has no statistics to learn from.
        share = (count > 0).to(var_C.dtype) * share
        unbiased_C = var_C * (count / (count - 1).clamp(min=1))
    else:
        unbiased_C = var_C * (count / max(count - 1, 1))
    if launches.pay(mean_C):
        # One call for each, instead of four.
        for running_C, batch_C in ((norm.running_mean, mean_C), (norm.running_var, unbiased_C)):
            weight = cast(share, running_C.dtype) if isinstance(share, Tensor) else share
            running_C.lerp_(cast(batch_C, running_C.dtype), weight)
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
