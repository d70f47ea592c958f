"""The matrices of a layer, each with the norm after it, and their places in the equations."""

import math
from collections.abc import Sequence
from hashlib import blake2b
from typing import Any, NamedTuple, Self, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from latentgnn.config import LatentGNNConfig
from latentgnn.modules import child, own_tensor
from latentgnn.norms import NormFactory, NormKind, kind_of, norm_tensors, uses_batch_statistics
from latentgnn.ranks import Ranks

T = TypeVar("T")

# Packages whose subclasses of PyTorch's norms compute what their bases do; some for another layout, or in float32.
_SAME_ARITHMETIC = ("torch", "torchvision", "timm")


class Projection(nn.Module):
    """The parameters of a 1x1 convolution without bias and of the norm after it.

    Args:
        in_features: columns of the matrix.
        out_features: rows of the matrix.
        norm: callable from a channel count to the norm.
        device: of the parameters.
        dtype: of the parameters.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        norm: NormFactory,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_features, in_features, device=device, dtype=dtype))
        self.norm = _made(norm, out_features)
        _move(self.norm, device, dtype)

    def reset_parameters(self) -> None:
        """Initialize the matrix as PyTorch's convolutions do, and the norm by its own method."""
        nn.init.kaiming_uniform_(self.weight, a=math.sqrt(5))
        reset = getattr(self.norm, "reset_parameters", None)
        if callable(reset):
            reset()

    def extra_repr(self) -> str:
        return f"{self.weight.shape[1]} -> {self.weight.shape[0]}"


def _made(norm: NormFactory, channels: int) -> nn.Module:
    try:
        module = norm(channels)
    except TypeError as error:
        raise TypeError(
            f"norm must be callable with a channel count alone, but {norm!r} is not ({error}); give the other "
            "arguments with functools.partial, as in partial(nn.GroupNorm, 32), or take latentgnn.norms.group_norm"
        ) from error
    except ValueError as error:
        raise ValueError(
            f"norm {norm!r} does not take {channels} channels ({error}); the layer has norms over the reduced "
            "channels, the latents and all channels, so take one that fits each, such as latentgnn.norms.group_norm"
        ) from error
    if not isinstance(module, nn.Module):
        raise TypeError(f"norm must give a module for a channel count, got {type(module).__name__}")
    _check_size(module, channels)
    if _has_own_forward(module):
        raise TypeError(
            f"{type(module).__name__} derives from a norm of PyTorch's, whose arithmetic the layer computes without "
            "calling the module, but has a forward of its own; pass PyTorch's class, or a module that does not derive "
            "from one"
        )
    # The layer has its own activations, and computes a norm's arithmetic without calling the module.
    if not isinstance(getattr(module, "act", None), nn.Identity | None):
        raise TypeError(f"norm must be a norm alone, but {type(module).__name__} has the activation {module.act}")
    return module


def _check_size(norm: nn.Module, channels: int) -> None:
    """Refuse a norm of PyTorch's that is for another number of channels, or does not know yet for how many."""
    name = type(norm).__name__
    if any(nn.parameter.is_lazy(tensor) for tensor in norm.parameters()):
        known = name.removeprefix("Lazy")
        raise TypeError(f"{name} learns its size in a call, which the layer does not make; pass {known}")
    for attribute in ("num_features", "num_channels", "normalized_shape"):
        size = getattr(norm, attribute, None)
        if size is not None and size not in (channels, (channels,)):
            raise ValueError(
                f"norm must be for the channels that it is called with; called with {channels}, it gave a {name} with "
                f"{attribute} {size}"
            )


def _move(norm: nn.Module, device: torch.device | str | None, dtype: torch.dtype | None) -> None:
    """`norm.to(device, dtype)`, which fails under FakeTensorMode."""
    if device is None and dtype is None:
        return
    for module in norm.modules():
        tensors: list[tuple[str, Tensor | None]] = [*module._parameters.items(), *module._buffers.items()]
        for name, old in tensors:
            if old is None:
                continue
            new = old.detach().to(device=device, dtype=dtype if old.is_floating_point() else None)
            if isinstance(old, nn.Parameter):
                module._parameters[name] = nn.Parameter(new, old.requires_grad)
            else:
                module._buffers[name] = new


