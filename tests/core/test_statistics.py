"""Norms with statistics of their own in the core: against the published arithmetic, whatever the configuration."""

from math import prod
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sweep import relative_error
from test_passes import all_gradients, laid_out
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.measure import held_bytes
from latentgnn import LatentGNN, PackedLatentGNN, reference
from latentgnn.core import batch_norm, expand, inputs, layouts
from latentgnn.core.nodes import Block
from latentgnn.core.statistics import GroupNorm
from latentgnn.norms import group_norm
from latentgnn.paths import memory, why_not_core

NORMS = {
    "batch": nn.BatchNorm1d,
    "batch_without_weights": lambda channels: nn.BatchNorm1d(channels, affine=False),
    "group": group_norm,
    "two_groups": lambda channels: nn.GroupNorm(2, channels),
    "group_without_weights": lambda channels: nn.GroupNorm(2, channels, affine=False),
    "layer": nn.LayerNorm,
    "layer_without_bias": lambda channels: nn.LayerNorm(channels, bias=False),
    "rms": nn.RMSNorm,
    "rms_without_weights": lambda channels: nn.RMSNorm(channels, elementwise_affine=False),
}

LAYERS = st.fixed_dictionaries(
    {
        "num_latents": st.sampled_from([2, 4, 6]),
        "symmetric": st.booleans(),
        "graph_conv": st.booleans(),
        "residual": st.booleans(),
        "node_scale": st.sampled_from(["published", "mean"]),
    }
)


def random_layer(arguments: dict[str, Any], norm: str, seed: int, kind: type[LatentGNN] = LatentGNN) -> LatentGNN:
    torch.manual_seed(seed)
    layer = kind(16, reduction=2, norm=NORMS[norm], gamma_init=0.7, dtype=torch.float64, **arguments)
    for module in layer.modules():
        for name, low in (("weight", 0.5), ("bias", -0.5)):
            value = getattr(module, name, None)
            if isinstance(value, Tensor) and value.dim() == 1:
                value.data.uniform_(low, low + 1)
    return layer


def takes_the_core(layer: LatentGNN, x: Tensor) -> bool:
    return why_not_core(layer.arrangement(), x, None, x.dtype) is None


