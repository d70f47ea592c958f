"""Inputs without numbers or without nodes: the meta device, `FakeTensorMode`, empty batches; and nested tensors."""

import pytest
import torch
from sweep import make_layer, relative_error
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from latentgnn import LatentGNN, PackedLatentGNN
from latentgnn.norms import NORMS

INPUTS: dict[str, tuple[type[LatentGNN], tuple[int, ...], dict[str, list[int]]]] = {
    "map": (LatentGNN, (2, 32, 5, 6), {}),
    "masked_map": (LatentGNN, (2, 32, 5, 6), {"mask": [2, 5, 6]}),
    "tokens": (PackedLatentGNN, (2, 30, 32), {}),
    "packed": (PackedLatentGNN, (30, 32), {"offsets": [0, 12, 30]}),
}


def check(name: str, norm: str, training: bool, residual: bool, device: str | None) -> Tensor:
    kind, shape, named = INPUTS[name]
    layer = kind(32, num_latents=4, norm=norm, graph_conv=True, residual=residual, device=device).train(training)
    arguments = {
        key: torch.ones(value, dtype=torch.bool, device=device) if key == "mask" else torch.tensor(value, device=device)
        for key, value in named.items()
    }
    x = torch.empty(shape, device=device, requires_grad=True)
    output = layer(x, **arguments)
    assert (output.shape, output.dtype, output.stride()) == (x.shape, x.dtype, x.stride())
    output.sum().backward()
    assert x.grad is not None
    assert all(value.grad is not None and value.grad.shape == value.shape for value in layer.parameters())
    return output


@pytest.mark.parametrize("residual", [True, False])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("name", INPUTS)
def test_shapes_and_gradients_without_numbers(name: str, norm: str, training: bool, residual: bool) -> None:
    assert check(name, norm, training, residual, "meta").is_meta
    with FakeTensorMode():
        check(name, norm, training, residual, None)


def test_offsets_with_numbers_go_with_points_without() -> None:
    layer = PackedLatentGNN(32, num_latents=4, norm="group_norm", device="meta")
    assert layer(torch.empty(30, 32, device="meta"), torch.tensor([0, 12, 30])).shape == (30, 32)


def test_an_index_without_numbers_is_refused() -> None:
    layer = PackedLatentGNN(32, num_latents=4, device="meta")
    with pytest.raises(ValueError, match="give offsets"):
        layer(torch.empty(9, 32, device="meta"), batch=torch.zeros(9, dtype=torch.int64, device="meta"))


EMPTY: dict[str, tuple[type[LatentGNN], tuple[int, ...], dict[str, Tensor]]] = {
    "batch": (LatentGNN, (0, 32, 5, 6), {}),
    "masked_batch": (LatentGNN, (0, 32, 5), {"mask": torch.ones(0, 5, dtype=torch.bool)}),
    "map": (LatentGNN, (2, 32, 0, 6), {}),
    "tokens": (PackedLatentGNN, (0, 7, 32), {}),
    "points": (PackedLatentGNN, (0, 32), {"offsets": torch.tensor([0, 0, 0])}),
    "index": (PackedLatentGNN, (0, 32), {"batch": torch.zeros(0, dtype=torch.int64)}),
}


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("name", EMPTY)
def test_nothing_gives_nothing_and_zero_gradients(name: str, norm: str, training: bool) -> None:
    kind, shape, arguments = EMPTY[name]
    layer = kind(32, num_latents=4, norm=norm, graph_conv=True, gamma_init=0.5).train(training)
    before = {key: value.clone() for key, value in layer.named_buffers()}
    x = torch.empty(shape, requires_grad=True)
    output = layer(x, **arguments)
    assert output.shape == x.shape
    output.sum().backward()
    assert x.grad is not None
    assert x.grad.shape == x.shape
    assert all(value.grad is not None and not value.grad.any() for value in layer.parameters())
    assert all(torch.equal(value, before[key]) for key, value in layer.named_buffers())


@pytest.mark.parametrize("norm", ["frozen", "batch", "layer", "group"])
def test_nested_tensors_are_packed_points(norm: str) -> None:
    whole = make_layer("graph_conv", norm)
    layer = PackedLatentGNN.from_config(whole.config, dtype=torch.float64).eval()
    layer.load_state_dict(whole.state_dict())
    parts = [torch.randn(size, 32, dtype=torch.float64) for size in (7, 3, 12)]
    x = torch.nested.nested_tensor(parts, layout=torch.jagged).requires_grad_()
    output = layer(x)
    assert output.is_nested
    leaves = [part.clone().requires_grad_() for part in parts]
    for found, leaf in zip(output.unbind(), leaves, strict=True):
        expected = whole(leaf.mT[None])[0].mT
        assert relative_error(found, expected) < 1e-11
        expected.sin().sum().backward()
    output.values().sin().sum().backward()
    assert relative_error(x.grad.values(), torch.cat([leaf.grad for leaf in leaves])) < 1e-9


@pytest.mark.parametrize("argument", ["offsets", "batch", "mask"])
def test_nested_tensors_have_their_own_offsets(argument: str) -> None:
    x = torch.nested.nested_tensor([torch.randn(3, 32)], layout=torch.jagged)
    with pytest.raises(ValueError, match="has its own offsets"):
        PackedLatentGNN(32, num_latents=4)(x, **{argument: torch.tensor([0, 3])})


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors is in prototype:UserWarning")
def test_nested_tensors_of_another_layout_are_refused() -> None:
    with pytest.raises(ValueError, match=r"torch\.jagged"):
        PackedLatentGNN(32, num_latents=4)(torch.nested.nested_tensor([torch.randn(3, 32)], layout=torch.strided))


def test_gamma_without_a_dimension_loads() -> None:
    """In a network, as earlier versions saved it; published layers have (1,)."""
    network = nn.Sequential(LatentGNN(16, num_latents=3, gamma_init=0.25))
    state = network.state_dict()
    assert state["0.gamma"].shape == (1,)
    fresh = nn.Sequential(LatentGNN(16, num_latents=3))
    fresh.load_state_dict({**state, "0.gamma": torch.tensor(0.25)})
    assert fresh[0].gamma.tolist() == [0.25]
    with pytest.raises(RuntimeError, match=r"size mismatch for 0\.gamma"):
        fresh.load_state_dict({**state, "0.gamma": torch.zeros(2)})
