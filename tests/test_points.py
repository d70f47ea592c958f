"""Packed points and tokens: each scene as if it were alone."""

from collections.abc import Sequence

import pytest
import torch
from sweep import CONFIGS, NORMS, make_layer, relative_error
from torch import Tensor, nn

from latentgnn import FrozenBatchNorm, LatentGNN, PackedLatentGNN, reference
from latentgnn.core import inputs
from latentgnn.paths import memory
from latentgnn.ranks import Ranks

SIZES = [7, 1, 40, 3]


def packed(layer: LatentGNN) -> PackedLatentGNN:
    twin = PackedLatentGNN.from_config(layer.config, dtype=torch.float64).train(layer.training)
    twin.load_state_dict(layer.state_dict())
    return twin


def offsets_of(sizes: Sequence[int]) -> Tensor:
    return torch.tensor([0, *sizes]).cumsum(0)


def alone(layer: LatentGNN, x: Tensor, sizes: Sequence[int]) -> Tensor:
    return torch.cat([layer(part.mT[None])[0].mT for part in x.split(list(sizes)) if len(part)])


def gradients(output: Tensor, x: Tensor, layer: nn.Module) -> list[Tensor]:
    wanted = [x, *(parameter for parameter in layer.parameters())]
    weight = torch.linspace(-1, 1, output.numel(), dtype=output.dtype).view_as(output)
    return list(torch.autograd.grad((output * weight).sum(), wanted, materialize_grads=True))


