"""Which path a layer takes for an input, and for the core the reason why not.

The core (`latentgnn.core`) has gradients arranged by hand, for norms that are affine maps, batch norm in training, and
group, layer and RMS norm. The plain path (`latentgnn.plain`) is the equations as PyTorch operations, for everything
else; `latentgnn.few_calls` has what is small and common of it.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from typing import Literal, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._python_dispatch import is_in_torch_dispatch_mode, is_traceable_wrapper_subclass

from latentgnn import cost, few_calls, kernels, modes, plain
from latentgnn.config import LatentGNNConfig
from latentgnn.core import node
from latentgnn.core.layouts import is_plain, nodes_innermost
from latentgnn.core.parameters import joined, split_latent_vector
from latentgnn.core.plan import Plan
from latentgnn.core.statistics import Statistics
from latentgnn.functional import wide
from latentgnn.modes import is_exporting, is_transformed
from latentgnn.norms import NormKind, is_affine, synchronizes, tracks, update_running
from latentgnn.projections import Arrangement
from latentgnn.ranks import Ranks, agree
from latentgnn.samples import Nodes, members

Memory = Literal["auto", "hold", "recompute"]

_SMALL = "the input is so small that calls cost more than arithmetic, and the plain path has fewer"
_FEW_NODES = "the map has so few nodes that the plain path takes them faster"
_ROWS = "channels lie innermost, and there are so few nodes that the plain path takes them faster"
_ON_GPU = "the input is on a GPU, where the plain path takes less time, and does not hold too much"
_FEW_ON_GPU = "the input is on a GPU, where few calls take less time than the core's"
_HALF = "statistics in half precision"
_COMPILED = "a compiler fuses the plain path's operations on a GPU"
_memory: ContextVar[Memory] = ContextVar("latentgnn_memory", default="auto")


@contextmanager
def memory(choice: Memory) -> Iterator[None]:
    """Say for the time of a ``with`` block what layers do with what the backward pass needs.

    Args:
        choice: ``hold`` keeps what the forward pass computes; ``recompute`` keeps the input and little more, and
            computes it again; both take the core where it can be had, unless a compiler traces for a GPU. ``auto``,
            the default, holds where `latentgnn.cost.holds` says so, and takes the plain path for small inputs and on
            GPUs, where that does not hold too much.

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
    """Whether what the forward pass computes is held for the backward pass; it follows from sizes alone."""
    choice = _memory.get()
    if choice != "auto":
        return choice == "hold"
    nodes, on_gpu = x_BNC.shape[0] * x_BNC.shape[1], modes.is_on_gpu(x_BNC)
    return cost.holds(config, nodes, x_BNC.element_size(), norm=norm or "affine", on_gpu=on_gpu)


def why_not_core(
    layer: Arrangement,
    x_BNC: Tensor,
    mask_BN: Tensor | None,
    compute: torch.dtype,
    offsets: Tensor | None = None,
) -> str | None:
    """Why a layer cannot take the core for an input, ``None`` if it can.

    Args:
        layer: its parameters.
        x_BNC: the input.
        mask_BN: nodes that take part.
        compute: type of the products over nodes.
        offsets: of packed points.
    """
    if is_exporting():
        return "exported programs must run where this library is not installed"
    if small := _why_small(layer, x_BNC, mask_BN, offsets, compute):
        return small
    if faster := _why_on_gpu(layer, x_BNC, mask_BN, offsets, compute):
        return faster
    if is_transformed():
        return "a transform of torch.func is active, or forward-mode derivatives are being computed"
    norms, kind = layer.norms, layer.norm_kind
    if kind == "affine":
        return None
    if kind is None:
        return "norms of several kinds, or of a kind that the core does not know"
    if torch.compiler.is_compiling() or is_in_torch_dispatch_mode() or not node.has_values(x_BNC):
        return "a compiler fuses norms that take statistics better"
    if is_traceable_wrapper_subclass(cast(object, x_BNC)):
        return "statistics of nodes that are spread over devices, as in a DTensor"
    if compute not in (torch.float32, torch.float64) or x_BNC.dtype != compute:
        return _HALF
    if len({norm.eps for norm in norms}) > 1:
        return "norms that differ in eps"
    if any(len({tensor is None for tensor in layer.tensors[place::5]}) > 1 for place in (1, 2)):
        return "norms of which some have weights and some not"
    if kind == "batch" and layer.ranks is not None:
        return "batch statistics of several processes"
    return _why_not_batch(norms, x_BNC, mask_BN) if kind == "batch" else _why_not_sample(kind, layer, mask_BN)


