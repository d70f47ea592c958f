import copy
import re
from collections import Counter
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from latentgnn import FrozenBatchNorm, LatentGNN, LatentGNNConfig, PackedLatentGNN, by_size, reference
from latentgnn.norms import NormFactory, NormKind, group_norm, no_norm
from latentgnn.paths import memory, why_not_core
from latentgnn.plain import few_calls

pytestmark = pytest.mark.small_inputs


def _layer(norm: NormFactory, **options: object) -> LatentGNN:
    torch.manual_seed(0)
    options = {"num_latents": (5, 3), "reduction": 2, "gamma_init": 0.5, **options}
    layer = LatentGNN(16, norm=norm, **options).double()  # type: ignore[arg-type]
    for value in layer.buffers():
        if value.is_floating_point():
            nn.init.uniform_(value, 0.5, 1.5)
    return layer


def _why_not(layer: LatentGNN, x: torch.Tensor, mask: torch.Tensor | None = None) -> str | None:
    return why_not_core(layer.arrangement(), x, mask, x.dtype)


def test_an_input_takes_the_plain_path_only_where_it_is_small() -> None:
    layer = LatentGNN(256, num_latents=64, norm=FrozenBatchNorm)
    small, large = torch.randn(1, 16 * 16, 256), torch.randn(1, 32 * 32, 256)
    assert by_size.is_small(layer.config, 16 * 16)
    assert "so small" in (_why_not(layer, small) or "")
    assert _why_not(layer, large) is None
    assert _why_not(layer, small, torch.ones(1, 16 * 16, dtype=torch.bool)) is None
    with memory("hold"):
        assert _why_not(layer, small) is None


@pytest.mark.parametrize("place", ["gather_reduce", "scatter_reduce", "kernels.0.gather_assign", "expand"])
@pytest.mark.parametrize("norm", [nn.BatchNorm1d, FrozenBatchNorm, nn.LayerNorm])
def test_one_norm_may_be_taken_away(norm: NormFactory, place: str) -> None:
    layer = _layer(norm).eval()
    layer.get_submodule(place).norm = nn.Identity()
    for size in (4, 40):
        x = torch.randn(2, 16, size, size, dtype=torch.float64)
        torch.testing.assert_close(layer(x), reference.forward(layer, x))


@pytest.mark.parametrize("place", ["gather_reduce", "scatter_reduce", "kernels.1.scatter_assign", "expand"])
def test_norms_that_are_not_alike_keep_their_own_arithmetic(place: str) -> None:
    layer = _layer(nn.BatchNorm1d).eval()
    norm = layer.get_submodule(place).norm
    x = torch.randn(2, 16, 4, 5, dtype=torch.float64)
    norm.eps = 0.5
    torch.testing.assert_close(layer(x), reference.forward(layer, x))
    other = nn.BatchNorm1d(norm.num_features, eps=0.1, affine=False).double().eval()
    nn.init.uniform_(other.running_var, 0.5, 1.5)
    layer.get_submodule(place).norm = other
    torch.testing.assert_close(layer(x), reference.forward(layer, x))


@pytest.mark.parametrize("latents", [1, (1, 5)])
@pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels last"])
def test_a_kernel_of_a_single_latent_keeps_the_order_of_strides(latents: int | tuple[int, ...], last: bool) -> None:
    layer = _layer(FrozenBatchNorm, num_latents=latents, residual=False)
    x = torch.randn(1, 16, 3, 4, dtype=torch.float64)
    x = x.to(memory_format=torch.channels_last) if last else x
    out = layer(x)
    assert out.is_contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)
    torch.testing.assert_close(out, reference.forward(layer, x))


def test_what_is_not_held_takes_no_path_that_holds() -> None:
    layer = LatentGNN(64, num_latents=256, reduction=1, norm=FrozenBatchNorm)
    x = torch.randn(64, 64, 16, 16, requires_grad=True)
    assert not by_size.holds(layer.config, 64 * 256, 4)
    held: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: held.append(t) or t, lambda t: t):
        layer(x)
    size = sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in held}.values())
    assert size < 3 * x.numel() * x.element_size()


def test_a_small_input_under_autocast_need_not_have_the_type_of_the_weights() -> None:
    layer = _layer(FrozenBatchNorm).float()
    x = torch.randn(2, 16, 3, 4, dtype=torch.float64)
    with torch.autocast("cpu"):
        out = layer(x)
    torch.testing.assert_close(out, reference.forward(layer.double(), x), rtol=0.02, atol=0.02)


