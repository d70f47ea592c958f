"""Which path a layer takes for an input, and why it does not take the core.

The core (`latentgnn.core`) has a hand-written backward pass, for affine norms, batch norm in training, and group, layer
and RMS norm. The plain path (`latentgnn.plain.equations`) runs the equations as PyTorch operations, for everything
else. `latentgnn.plain.few_calls` is a shorter version of the plain path for common layers.
"""

from collections.abc import Iterator, Sequence, Sized
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Literal, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_in_torch_dispatch_mode, is_traceable_wrapper_subclass

from latentgnn import by_size, kernels, modes
from latentgnn.batch_statistics import synchronizes
from latentgnn.config import LatentGNNConfig
from latentgnn.core.layouts import is_plain, nodes_innermost
from latentgnn.modes import has_values, is_exporting, is_transformed
from latentgnn.norms import NormKind
from latentgnn.numerics import wide
from latentgnn.plain import few_calls
from latentgnn.projections import Arrangement

Memory = Literal["auto", "hold", "recompute"]

_HALF = "statistics in half precision"
# The plain path may take packed points, one scene at a time, if scenes have at least this many points on average.
_LARGE_SCENES = 1024
_memory: ContextVar[Memory] = ContextVar("latentgnn_memory", default="auto")


@contextmanager
def memory(choice: Memory) -> Iterator[None]:
    """Choose, within a ``with`` block, whether layers hold or recompute what the backward pass needs.

    Args:
        choice: ``hold`` keeps what the forward pass computes; ``recompute`` keeps little more than the input and
            computes the rest again. Both use the core where possible, unless a compiler traces for a GPU. ``auto``,
            the default, holds if `latentgnn.by_size.holds` says so, and takes the plain path for small inputs and,
            if it does not hold too much, on GPUs.

    Raises:
        ValueError: another choice.

    Example:
        >>> import torch, latentgnn
        >>> layer = latentgnn.LatentGNN(16, num_latents=4)
        >>> with memory("recompute"):
        ...     y = layer(torch.randn(1, 16, 8, 8))
    """
    if choice not in ("auto", "hold", "recompute"):
        raise ValueError(f"memory takes 'auto', 'hold' or 'recompute', got {choice!r}")
    token = _memory.set(choice)
    try:
        yield
    finally:
        _memory.reset(token)


def holds(config: LatentGNNConfig, x_BNC: Tensor, norm: NormKind | None) -> bool:
    """Whether the forward pass holds what it computes for the backward pass; ``auto`` decides by sizes alone."""
    choice = _memory.get()
    if choice != "auto":
        return choice == "hold"
    nodes, on_gpu = x_BNC.shape[0] * x_BNC.shape[1], modes.is_on_gpu(x_BNC)
    return by_size.holds(config, nodes, x_BNC.element_size(), norm=norm or "affine", on_gpu=on_gpu)


class Choice(NamedTuple):
    """The path that a layer takes for an input.

    Args:
        path: the core, the plain path, or its shorter version.
        holds: whether what the backward pass needs is held; otherwise it is recomputed there.
        why_not_core: the reason, ``None`` for the core.
    """

    path: Literal["core", "plain", "few_calls"]
    holds: bool
    why_not_core: str | None


class _Call(NamedTuple):
    """A layer and its input, as `choose` takes them."""

    layer: Arrangement
    x_BNC: Tensor
    mask_BN: Tensor | None
    compute: torch.dtype
    offsets: Sized | None


def choose(
    layer: Arrangement,
    x_BNC: Tensor,
    mask_BN: Tensor | None,
    compute: torch.dtype,
    offsets: Sized | None = None,
) -> Choice:
    """The path that a layer takes for an input.

    Args:
        layer: the layer's projections.
        x_BNC: the input.
        mask_BN: nodes that take part.
        compute: dtype of products over nodes.
        offsets: (S + 1,), of packed points.
    """
    call = _Call(layer, x_BNC, mask_BN, compute, offsets)
    if is_exporting():
        return Choice("plain", True, "exported programs must run where this library is not installed")
    faster = _if_small(call) or _if_on_gpu(call)
    if faster is not None:
        return faster
    why_not = _why_not(call)
    if why_not is None:
        compiled = torch.compiler.is_compiling()
        held = torch.is_grad_enabled() and not compiled and holds(layer.config, x_BNC, layer.norm_kind)
        return Choice("core", held, None)
    if why_not == _HALF and layer.norm_kind == "batch" and _has_few_calls(call):
        # The plain path would hold as much, because batch norm cannot be recomputed.
        return Choice("few_calls", True, why_not)
    return Choice("plain", not _recomputes(call), why_not)