def _why_small(
    layer: Arrangement, x_BNC: Tensor, mask_BN: Tensor | None, offsets: Tensor | None, compute: torch.dtype
) -> str | None:
    """Why an input is too small for the core to be faster: measured on CPUs, for all nodes of plain tensors."""
    # In PyTorch 2.11, Dynamo cannot read a context variable.
    if torch.compiler.is_compiling() or mask_BN is not None or offsets is not None or x_BNC.device.type != "cpu":
        return None
    if _memory.get() != "auto":
        return None
    if layer.ranks is not None:  # processes with parts of other sizes must make the same sums
        return None
    traced = is_in_torch_dispatch_mode() or not node.has_values(x_BNC)
    if traced or not is_plain(x_BNC) or not compute == x_BNC.dtype == wide(compute):
        return None
    samples, nodes, _ = x_BNC.shape
    if cost.is_small(layer.config, samples * nodes):
        return _SMALL
    recorded, kind, threads = torch.is_grad_enabled(), layer.norm_kind, torch.get_num_threads()
    if recorded and not holds(layer.config, x_BNC, kind):
        return None
    if not nodes_innermost(x_BNC):
        pays = cost.rows_pay(layer.config, samples * nodes, recorded=recorded, norm=kind, threads=threads)
        return _ROWS if pays else None
    if cost.convolutions_pay(layer.config, samples, nodes, recorded=recorded, norm=kind, threads=threads):
        return _FEW_NODES
    return None


def _why_on_gpu(
    layer: Arrangement, x_BNC: Tensor, mask_BN: Tensor | None, offsets: Tensor | None, compute: torch.dtype
) -> str | None:
    """Why the plain path is faster on a GPU: it has fewer calls than the core without the Triton kernels.

    Not for packed points, which it takes apart.
    """
    if not modes.is_on_gpu(x_BNC) or layer.ranks is not None:
        return None
    if _has_kernels(layer, x_BNC, compute) and (
        not torch.compiler.is_compiling() or cost.kernels_pay_compiled(x_BNC.shape[0] * x_BNC.shape[1], x_BNC.shape[2])
    ):
        return None
    if offsets is not None:
        return None
    if torch.compiler.is_compiling():
        return _COMPILED
    if _memory.get() != "auto" or is_in_torch_dispatch_mode() or not node.has_values(x_BNC) or not is_plain(x_BNC):
        return None
    few = few_calls.fits(layer, x_BNC, mask_BN, compute)
    # Folded norms are not applied to anything that would be held.
    folded = few and layer.norm_kind == "affine" and compute == wide(compute)
    nodes = x_BNC.shape[0] * x_BNC.shape[1]
    if folded or cost.plain_pays_on_gpu(layer.config, nodes, x_BNC.element_size()):
        return _FEW_ON_GPU if few else _ON_GPU
    return None


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
    # A compiler cannot trace what asks for the device; the operator asks again.
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


def run(layer: Arrangement, x_BNC: Tensor, mask_BN: Tensor | None, offsets: Tensor | None) -> Tensor:
    """The layer's output by the path that it takes.

    Args:
        layer: its parameters.
        x_BNC: input, (B, N, C) whatever its strides.
        mask_BN: nodes that take part; the others come back unchanged.
        offsets: (S + 1,), where each sample begins among the nodes of a single row, and the end; ``None`` if rows are
            samples.

    Returns:
        (B, N, C) in the input's type.
    """
    compute, without_autocast = products_in(x_BNC)
    with without_autocast:
        if layer.ranks is not None:
            _check_ranks(layer, layer.ranks, x_BNC, offsets, compute)
        if x_BNC.numel() == 0:
            return _empty(layer, x_BNC, offsets, compute)
        traced = torch.compiler.is_compiling() or is_exporting()
        if modes.is_on_gpu(x_BNC) and not traced and x_BNC.shape[1] == 1:
            # A single node may have any stride, and cuBLAS refuses some.
            x_BNC = x_BNC.clone(memory_format=torch.contiguous_format)
        return _by_path(layer, x_BNC, mask_BN, offsets, compute)


