"""What the layer is compared with: the published arithmetic in several forms, and other global-context layers.

Each side of a comparison is a module; sides that compute the same as the layer hold copies of its weights.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from benchmarks.contexts import AllNodes, LearnedQueries, NonLocal
from benchmarks.published import Published, PublishedPacked, PublishedTokens
from benchmarks.shapes import Case, Shape
from latentgnn import FrozenBatchNorm, LatentGNN, PackedLatentGNN, published_state_dict, reference
from latentgnn.errors import require
from latentgnn.norms import NormFactory, group_norm
from latentgnn.paths import Memory, memory

NORMS: Mapping[str, NormFactory] = {
    "batch": nn.BatchNorm1d,
    "frozen": FrozenBatchNorm,
    "group": group_norm,
    "layer": nn.LayerNorm,
}


class Refused(Exception):
    """A side does not support an input, or the input is too large for it."""


@dataclass(frozen=True)
class Side:
    """One side of a comparison.

    Args:
        module: what is called, and whose parameters take gradients.
        exact: whether it computes what the layer computes.
    """

    module: nn.Module
    exact: bool


def make_layer(case: Case) -> LatentGNN:
    """The layer of a case in its mode; norms and gamma have values other than the initial ones, always the same."""
    torch.manual_seed(0)
    shape = case.input
    kind = LatentGNN if shape.kind == "map" else PackedLatentGNN
    layer = kind(
        shape.channels,
        num_latents=shape.latents,
        reduction=shape.reduction,
        graph_conv=shape.graph_conv,
        norm=NORMS[case.norm],
        gamma_init=0.5,
    )
    for module in layer.modules():
        if not isinstance(module, nn.BatchNorm1d | FrozenBatchNorm | nn.GroupNorm | nn.LayerNorm):
            continue
        with torch.no_grad():
            module.weight.uniform_(0.5, 1.5)
            module.bias.normal_(std=0.1)
            if isinstance(module, nn.BatchNorm1d | FrozenBatchNorm):
                cast(Tensor, module.running_mean).normal_(std=0.1)
                cast(Tensor, module.running_var).uniform_(0.5, 1.5)
    return layer.to(case.device, getattr(torch, case.dtype)).train(case.mode == "training")


def make_input(case: Case) -> Tensor:
    """The input of a case, in its layout."""
    x = torch.randn(case.input.size, device=case.device, dtype=getattr(torch, case.dtype))
    return x.contiguous(memory_format=_memory_format(case)) if case.layout == "channels-last" else x


def _memory_format(case: Case) -> torch.memory_format:
    return torch.channels_last if len(case.input.spatial) == 2 else torch.channels_last_3d


def make_offsets(shape: Shape) -> list[int]:
    """Where each scene of packed points begins, and their number at the end."""
    return [scene * shape.nodes for scene in range(shape.batch + 1)]


class _WithOffsets(nn.Module):
    """A packed layer that is always called with the same offsets."""

    def __init__(self, layer: PackedLatentGNN, offsets: list[int]) -> None:
        super().__init__()
        self.layer = layer
        self.offsets = torch.tensor(offsets)

    def forward(self, x: Tensor) -> Tensor:
        return cast(Tensor, self.layer(x, offsets=self.offsets))


class _Reference(nn.Module):
    """The library's own literal form."""

    def __init__(self, layer: LatentGNN) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return reference.forward(self.layer, x)


class _Core(nn.Module):
    """The layer, held to its core, which holds or recomputes."""

    def __init__(self, layer: nn.Module, choice: Memory) -> None:
        super().__init__()
        self.layer, self.choice = layer, choice

    def forward(self, x: Tensor) -> Tensor:
        with memory(self.choice):
            return cast(Tensor, self.layer(x))


def _layer(layer: LatentGNN, case: Case) -> nn.Module:
    if isinstance(layer, PackedLatentGNN) and case.input.kind == "packed":
        return _WithOffsets(layer, make_offsets(case.input))
    return layer


def _core(layer: LatentGNN, case: Case) -> nn.Module:
    return _Core(_layer(layer, case), "hold")