@pytest.mark.parametrize("nodes_per_block", [None, 2])
@pytest.mark.parametrize("norm", ["frozen", "none", "layer", "group"])
@pytest.mark.parametrize("config", CONFIGS)
def test_each_scene_is_as_if_alone(
    config: str, norm: str, nodes_per_block: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    if nodes_per_block is not None:
        monkeypatch.setattr(inputs, "nodes_per_block", lambda *_: nodes_per_block)
    layer = make_layer(config, norm, training=True)
    twin = packed(layer)
    x = torch.randn(sum(SIZES), layer.config.channels, dtype=torch.float64, requires_grad=True)
    expected, found = alone(layer, x, SIZES), twin(x, offsets_of(SIZES))
    assert relative_error(found, expected) < 1e-11
    for ours, theirs in zip(gradients(found, x, twin), gradients(expected, x, layer), strict=True):
        assert relative_error(ours, theirs) < 1e-9


@pytest.mark.parametrize("config", CONFIGS)
def test_training_batch_norm_sees_the_points_of_all_scenes(config: str) -> None:
    """As a masked dense batch of the same scenes does."""
    layer = make_layer(config, "batch", training=True)
    twin = packed(layer)
    x = torch.randn(sum(SIZES), layer.config.channels, dtype=torch.float64, requires_grad=True)
    dense = nn.utils.rnn.pad_sequence(list(x.split(SIZES)), batch_first=True)
    mask = torch.arange(max(SIZES)) < torch.tensor(SIZES)[:, None]
    expected, found = layer(dense.mT, mask=mask).mT[mask], twin(x, offsets_of(SIZES))
    assert relative_error(found, expected) < 1e-10
    for ours, theirs in zip(gradients(found, x, twin), gradients(expected, x, layer), strict=True):
        assert relative_error(ours, theirs) < 1e-8
    for ours, theirs in zip(twin.buffers(), layer.buffers(), strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("norm", ["frozen", "batch", "layer"])
def test_forms_of_naming_the_scenes_agree(norm: str) -> None:
    layer = packed(make_layer("graph_conv", norm, training=False))
    x = torch.randn(sum(SIZES), layer.config.channels, dtype=torch.float64)
    expected = layer(x, offsets_of(SIZES))
    index = torch.arange(len(SIZES)).repeat_interleave(torch.tensor(SIZES))
    torch.testing.assert_close(layer(x, offsets_of(SIZES)[1:]), expected)
    torch.testing.assert_close(layer(x, offsets_of(SIZES).int()), expected)
    torch.testing.assert_close(layer(x, batch=index), expected)
    torch.testing.assert_close(layer(x, batch=10 * index), expected)
    order = torch.randperm(len(x))
    torch.testing.assert_close(layer(x[order], batch=index[order]), expected[order])
    torch.testing.assert_close(layer(x[None, :7])[0], expected[:7])
    with_empty = torch.tensor([0, 0, 7, 8, 8, 48, 51, 51])
    torch.testing.assert_close(layer(x, with_empty), expected)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("norm", ["batch", "frozen", "group", "layer", "none"])
@pytest.mark.parametrize("offsets", [[0, 0, 4, 9], [0, 4, 4, 4, 9], [0, 4, 9, 9]])
def test_empty_scenes_are_as_if_not_there(offsets: list[int], norm: str, training: bool) -> None:
    layer, twin = (packed(make_layer("groups_graph_conv", norm, training=training)) for _ in range(2))
    x = torch.randn(9, 32, dtype=torch.float64, requires_grad=True)
    found, expected = layer(x, torch.tensor(offsets)), twin(x, torch.tensor([0, 4, 9]))
    assert relative_error(found, expected) < 1e-11
    for ours, theirs in zip(gradients(found, x, layer), gradients(expected, x, twin), strict=True):
        assert relative_error(ours, theirs) < 1e-9


def test_an_empty_scene_gives_finite_gradients() -> None:
    for norm in (FrozenBatchNorm, nn.BatchNorm1d, nn.LayerNorm):
        layer = PackedLatentGNN(16, num_latents=4, norm=norm, graph_conv=True, gamma_init=1.0)
        x = torch.randn(9, 16, requires_grad=True)
        layer(x, torch.tensor([0, 4, 4, 9])).square().sum().backward()
        assert x.grad.isfinite().all()
        assert all(parameter.grad.isfinite().all() for parameter in layer.parameters())


@pytest.mark.parametrize("norm", [name for name in NORMS if "instance" not in name])
@pytest.mark.parametrize("masked", [False, True])
def test_tokens_are_maps_with_channels_last(norm: str, masked: bool) -> None:
    layer = make_layer("two_kernels", norm, training=False)
    tokens = torch.randn(3, 20, layer.config.channels, dtype=torch.float64)
    mask = torch.rand(3, 20) > 0.3 if masked else None
    found = packed(layer)(tokens, mask=mask)
    torch.testing.assert_close(found, layer(tokens.mT, mask=mask).mT)
    assert found.stride() == tokens.stride()


def test_the_state_dict_is_that_of_the_layer_for_maps() -> None:
    layer = LatentGNN(16, num_latents=(2, 3), graph_conv=True)
    assert PackedLatentGNN.from_config(layer.config).load_state_dict(layer.state_dict())


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"x": torch.randn(2, 16, 5)}, ValueError, r"\(B, N, 16\), with channels last; got \(2, 16, 5\)"),
        ({"x": torch.randn(10, 8)}, ValueError, r"\(T, 16\) or tokens"),
        ({}, ValueError, r"\(10, 16\) need either offsets or batch.*got neither.*x\[None\]"),
        ({"x": torch.ones(4, 16, dtype=torch.int64)}, TypeError, "floating-point"),
        ({"offsets": torch.tensor([0, 4, 3, 10])}, ValueError, r"rise from 0 .* 10; got \[0, 4, 3, 10\]"),
        ({"offsets": torch.tensor([0, 4, 9])}, ValueError, r"rise from 0 .* 10"),
        ({"offsets": torch.tensor([0.0, 10.0])}, TypeError, "int32 or int64, got torch.float32; use .long"),
        ({"offsets": torch.zeros(0, dtype=torch.int64)}, ValueError, "at least one entry"),
        ({"offsets": torch.tensor([0, 10]), "batch": torch.zeros(10).long()}, ValueError, "got both"),
        ({"batch": torch.zeros(9).long()}, ValueError, "each of the 10 points, got 9"),
        ({"batch": torch.full((10,), -1)}, ValueError, "negative, got -1"),
        ({"mask": torch.ones(10, dtype=torch.bool)}, ValueError, "a mask is for tokens"),
        ({"x": torch.randn(1, 10, 16), "offsets": torch.tensor([0, 10])}, ValueError, "take a mask"),
        ({"x": torch.randn(1, 10, 16), "mask": torch.ones(10).bool()}, ValueError, r"\(B, N\) = \(1, 10\)"),
        ({"x": torch.randn(1, 10, 16), "num_scenes": 1}, ValueError, "num_scenes are for packed points"),
        (
            {"x": torch.nested.nested_tensor([torch.ones(3, 16)], layout=torch.jagged), "num_scenes": 1},
            ValueError,
            "has its own offsets; offsets, batch, num_scenes",
        ),
    ],
)
def test_bad_input_is_told(arguments: dict[str, Tensor], error: type[Exception], message: str) -> None:
    layer = PackedLatentGNN(16, num_latents=4)
    with pytest.raises(error, match=message):
        layer(**{"x": torch.randn(10, 16), **arguments})