def products_in(x_BNC: Tensor) -> tuple[torch.dtype, AbstractContextManager[None]]:
    """The type of the products over nodes, and a context in which they are to be computed.

    Autocast chooses no types in it, so that sums over nodes stay in float32.
    """
    device = x_BNC.device.type
    if x_BNC.is_meta or not torch.is_autocast_enabled(device) or x_BNC.dtype == torch.float64:
        return x_BNC.dtype, nullcontext()
    return torch.get_autocast_dtype(device), torch.autocast(device, enabled=False)


def _by_path(
    layer: Arrangement, x_BNC: Tensor, mask_BN: Tensor | None, offsets: Tensor | None, compute: torch.dtype
) -> Tensor:
    why_not = why_not_core(layer, x_BNC, mask_BN, compute, offsets)
    if why_not is None:
        return _core(layer, x_BNC, mask_BN, offsets, compute)
    if why_not == _FEW_ON_GPU:
        return few_calls.latent_gnn(layer, x_BNC, mask_BN, compute)
    recompute = why_not != _ON_GPU and _recomputes(layer, x_BNC)
    few = why_not in (_SMALL, _FEW_NODES, _ROWS, _COMPILED) and not recompute
    # Batch norm cannot be computed again, and so the plain path would hold as much.
    few = few or (why_not == _HALF and layer.norm_kind == "batch")
    if few and few_calls.fits(layer, x_BNC, mask_BN, compute):
        return few_calls.latent_gnn(layer, x_BNC, mask_BN, compute)
    return plain.latent_gnn(layer, x_BNC, nodes_of(x_BNC, mask_BN, offsets, layer.ranks), compute, recompute=recompute)


def nodes_of(x_BNC: Tensor, mask_BN: Tensor | None, offsets: Tensor | None, ranks: Ranks | None = None) -> Nodes:
    """An input's nodes as the plain path takes them."""
    group = ranks.group if ranks else ""
    if offsets is None:
        return Nodes(mask_BN, group=group)
    if is_exporting() or not node.has_values(offsets):
        return Nodes(mask_BN, group=group, member_SN=members(offsets.to(x_BNC.device), x_BNC.shape[1]))
    return Nodes(mask_BN, offsets.tolist(), group)


def _recomputes(layer: Arrangement, x_BNC: Tensor) -> bool:
    if not torch.is_grad_enabled() or torch.compiler.is_compiling():
        return False
    # Processes with parts of other sizes might not, and all of them must make the same sums.
    if is_transformed() or layer.ranks is not None:
        return False
    return not holds(layer.config, x_BNC, None)


def _check_ranks(layer: Arrangement, ranks: Ranks, x_BNC: Tensor, offsets: Tensor | None, compute: torch.dtype) -> None:
    """Refuse what processes cannot share, and compare with the others at the first call."""
    config = layer.config
    if is_exporting():
        raise ValueError("a layer whose nodes are shared cannot be exported; call shard_nodes(layer, None) first")
    for norm in layer.norms:
        if not (is_affine(norm) or isinstance(norm, _BatchNorm | nn.LayerNorm | nn.RMSNorm)):
            raise ValueError(
                f"{type(norm).__name__} takes statistics over all nodes of a sample, which several processes hold: a "
                "layer whose nodes are shared takes batch norm, frozen batch norm, layer norm, RMS norm or none"
            )
    if torch.compiler.is_compiling() or ranks.agreed or is_transformed() or not node.has_values(x_BNC):
        return
    read = [x_BNC, layer.gamma, *layer.tensors]
    facts = {
        "channels": config.channels,
        "reduced channels": config.reduced_channels,
        "latents": config.latents,
        "kind of layer": [config.symmetric, config.graph_conv, config.residual, config.num_groups, config.node_scale],
        "norms": sorted({f"{type(norm).__name__}{' in training' * norm.training}" for norm in layer.norms}),
        "type": str(compute),
        "samples": x_BNC.shape[0] if offsets is None else len(offsets) - 1,
        "gradients": torch.is_grad_enabled() and any(tensor.requires_grad for tensor in read if tensor is not None),
    }
    if not any(is_traceable_wrapper_subclass(cast(object, tensor)) for tensor in read if tensor is not None):
        facts["weights"] = layer.fingerprint()
    agree(ranks, facts, x_BNC.device)