def _recomputing(layer: LatentGNN, case: Case) -> nn.Module:
    return _Core(_layer(layer, case), "recompute")


def _published(layer: LatentGNN, case: Case) -> nn.Module:
    shape = case.input
    module: Published
    state = published_state_dict(layer, spatial_dims=1)
    if shape.kind == "packed":
        module = PublishedPacked(shape.config, norm=case.norm, offsets=make_offsets(shape))
    elif shape.kind == "tokens":
        module = PublishedTokens(shape.config, norm=case.norm)
    else:
        module = Published(shape.config, norm=case.norm, spatial_dims=len(shape.spatial))
    own = module.state_dict()
    module.load_state_dict({name: value.reshape(own[name].shape) for name, value in state.items()})
    return module


def _only_maps(case: Case) -> Shape:
    if case.input.kind != "map":
        raise Refused("it takes (B, C, *spatial)")
    return case.input


def _reference(layer: LatentGNN, case: Case) -> nn.Module:
    _only_maps(case)
    return _Reference(layer)


def _non_local(layer: LatentGNN, case: Case) -> nn.Module:
    shape = _only_maps(case)
    affinity = 3 * shape.batch * shape.nodes**2 * 4
    if affinity > 8 << 30:
        raise Refused(f"its affinity and the softmax of it take {affinity / 2**30:,.0f} GiB")
    return NonLocal(shape.channels)


def _all_nodes(layer: LatentGNN, case: Case) -> nn.Module:
    shape = _only_maps(case)
    operations = 4 * shape.batch * shape.nodes**2 * shape.channels // shape.reduction
    if operations > 2e12:
        raise Refused(f"its products of all pairs take {operations / 1e12:,.0f} T operations")
    return AllNodes(shape.channels, shape.reduction)


def _lite_mla(layer: LatentGNN, case: Case) -> nn.Module:
    shape = _only_maps(case)
    require("timm", extra="detection")
    from timm.models.efficientvit_mit import LiteMLA

    if len(shape.spatial) != 2:
        raise Refused("it takes maps of two dimensions")
    if shape.reduction != 8:
        raise Refused("its heads of 8 channels are for a reduction of 8")
    return cast(nn.Module, LiteMLA(shape.channels, shape.channels, dim=8, heads_ratio=1 / 8))


def _learned_queries(layer: LatentGNN, case: Case) -> nn.Module:
    shape = _only_maps(case)
    return LearnedQueries(shape.channels, sum(shape.latents), shape.reduction)


def _compiled(make: Callable[[LatentGNN, Case], nn.Module]) -> Callable[[LatentGNN, Case], nn.Module]:
    return lambda layer, case: cast(nn.Module, torch.compile(make(layer, case)))


LAYER = "latentgnn"

# Each makes a side from the layer of a case; sides that compute the same copy or share its weights.
_EXACT: Mapping[str, Callable[[LatentGNN, Case], nn.Module]] = {
    LAYER: _layer,
    "compiled latentgnn": _compiled(_layer),
    "core": _core,
    "recomputing": _recomputing,
    "published": _published,
    "compiled published": _compiled(_published),
    "reference": _reference,
}
_OTHERS: Mapping[str, Callable[[LatentGNN, Case], nn.Module]] = {
    "attention": _all_nodes,
    "LiteMLA": _lite_mla,
    "latent queries": _learned_queries,
    "non-local": _non_local,
}
SIDES = (*_EXACT, *_OTHERS)


def make_side(name: str, layer: LatentGNN, case: Case) -> Side:
    """One side of a comparison, on the case's device, in its type, mode and layout.

    Args:
        name: one of `SIDES`.
        layer: of the case, from `make_layer`.
        case: what is compared.

    Raises:
        Refused: the side is not for this input.
    """
    exact = name in _EXACT
    module = (_EXACT if exact else _OTHERS)[name](layer, case)
    module.to(device=case.device, dtype=getattr(torch, case.dtype)).train(case.mode == "training")
    if case.layout == "channels-last":
        # As users do; the layer's own matrices have two dimensions and are not affected.
        module.to(memory_format=_memory_format(case))
    return Side(module, exact)