def test_small_inputs_of_affine_norms_go_through_few_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, taken = _layer(FrozenBatchNorm), []
    run = few_calls.latent_gnn
    monkeypatch.setattr(few_calls, "latent_gnn", lambda *given: taken.append(given) or run(*given))
    layer(torch.randn(2, 16, 3, 4, dtype=torch.float64))
    assert len(taken) == 1


@pytest.mark.small_inputs
def test_operator_calls_of_a_small_input_are_those_of_the_page() -> None:
    layer, x = LatentGNN(256, num_latents=64, norm=FrozenBatchNorm), torch.randn(1, 256, 16, 16)
    with torch.no_grad(), profile(activities=[ProfilerActivity.CPU]) as profiled:
        layer(x)
    outer = [event.name.removeprefix("aten::") for event in profiled.events() if event.cpu_parent is None]
    page = (Path(__file__).parents[1] / "docs" / "results.md").read_text()
    table = page.split("| what for | PyTorch's operators |")[1].split("\n\n")[0]
    named = Counter[str]()
    for count, name in re.findall(r"(\d+ )?`(\w+)`", table):
        named[name] += int(count or 1)
    views = {"flatten", "mT", "chunk", "unsqueeze", "split_with_sizes", "expand", "unflatten", "permute", "unbind"}
    views |= {"_unsafe_view", "numpy_T", "split", "transpose"}
    assert Counter(name for name in outer if name not in views) == named
    assert f"these are its {named.total()} calls that compute" in page


def test_second_derivatives_of_a_small_input() -> None:
    layer = _layer(FrozenBatchNorm, num_latents=3)
    x = torch.randn(1, 16, 3, 3, dtype=torch.float64, requires_grad=True)
    assert few_calls.fits(layer.arrangement(), x.flatten(2).mT, None, x.dtype)
    assert torch.autograd.gradgradcheck(layer, x)


@pytest.mark.parametrize(("channels", "size"), [(64, 8), (64, 40), (512, 14), (640, 3)])
@pytest.mark.parametrize("samples", [1, 3])
def test_every_size_of_product_gives_what_the_reference_gives(channels: int, size: int, samples: int) -> None:
    torch.manual_seed(0)
    layer = LatentGNN(channels, num_latents=16, reduction=4, norm=FrozenBatchNorm, gamma_init=0.5).double()
    x = torch.randn(samples, channels, size, size, dtype=torch.float64)
    torch.testing.assert_close(layer(x), reference.forward(layer, x))