def why_not_core(
    layer: Arrangement,
    x_BNC: Tensor,
    mask_BN: Tensor | None,
    compute: torch.dtype,
    offsets: Sized | None = None,
) -> str | None:
    """Why a layer does not take the core for an input, ``None`` if it does. Arguments are those of `choose`."""
    return choose(layer, x_BNC, mask_BN, compute, offsets).why_not_core


def _plain_or_shorter(call: _Call, why_not: str, *, holds: bool = True) -> Choice:
    return Choice("few_calls" if holds and _has_few_calls(call) else "plain", holds, why_not)


def _has_few_calls(call: _Call) -> bool:
    # `few_calls` does not support packed scenes.
    return call.offsets is None and few_calls.fits(call.layer, call.x_BNC, call.mask_BN, call.compute)


def _recomputes(call: _Call) -> bool:
    """Whether the plain path runs again in the backward pass."""
    if not torch.is_grad_enabled() or torch.compiler.is_compiling():
        return False
    # All processes must make the same sums, and others may hold parts of other sizes.
    if is_transformed() or call.layer.ranks is not None:
        return False
    return not holds(call.layer.config, call.x_BNC, None)


def _why_not(call: _Call) -> str | None:
    """Why the core cannot compute an input, or why a compiler does better."""
    layer, x_BNC, mask_BN, compute, _ = call
    if is_transformed():
        return "a transform of torch.func is active, or forward-mode derivatives are being computed"
    norms, kind = layer.norms, layer.norm_kind
    if kind == "affine":
        return None
    if kind is None:
        return "norms of several kinds, or of a kind that the core does not know"
    if torch.compiler.is_compiling() or is_in_torch_dispatch_mode() or not has_values(x_BNC):
        return "a compiler fuses norms that take statistics better"
    if is_traceable_wrapper_subclass(cast(object, x_BNC)):
        return "statistics of nodes that are spread over devices, as in a DTensor"
    if compute not in (torch.float32, torch.float64) or x_BNC.dtype != compute:
        return _HALF
    if len({norm.eps for norm in norms}) > 1:
        return "norms that differ in eps"
    if any(len({tensor is None for tensor in column}) > 1 for column in layer.norm_columns[:2]):
        return "norms of which some have weights and some not"
    if kind == "batch" and layer.ranks is not None:
        return "batch statistics of several processes"
    return _why_not_batch(norms, x_BNC, mask_BN) if kind == "batch" else _why_not_sample(kind, layer, mask_BN)


def _if_small(call: _Call) -> Choice | None:
    """The plain path if an input is too small for the core to be faster; for plain tensors on a CPU, without a mask."""
    layer, x_BNC, mask_BN, compute, offsets = call
    # In PyTorch 2.11, Dynamo cannot read a context variable.
    if torch.compiler.is_compiling() or mask_BN is not None or x_BNC.device.type != "cpu":
        return None
    if _memory.get() != "auto":
        return None
    if layer.ranks is not None:  # all processes must take the same path, and others may hold parts of other sizes
        return None
    traced = is_in_torch_dispatch_mode() or not has_values(x_BNC)
    if traced or not is_plain(x_BNC) or not compute == x_BNC.dtype == wide(compute):
        return None
    samples, nodes, _ = x_BNC.shape
    if offsets is not None and not _has_large_scenes(layer.norm_kind, x_BNC, offsets):
        return None
    if offsets is None and by_size.is_small(layer.config, samples * nodes):
        small = "the input is so small that calls cost more than arithmetic, and the plain path has fewer"
        return _plain_or_shorter(call, small, holds=not _recomputes(call))
    recorded, kind, threads = torch.is_grad_enabled(), layer.norm_kind, torch.get_num_threads()
    if recorded and not holds(layer.config, x_BNC, kind):
        return None
    if not nodes_innermost(x_BNC):
        if by_size.channels_last_pays(layer.config, samples * nodes, recorded=recorded, norm=kind, threads=threads):
            why_not = "channels lie innermost, and the nodes are few enough for the plain path to be faster"
            return _plain_or_shorter(call, why_not)
    elif by_size.channels_first_pays(layer.config, samples, nodes, recorded=recorded, norm=kind, threads=threads):
        return _plain_or_shorter(call, "the map has few enough nodes for the plain path to be faster")
    return None