@pytest.mark.parametrize("offsets", [[0, 0, 600], [0, 300, 300, 600], [0, 600, 600]])
def test_empty_scenes_beside_few_points_of_large_matrices(offsets: list[int]) -> None:
    """The output's scale is applied to the output then, in blocks of a scene."""
    torch.manual_seed(0)
    layer = PackedLatentGNN(512, num_latents=(50,) * 8, reduction=1, norm=FrozenBatchNorm, gamma_init=0.5)
    for norm in layer.norms:
        norm.weight.uniform_(0.5, 1.5)
    results = []
    for bounds in (offsets, sorted(set(offsets))):
        x = torch.linspace(-1, 1, 600 * 512).sin().view(600, 512).requires_grad_()
        with memory("hold"):
            out = layer(x, torch.tensor(bounds))
        out.square().sum().backward()
        results.append((out.detach(), x.grad))
    torch.testing.assert_close(*results)


def test_shared_nodes_need_a_leading_zero() -> None:
    """Without it, a process that has no points of the first scene could not be told from one scene less."""
    layer = PackedLatentGNN(16, num_latents=4, norm=FrozenBatchNorm)
    layer._ranks = Ranks("none", 1, agreed=True)
    with pytest.raises(ValueError, match=r"offsets must have a 0 in front.*got \[3, 10\]"):
        layer(torch.randn(10, 16), torch.tensor([3, 10]))


@pytest.mark.parametrize("latents", [3, (4, 8)])
def test_a_scene_of_one_point_with_group_norm(latents: int | tuple[int, ...]) -> None:
    layer = PackedLatentGNN(32, num_latents=latents, norm="group_norm", gamma_init=0.5, dtype=torch.float64)
    x = torch.randn(32, 5, dtype=torch.float64).mT
    alone = torch.cat([layer(x[:4], torch.tensor([4])), layer(x[4:], torch.tensor([1]))])
    assert relative_error(layer(x, torch.tensor([0, 4, 5])), alone) < 1e-12


def test_the_reference_takes_tokens() -> None:
    layer = PackedLatentGNN(16, num_latents=4, norm=FrozenBatchNorm, gamma_init=0.5, dtype=torch.float64)
    x = torch.randn(2, 16, 16, dtype=torch.float64)
    assert relative_error(reference.forward(layer, x), layer(x)) < 1e-12
    assert relative_error(reference.dense_forward(layer, x), layer(x)) < 1e-12
    with pytest.raises(ValueError, match=r"takes tokens \(B, N, C\), got \(16, 16\)"):
        reference.forward(layer, x[0])


@pytest.mark.parametrize("count", [0, -1, "a", True])
def test_a_number_of_scenes_that_is_none_is_told(count: object) -> None:
    with pytest.raises(ValueError, match="num_scenes must be a positive int, got"):
        PackedLatentGNN(16, num_latents=4)(torch.randn(4, 16), batch=torch.zeros(4).long(), num_scenes=count)