@settings(max_examples=150, deadline=None, derandomize=True)
@given(
    arguments=LAYERS,
    groups=st.sampled_from([1, 2]),
    norm=st.sampled_from(sorted(NORMS)),
    batch=st.integers(1, 4),
    # Norms over two or three numbers amplify every rounding.
    spatial=st.lists(st.integers(3, 7), min_size=1, max_size=2).filter(lambda spatial: prod(spatial) > 5),
    layout=st.sampled_from(["contiguous", "channels_last", "every_other", "part_of_more_channels"]),
    nodes=st.sampled_from([1, 3, 8, 50, 10000]),
    numbers=st.sampled_from([1, 40, 1 << 19]),
    moments=st.booleans(),
    seed=st.integers(0, 1000),
    kept=st.sampled_from(["hold", "recompute"]),
)
def test_agrees_with_the_reference(
    arguments: dict[str, Any],
    groups: int,
    norm: str,
    batch: int,
    spatial: list[int],
    layout: str,
    nodes: int,
    numbers: int,
    moments: bool,
    seed: int,
    kept: Any,
) -> None:
    layer = random_layer({**arguments, "num_groups": groups}, norm, seed)
    x = laid_out(torch.randn(batch, 16, *spatial, dtype=torch.float64), layout).detach().requires_grad_()
    assert takes_the_core(layer, x.flatten(2).mT)
    expected = reference.forward(layer, x)
    wanted = all_gradients(expected, x, layer)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(inputs, "nodes_per_block", lambda *_: nodes)
        patch.setattr(expand, "moments_pay", lambda *_: moments)
        patch.setattr(expand, "NUMBERS_AT_ONCE", numbers)
        patch.setattr(expand, "_LEAST_CHANNELS", 1)
        patch.setattr(batch_norm, "_MANY_NUMBERS", numbers)
        patch.setattr(layouts, "_NODES_AT_ONCE", nodes)
        with memory(kept):
            output = layer(x)
        found = all_gradients(output, x, layer)
    assert relative_error(output, expected) < 1e-10
    for ours, theirs in zip(found, wanted, strict=True):
        assert relative_error(ours, theirs) < 1e-7


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    arguments=LAYERS,
    norm=st.sampled_from(["group", "two_groups", "layer", "rms"]),
    sizes=st.lists(st.sampled_from([0, 2, 3, 9]), min_size=1, max_size=4).filter(lambda sizes: sum(sizes) > 0),
    nodes=st.sampled_from([1, 3, 8, 10000]),
    seed=st.integers(0, 1000),
    kept=st.sampled_from(["hold", "recompute"]),
)
def test_packed_points_are_as_if_each_scene_were_alone(
    arguments: dict[str, Any], norm: str, sizes: list[int], nodes: int, seed: int, kept: Any
) -> None:
    layer = random_layer(arguments, norm, seed, PackedLatentGNN)
    x = torch.randn(sum(sizes), 16, dtype=torch.float64, requires_grad=True)
    offsets = torch.tensor([0, *sizes]).cumsum(0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(inputs, "nodes_per_block", lambda *_: nodes)
        with memory(kept):
            output = layer(x, offsets)
        found = all_gradients(output, x, layer)
    scenes = [reference.forward(layer, part[None])[0] for part in x.split(sizes) if len(part)]
    for ours, theirs in zip(found, all_gradients(torch.cat(scenes), x, layer), strict=True):
        assert relative_error(ours, theirs) < 1e-8
    assert relative_error(output, torch.cat(scenes)) < 1e-10


@pytest.mark.parametrize("norm", ["layer", "rms"])
def test_a_mask_leaves_nodes_out(norm: str) -> None:
    layer = random_layer({"num_latents": 4, "graph_conv": True}, norm, 0)
    x = torch.randn(2, 16, 9, dtype=torch.float64)
    mask = torch.arange(9) < torch.tensor([[5], [9]])
    x[~mask[:, None].expand_as(x)] = torch.nan
    output = layer(x, mask)
    assert relative_error(output[:1, :, :5], reference.forward(layer, x[:1, :, :5])) < 1e-12
    assert relative_error(output[1:], reference.forward(layer, x[1:])) < 1e-12
    assert output[0, :, 5:].isnan().all()


@pytest.mark.parametrize("norm", ["group", "layer", "rms"])
def test_nothing_is_held_but_the_input(norm: str) -> None:
    layer = LatentGNN(256, num_latents=50, graph_conv=True, norm=NORMS[norm], gamma_init=0.5)
    x = torch.randn(2, 256, 50, 80, requires_grad=True)
    assert takes_the_core(layer, x.flatten(2).mT)
    with memory("recompute"):
        assert held_bytes(layer, x, layer) <= 1.05 * x.numel() * x.element_size()


@pytest.mark.parametrize("norm", ["batch", "group", "layer"])
def test_a_weight_changed_between_the_passes_raises(norm: str) -> None:
    layer = random_layer({"num_latents": 4}, norm, 0)
    output = layer(torch.randn(2, 16, 9, dtype=torch.float64, requires_grad=True))
    with torch.no_grad():
        layer.expand.norm.weight.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        output.sum().backward()


class _GroupNorms(TorchDispatchMode):
    """Which tensors over nodes PyTorch's group norm gets."""

    def __init__(self) -> None:
        super().__init__()
        self.given: list[Tensor] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if "group_norm" in func.__name__:
            self.given += [value for value in args if isinstance(value, Tensor) and value.dim() > 2]
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("innermost", [False, True])
def test_on_a_gpu_group_norm_gets_what_it_can_read(innermost: bool) -> None:
    everything = slice(None)
    block = Block(everything, everything, everything, bounds=(0, 3, 7))
    norm = GroupNorm(1e-5, 2)
    with FakeTensorMode(), _GroupNorms() as seen:
        raw, weight, bias = (torch.empty(shape, device="cuda") for shape in [(1, 7, 4), (4,), (4,)])
        raw = torch.empty(1, 4, 7, device="cuda").mT if innermost else raw
        y, statistics = norm.normalize(raw, weight, bias, block)
        grad, *_ = norm.backward(torch.empty_like(raw), raw, weight, statistics, block)
    assert len(seen.given) == 6
    assert all(given.is_contiguous() for given in seen.given)
    assert y.stride() == grad.stride() == raw.stride()