def _has_large_scenes(kind: NormKind | None, x_BNC: Tensor, offsets: Sized) -> bool:
    """Whether packed points have norms and scenes for which the plain path, scene by scene, may be faster."""
    if kind not in ("batch", "layer", "rms") or nodes_innermost(x_BNC):
        return False
    return x_BNC.shape[1] >= _LARGE_SCENES * (len(offsets) - 1)


def _if_on_gpu(call: _Call) -> Choice | None:
    """The plain path if it is faster on a GPU: it makes fewer calls than the core without Triton kernels.

    Never for packed points, because the plain path loops over the scenes.
    """
    layer, x_BNC, _, compute, offsets = call
    if not modes.is_on_gpu(x_BNC) or layer.ranks is not None:
        return None
    nodes = x_BNC.shape[0] * x_BNC.shape[1]
    pay = not torch.compiler.is_compiling() or by_size.kernels_pay_compiled(nodes, x_BNC.shape[2])
    if pay and _has_kernels(layer, x_BNC, compute):
        return None
    if offsets is not None:
        return None
    if torch.compiler.is_compiling():
        return _plain_or_shorter(call, "a compiler fuses the plain path's operations on a GPU")
    if _memory.get() != "auto" or is_in_torch_dispatch_mode() or not has_values(x_BNC) or not is_plain(x_BNC):
        return None
    few = _has_few_calls(call)
    # Folded norms hold nothing for the backward pass.
    folded = few and layer.norm_kind == "affine" and compute == wide(compute)
    if not folded and not by_size.plain_pays_on_gpu(layer.config, nodes, x_BNC.element_size()):
        return None
    if few:
        return Choice("few_calls", True, "the input is on a GPU, where few calls take less time than the core's")
    why_not = "the input is on a GPU, where the plain path takes less time, and does not hold too much"
    return Choice("plain", True, why_not)


def _has_kernels(layer: Arrangement, x_BNC: Tensor, compute: torch.dtype) -> bool:
    config = layer.config
    width = config.reduced_channels // config.num_groups
    why_not = kernels.why_not_layer(
        x_BNC.device,
        compute,
        latents=config.latents,
        width=width,
        groups=config.num_groups,
        symmetric=config.symmetric,
        norm=layer.norm_kind,
        shared=layer.ranks is not None,
    )
    if why_not is not None:
        return False
    # A compiler cannot trace the query of the device; the operator makes it at run time.
    return torch.compiler.is_compiling() or kernels.why_not_device(x_BNC.device, compute, width) is None


def _why_not_batch(norms: Sequence[nn.Module], x_BNC: Tensor, mask_BN: Tensor | None) -> str | None:
    if mask_BN is not None:
        return "batch statistics of the nodes in a mask"
    if any(synchronizes(norm) for norm in norms):
        return "batch statistics of several processes"
    if x_BNC.shape[0] * x_BNC.shape[1] < 2:
        return "a single node has no spread"
    if len({norm.momentum for norm in norms}) > 1:
        return "batch norms that differ in momentum"
    return None


def _why_not_sample(kind: NormKind, layer: Arrangement, mask_BN: Tensor | None) -> str | None:
    if len(layer.config.latents) > 1:
        return "norms over the latents of each of several kernels"
    if kind == "group" and mask_BN is not None:
        return "statistics of the nodes in a mask"
    return None
