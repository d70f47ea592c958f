"""Products over nodes by every routine, in every layout, against products in float64."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sweep import relative_error
from test_passes import all_gradients
from torch import Tensor, nn

from latentgnn import FrozenBatchNorm, LatentGNN, reference
from latentgnn.core import accumulate, expand, layouts, products, routines
from latentgnn.paths import memory

SIZES = st.integers(1, 9)
LAYOUTS = st.sampled_from(["nodes innermost", "side by side", "channels innermost", "every other channel"])


def made(samples: int, nodes: int, channels: int, layout: str) -> Tensor:
    """(s, T, C) of float32 in a layout."""
    if layout == "nodes innermost":
        return torch.randn(samples, channels, nodes).mT
    if layout == "side by side":
        return torch.randn(channels, samples, nodes).permute(1, 2, 0)
    if layout == "channels innermost":
        return torch.randn(samples, nodes, channels)
    return torch.randn(samples, 2 * channels, nodes)[:, ::2].mT


@pytest.fixture(params=["oneDNN", "MKL", "few features"], autouse=True)
def routine(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every product by one routine, whatever its size."""
    monkeypatch.setattr(routines, "_MANY_OPERATIONS", 1 if request.param != "MKL" else 1 << 62)
    monkeypatch.setattr(accumulate, "_FEW_FEATURES", 64 if request.param == "few features" else 0)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(
    samples=st.integers(1, 3),
    nodes=SIZES,
    features=SIZES,
    channels=st.integers(1, 40),
    lying=st.tuples(LAYOUTS, LAYOUTS),
    scale=st.booleans(),
    shift=st.booleans(),
    turned=st.booleans(),
    base=st.sampled_from(["none", "given", "out"]),
    at_once=st.sampled_from([1, 1 << 19]),
)
def test_add_projection(
    samples: int,
    nodes: int,
    features: int,
    channels: int,
    lying: tuple[str, str],
    scale: bool,
    shift: bool,
    turned: bool,
    base: str,
    at_once: int,
) -> None:
    torch.manual_seed(0)
    x, out = made(samples, nodes, features, lying[0]), made(samples, nodes, channels, lying[1])
    matrix = torch.randn(features, channels).mT if turned else torch.randn(channels, features)
    scale_C, shift_C = torch.rand(channels) if scale else None, torch.rand(channels) if shift else None
    given_base = None if base == "none" else out if base == "out" else made(samples, nodes, channels, lying[1])
    expected = x.double() @ matrix.double().mT
    expected = expected if scale_C is None else expected * scale_C
    expected = expected if shift_C is None else expected + shift_C
    expected = expected if given_base is None else expected + given_base
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(accumulate, "NUMBERS_AT_ONCE", at_once)
        alone = base == "given"
        written = accumulate.add_projection(given_base, x, matrix, scale_C, shift_C, None if alone else out)
    assert alone or written is out
    assert relative_error(written, expected) < 1e-5


@settings(max_examples=100, deadline=None, derandomize=True)
@given(
    samples=st.integers(1, 3),
    nodes=SIZES,
    channels=st.integers(1, 40),
    rows=SIZES,
    lying=st.tuples(LAYOUTS, LAYOUTS),
    together=st.sampled_from([1, 10, 1000]),
)
def test_project_and_contract(
    samples: int, nodes: int, channels: int, rows: int, lying: tuple[str, str], together: int
) -> None:
    torch.manual_seed(0)
    x, other = made(samples, nodes, channels, lying[0]), made(samples, nodes, rows, lying[1])
    matrices = [torch.randn(rows, channels), torch.randn(rows, channels)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(layouts, "_NODES_AT_ONCE", together)
        projected = products.project_all(layouts.side_by_side(x, torch.empty(samples, channels, nodes).mT), matrices)
        back = products.project_back(other, matrices[0])
        outer = products.contract_all(other, x)
    assert relative_error(projected, x.double() @ torch.cat(matrices).double().mT) < 1e-5
    assert relative_error(back, other.double() @ matrices[0].double()) < 1e-5
    assert relative_error(outer, (other.double().mT @ x.double()).sum(0)) < 1e-5


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    norm=st.sampled_from([nn.BatchNorm1d, FrozenBatchNorm, nn.LayerNorm, nn.Identity]),
    batch=st.integers(1, 3),
    side=st.integers(2, 6),
    graph_conv=st.booleans(),
    training=st.booleans(),
    channels_last=st.booleans(),
    kept=st.sampled_from(["hold", "recompute"]),
    seed=st.integers(0, 1000),
)
def test_a_layer_of_float32(
    norm: Any, batch: int, side: int, graph_conv: bool, training: bool, channels_last: bool, kept: Any, seed: int
) -> None:
    torch.manual_seed(seed)
    layer = LatentGNN(32, num_latents=6, reduction=4, norm=norm, graph_conv=graph_conv, gamma_init=0.7)
    layer.train(training)
    x = torch.randn(batch, 32, side, side + 1)
    layout = torch.channels_last if channels_last else torch.contiguous_format
    x = x.contiguous(memory_format=layout)
    twin = LatentGNN.from_config(layer.config, dtype=torch.float64).train(training)
    twin.load_state_dict(layer.state_dict())
    x64 = x.double().requires_grad_()
    expected = reference.forward(twin, x64)
    wanted = all_gradients(expected, x64, twin)
    with pytest.MonkeyPatch.context() as patch, memory(kept):
        patch.setattr(expand, "_LEAST_CHANNELS", 8)
        output = layer(x.requires_grad_())
    assert output.is_contiguous(memory_format=layout)
    assert relative_error(output, expected) < 1e-4
    for ours, theirs in zip(all_gradients(output, x, layer), wanted, strict=True):
        # Some are 0 in exact arithmetic.
        torch.testing.assert_close(ours, theirs.float(), rtol=2e-3, atol=1e-3)