def test_a_map_of_few_nodes_takes_the_plain_path_where_columns_pay(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = LatentGNN(512, num_latents=100, norm=FrozenBatchNorm)
    few = torch.randn(1, 512, 14 * 14).mT
    assert "few enough nodes" in (_why_not(layer, few) or "")
    assert _why_not(layer, few.contiguous()) is None
    assert _why_not(layer, torch.randn(1, 512, 28 * 28).mT) is None
    grouped, batch = LatentGNN(1024, num_latents=100, norm=group_norm), torch.randn(8, 1024, 14 * 14).mT
    assert _why_not(grouped, batch) is None
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    assert "few enough nodes" in (_why_not(grouped, batch) or "")


@pytest.mark.parametrize(
    ("norm", "samples", "channels", "nodes", "pays"),
    [
        ("affine", 8, 2048, 7 * 7, True),
        ("affine", 1, 2048, 7 * 7, False),  # fewer nodes than channels inside
        ("affine", 8, 1024, 14 * 14, False),
        ("affine", 100, 32, 16 * 16, False),  # more numbers inside than outside
        ("affine", 8, 128, 32 * 32, True),  # a batch of few channels
        ("affine", 2, 128, 32 * 32, False),
        ("affine", 1, 1024, 400, True),
        ("affine", 1, 2048, 400, True),
        ("affine", 1, 4096, 400, False),  # too large
        ("batch", 8, 384, 14 * 14, True),
        ("batch", 8, 2048, 7 * 7, False),
        ("layer", 8, 384, 14 * 14, True),
        ("layer", 1, 384, 30 * 30, False),
        ("group", 8, 64, 32 * 32, True),
        ("group", 1, 64, 32 * 32, False),
        ("group", 2, 512, 100 * 168, False),
    ],
)
def test_how_few_nodes_follows_from_the_kind_of_norm(
    norm: NormKind, samples: int, channels: int, nodes: int, pays: bool
) -> None:
    config = LatentGNNConfig(channels=channels, num_latents=32)
    assert by_size.channels_first_pays(config, samples, nodes, recorded=True, norm=norm) is pays


def test_one_thread_has_less_to_gain() -> None:
    config = LatentGNNConfig(channels=256, num_latents=32)
    assert by_size.channels_first_pays(config, 4, 32 * 32, recorded=False, threads=2)
    assert not by_size.channels_first_pays(config, 4, 32 * 32, recorded=False, threads=1)
    assert by_size.channels_last_pays(config, 8 * 32 * 32, recorded=True, norm="layer", threads=2)
    assert not by_size.channels_last_pays(config, 8 * 32 * 32, recorded=True, norm="layer", threads=1)


@pytest.mark.parametrize(
    ("norm", "channels", "nodes", "recorded", "pays"),
    [
        ("affine", 256, 32 * 32, False, True),
        ("affine", 256, 32 * 32, True, False),
        ("affine", 512, 2 * 100 * 168, False, False),
        ("batch", 1024, 8 * 14 * 14, False, True),
        ("batch", 1024, 8 * 14 * 14, True, False),
        ("layer", 1024, 8 * 14 * 14, True, True),
        ("group", 1024, 14 * 14, True, False),  # so few that the core's backward pass is faster
        ("group", 512, 2 * 100 * 168, False, False),  # tiles of a large map need less memory
        (None, 256, 32 * 32, False, False),
    ],
)
def test_how_few_rows_follows_from_the_kind_of_norm(
    norm: NormKind | None, channels: int, nodes: int, recorded: bool, pays: bool
) -> None:
    config = LatentGNNConfig(channels=channels, num_latents=32)
    assert by_size.channels_last_pays(config, nodes, recorded=recorded, norm=norm) is pays


def test_rows_of_unreduced_channels_take_the_plain_path_in_both_passes() -> None:
    config = LatentGNNConfig(channels=32, num_latents=32, reduction=1)
    assert by_size.channels_last_pays(config, 25 * 16 * 16, recorded=True, norm="layer")


@pytest.mark.parametrize("norm", [FrozenBatchNorm, nn.BatchNorm1d, no_norm, group_norm, nn.LayerNorm, nn.RMSNorm])
@pytest.mark.parametrize("samples", [1, 2])
def test_rows_give_what_the_reference_gives(norm: NormFactory, samples: int, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    layer = LatentGNN(256, num_latents=24, reduction=4, norm=norm, gamma_init=0.5)
    x = torch.randn(samples, 256, 20, 20).to(memory_format=torch.channels_last)
    exact, weight = copy.deepcopy(layer).double(), torch.randn_like(x)
    wide = x.double().requires_grad_()
    expected = reference.forward(exact, wide)
    grads = torch.autograd.grad((expected * weight.double()).sum(), [wide, *exact.parameters()])
    with torch.no_grad():
        assert "channels lie innermost" in (_why_not(layer, x.flatten(2).mT) or "")
        out = layer(x)
    assert out.is_contiguous(memory_format=torch.channels_last)
    most = 2e-5 * float(expected.detach().abs().max())
    torch.testing.assert_close(out.double(), expected.detach(), rtol=0, atol=most)
    # The plain path's own gradients, whose products are convolutions here.
    monkeypatch.setattr(by_size, "channels_last_pays", lambda *arguments, **named: True)
    x.requires_grad_()
    assert "channels lie innermost" in (_why_not(layer, x.flatten(2).mT) or "")
    got = torch.autograd.grad((layer(x) * weight).sum(), [x, *layer.parameters()])
    # Some of them are 0, such as those of a norm's bias before another norm.
    largest = max(float(grad.abs().max()) for grad in grads)
    for own, other in zip(got, grads, strict=True):
        torch.testing.assert_close(own.double(), other, rtol=0, atol=1e-5 * largest)


@pytest.mark.parametrize("norm", [FrozenBatchNorm, nn.BatchNorm1d, no_norm, group_norm, nn.LayerNorm])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"symmetric": True},
        {"symmetric": True, "node_scale": "mean", "num_latents": 6},
        {"graph_conv": True, "node_scale": "mean"},
        {"num_groups": 2, "graph_conv": True},
        {"residual": False},
        {"residual": False, "graph_conv": True, "num_latents": 6},
    ],
    ids=[
        *("asymmetric", "symmetric", "symmetric, mean", "graph convolution, mean", "groups"),
        *("no residual", "no residual, one kernel"),
    ],
)
@pytest.mark.parametrize("training", [False, True], ids=["evaluation", "training"])
@pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels last"])
def test_a_small_input_gives_what_the_reference_gives(
    norm: NormFactory, options: dict[str, object], training: bool, last: bool
) -> None:
    layer = _layer(norm, **options).train(training)
    x = torch.randn(2, 16, 3, 4, dtype=torch.float64)
    x = (x.to(memory_format=torch.channels_last) if last else x).requires_grad_()
    inputs, weight = [x, *layer.parameters()], torch.randn_like(x)
    assert "so small" in (_why_not(layer, x.flatten(2).mT) or "")
    out = layer(x)
    got = torch.autograd.grad((out * weight).sum(), inputs)
    assert out.stride() == x.stride()
    expected = reference.forward(layer, x)
    assert torch.allclose(out, expected, rtol=1e-11, atol=1e-12)
    for own, other in zip(got, torch.autograd.grad((expected * weight).sum(), inputs), strict=True):
        assert torch.allclose(own, other, rtol=1e-9, atol=1e-10)