def _empty(layer: Arrangement, x_BNC: Tensor, offsets: Tensor | None, compute: torch.dtype) -> Tensor:
    """No nodes give no nodes, and zero gradients."""
    samples = x_BNC.shape[0] if offsets is None else len(offsets) - 1
    if layer.ranks is not None and samples:
        # Other processes have some, and wait for this one's sums: those of a node that takes no part.
        rows = x_BNC.shape[0]
        one_BNC = torch.cat([x_BNC, x_BNC.new_zeros(rows, 1, x_BNC.shape[2])], 1)
        none_BN = torch.zeros(rows, 1, dtype=torch.bool, device=x_BNC.device)
        if offsets is not None:
            offsets = torch.nn.functional.pad(offsets[:-1], (0, 1), value=1)
        return _by_path(layer, one_BNC, none_BN, offsets, compute)[:, :0]
    total = x_BNC.new_zeros(1)
    for parameter in (parameter for part in layer.projections for parameter in part.parameters()):
        total = total + parameter.sum()
    return x_BNC + 0 * (total if layer.gamma is None else total + layer.gamma).to(x_BNC.dtype)


def _core(
    layer: Arrangement, x_BNC: Tensor, mask_BN: Tensor | None, offsets: Tensor | None, compute: torch.dtype
) -> Tensor:
    kind, tensors = layer.norm_kind, [*layer.tensors, layer.gamma]
    assert kind is not None
    if kind == "batch":
        for index in range(0, len(tensors) - 1, 5):
            tensors[index + 3] = tensors[index + 4] = None
    held = torch.is_grad_enabled() and not torch.compiler.is_compiling() and holds(layer.config, x_BNC, kind)
    plan = plan_of(layer, kind, compute, holds=held)
    out_BNC, statistics = node.run(x_BNC, mask_BN, offsets, tensors, plan)
    if statistics is not None:
        _learn(layer, statistics, plan, x_BNC.shape[0] * x_BNC.shape[1])
    return out_BNC


def plan_of(layer: Arrangement, kind: NormKind, compute: torch.dtype, *, holds: bool) -> Plan:
    """What kind of layer it is for the core."""
    config, norms = layer.config, layer.norms
    return Plan(
        groups=config.num_groups,
        latents=config.latents,
        symmetric=config.symmetric,
        graph_conv=config.graph_conv,
        residual=config.residual,
        node_scale=config.node_scale,
        norm=kind,
        eps=tuple(_eps(norm, compute) for norm in norms),
        norm_groups=tuple(norm.num_groups for norm in norms if isinstance(norm, nn.GroupNorm)),
        compute=compute,
        holds=holds,
        group="" if layer.ranks is None else layer.ranks.group,
        ranks=1 if layer.ranks is None else layer.ranks.count,
    )


def _eps(norm: nn.Module, dtype: torch.dtype) -> float:
    eps = getattr(norm, "eps", 0.0)
    # RMS norm's default.
    return torch.finfo(dtype).eps if eps is None else eps


def _learn(layer: Arrangement, statistics: node.BatchStatistics, plan: Plan, count: int) -> None:
    """Update the running statistics of batch norms in training."""
    means: list[Tensor] = []
    inverses: list[Tensor] = []

    def take(found: Statistics | None, split: Callable[[Tensor], Sequence[Tensor]]) -> None:
        if found is not None:
            assert found.mean is not None
            means.extend(split(found.mean))
            inverses.extend(split(found.inverse))

    take(statistics.reduce, lambda vector: vector.chunk(len(layer.reduces)))
    for found in statistics.assigns:
        take(found, lambda vector: split_latent_vector(vector, plan))
    take(statistics.conv, lambda vector: vector.chunk(len(layer.convs)))
    parts = statistics.expand
    means.append(cast(Tensor, joined([part.mean for part in parts], 0)))
    inverses.append(cast(Tensor, joined([part.inverse for part in parts], 0)))
    learning = [
        (norm, mean, inverse) for norm, mean, inverse in zip(layer.norms, means, inverses, strict=True) if tracks(norm)
    ]
    if learning:
        norms, means, inverses = (list(column) for column in zip(*learning, strict=True))
        update_running(norms, means, inverses, count)