def _has_own_forward(norm: nn.Module) -> bool:
    """Whether a norm derives from one of PyTorch's and may compute something else."""
    if not isinstance(norm, _NormBase | nn.GroupNorm | nn.LayerNorm | nn.RMSNorm | nn.Identity):
        return False
    owner = next(kind for kind in type(norm).__mro__ if "forward" in vars(kind))
    return owner.__module__.partition(".")[0] not in _SAME_ARITHMETIC


class NormedMatrix(NamedTuple):
    """The tensors of a matrix and of the norm after it; ``None`` for what the norm does not have."""

    matrix: Tensor
    weight: Tensor | None
    bias: Tensor | None
    mean: Tensor | None
    var: Tensor | None

    @classmethod
    def each(cls, flat: Sequence[Tensor | None]) -> list[Self]:
        """From the tensors of several, one after the other."""
        return [cls._make(part) for part in split_parts(flat)]


def split_parts(flat: Sequence[T]) -> list[Sequence[T]]:
    """The five values of each projection, from those of all of them, one after the other."""
    size = len(NormedMatrix._fields)
    return [flat[first : first + size] for first in range(0, len(flat), size)]


class Arrangement:
    """The projections of a layer by their place in the equations, with the tensors they hold now.

    Args:
        config: the layer's options.
        reduces: W of gather and, unless symmetric, of scatter.
        assigns: Psi of every kernel, for gather and, unless symmetric, for scatter.
        convs: G of every kernel; empty without graph convolution.
        expand: U.
        gamma: ``None`` without a residual connection.
        ranks: the processes that hold the nodes, ``None`` where this one holds all.

    Attributes:
        projections: all of them, in the order of the arguments.
        norms: the norm of each.
        parts: the tensors of each.
        matrices: of each.
        norm_columns: the weights, the biases, the running means and the running variances of the norms.
        norm_kind: the kind of all norms; ``None`` if they differ or the kind is unknown.
        eps: eps of each norm.
    """

    def __init__(
        self,
        config: LatentGNNConfig,
        reduces: Sequence[Projection],
        assigns: Sequence[Sequence[Projection]],
        convs: Sequence[Projection],
        expand: Projection,
        gamma: Tensor | None,
        ranks: Ranks | None = None,
    ) -> None:
        self.config, self.gamma, self.ranks = config, gamma, ranks
        self.reduces, self.assigns, self.convs, self.expand = reduces, assigns, convs, expand
        self.projections = [*reduces, *(part for way in assigns for part in way), *convs, expand]
        self.norms = [child(projection, "norm") for projection in self.projections]
        self.parts = [
            NormedMatrix(cast(Tensor, own_tensor(projection, "weight")), *norm_tensors(norm))
            for projection, norm in zip(self.projections, self.norms, strict=True)
        ]
        columns: list[Any] = list(zip(*self.parts, strict=True))
        self.matrices: Sequence[Tensor] = columns[0]
        self.norm_columns: Sequence[Sequence[Tensor | None]] = columns[1:]
        self.norm_kind: NormKind | None = kind_of(self.norms)
        self.eps = [getattr(norm, "eps", 0.0) for norm in self.norms]

    def flat(self, *, statistics: bool = True) -> list[Tensor | None]:
        """The tensors of all projections one after the other, and gamma; on demand without running statistics."""
        parts = self.parts if statistics else [part._replace(mean=None, var=None) for part in self.parts]
        return [*(tensor for part in parts for tensor in part), self.gamma]

    def fingerprint(self) -> str:
        """A hash of all that the output depends on, except the input; without running statistics that are not used."""
        config, tensors = self.config, list[Tensor | None]()
        for part, norm in zip(self.parts, self.norms, strict=True):
            tensors += part._replace(mean=None, var=None) if uses_batch_statistics(norm) else part
        tensors.append(self.gamma)
        told = [
            *(config.channels, config.latents, config.reduction, config.symmetric, config.graph_conv, config.residual),
            *(config.num_groups, config.node_scale, self.norm_kind, self.eps),
        ]
        digest = blake2b(repr(told).encode(), digest_size=16)
        for tensor in tensors:
            digest.update(repr(None if tensor is None else (tensor.dtype, tensor.shape)).encode())
            if tensor is not None:
                # Hash a copy: memory that NumPy has seen cannot be resized, and FSDP2 frees parameters by resizing.
                digest.update(bytes_of(tensor.detach().clone()))
        return digest.hexdigest()


def bytes_of(x: Tensor) -> memoryview:
    """The bytes of a tensor's data."""
    return x.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data