def test_a_node_without_features_has_no_context_and_no_gradient_of_infinite_size() -> None:
    layer = _layer(no_norm)
    x = torch.randn(1, 16, 3, 4, dtype=torch.float64)
    x[..., 0, 0] = 0
    x.requires_grad_()
    out = layer(x)
    out.square().sum().backward()
    assert x.grad is not None
    assert torch.isfinite(x.grad).all()
    assert torch.equal(out[..., 0, 0], torch.zeros_like(out[..., 0, 0]))


@pytest.mark.parametrize("norm", [nn.BatchNorm1d, nn.LayerNorm])
def test_scenes_of_many_points_stay_apart(norm: NormFactory) -> None:
    torch.manual_seed(0)
    layer = PackedLatentGNN(16, num_latents=4, reduction=2, norm=norm, gamma_init=0.5).double()
    x, offsets = torch.randn(3000, 16, dtype=torch.float64), torch.tensor([0, 1000, 3000])
    with torch.no_grad():
        why_not = why_not_core(layer.arrangement(), x[None], None, x.dtype, torch.tensor([0, 1100, 3000]))
        assert "channels lie innermost" in (why_not or "")
        assert why_not_core(layer.arrangement(), x[None], None, x.dtype, torch.tensor([0, 900, 1800, 3000])) is None
        taken = layer(x, offsets)
        with memory("hold"):
            torch.testing.assert_close(taken, layer(x, offsets))


def test_what_a_norm_of_your_own_gave_is_not_changed() -> None:
    layer = LatentGNN(16, num_latents=4, norm=nn.InstanceNorm1d, gamma_init=0.5)
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []
    for norm in layer.norms:
        norm.register_forward_hook(lambda module, given, gave: seen.append((gave, gave.clone())))
    with torch.no_grad():
        layer(torch.randn(2, 16, 6, 6))
    assert len(seen) == 5
    assert all(torch.equal(gave, before) for gave, before in seen)


@pytest.mark.parametrize("norm", ["affine", "batch", "group", "layer"])
def test_an_input_of_which_much_is_computed_inside_is_not_small(norm: NormKind) -> None:
    config = LatentGNNConfig(channels=16, num_latents=256, reduction=2)
    for samples, nodes in [(1, 1 << 15), (4, 1 << 14)]:
        assert not by_size.channels_last_pays(config, samples * nodes, recorded=False, norm=norm)
        assert not by_size.channels_first_pays(config, samples, nodes, recorded=False, norm=norm)


def test_a_traced_layer_has_pytorchs_own_operations() -> None:
    layer = LatentGNN(256, num_latents=64, norm=FrozenBatchNorm, gamma_init=0.5).eval()
    x = torch.randn(1, 256, 20, 20)
    with torch.no_grad():
        operations = {str(node.target) for node in make_fx(layer)(x).graph.nodes}
        with FlopCounterMode(display=False) as counter:
            layer(x)
    assert not any("mkldnn" in operation or operation.endswith("_.default") for operation in operations)
    # Reductions, assignments and the expansion at least.
    assert counter.get_total_flops() > 400 * 2 * (3 * 256 * 32 + 2 * 32 * 64)
