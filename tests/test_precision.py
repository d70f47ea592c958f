"""Half precision: as the parameters' type and under autocast, on inputs made to overflow and underflow."""

import copy
import math

import pytest
import torch
from sweep import make_layer, relative_error
from torch import Tensor, nn

from latentgnn import LatentGNN, PackedLatentGNN, reference
from latentgnn.functional import scatter

# Half a unit in the last place of every product and sum adds up over the layer's six products.
TOLERANCE = {torch.bfloat16: 4e-2, torch.float16: 6e-3}


def hard_inputs() -> dict[str, Tensor]:
    torch.manual_seed(0)
    x = torch.randn(2, 64, 12, 12)
    zero_pixels = x.clone()
    zero_pixels[:, :, ::3] = 0
    return {
        "ordinary": x,
        "zero_pixels": zero_pixels,
        "zero": torch.zeros_like(x),
        "constant": torch.full_like(x, 3.0),
        "large": x * 1e4 / 4,
        "large_constant": torch.full_like(x, 1e4),
        "small": x * 1e-4,
    }


def half_layer(config: str, norm: str, training: bool) -> LatentGNN:
    return make_layer(config, norm, training=training, channels=64).float()


@pytest.mark.parametrize("case", hard_inputs())
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("mode", ["parameters", "autocast"])
@pytest.mark.parametrize(("norm", "training"), [("batch", True), ("batch", False), ("frozen", False), ("layer", True)])
@pytest.mark.parametrize("config", ["asymmetric", "graph_conv_two_kernels", "mean_symmetric"])
def test_finite_and_close_to_float32(
    config: str, norm: str, training: bool, mode: str, dtype: torch.dtype, case: str
) -> None:
    layer, expected_layer = half_layer(config, norm, training), half_layer(config, norm, training)
    x = hard_inputs()[case]
    if mode == "parameters":
        # Rounded parameters and inputs are what both compute with.
        expected_layer.load_state_dict({k: v.to(dtype).to(v.dtype) for k, v in expected_layer.state_dict().items()})
        layer, x = layer.to(dtype), x.to(dtype)
    given = x.clone().requires_grad_()
    with torch.autocast("cpu", dtype, enabled=mode == "autocast"):
        output = layer(given)
    assert output.dtype == x.dtype
    assert output.isfinite().all()
    # A training batch norm of inputs without a spread divides rounding errors by sqrt(eps): they need only be finite.
    if not (training and norm == "batch" and case in ("constant", "large_constant", "zero", "small")):
        expected = expected_layer(x.float())
        # Some norms of some inputs magnify any rounding; the published arithmetic, where it is finite, shows how much.
        twin = half_layer(config, norm, training)
        with torch.autocast("cpu", dtype, enabled=mode == "autocast"):
            published = reference.forward(twin.to(dtype) if mode == "parameters" else twin, x)
        published_error = relative_error(published, expected)
        tolerance = max(TOLERANCE[dtype], 1.5 * published_error if math.isfinite(published_error) else 0)
        assert relative_error(output, expected) < tolerance
        # The residual hides the context's error behind the input: the context alone, too.
        context, expected_context = output.float() - x.float(), expected - x.float()
        noise = x.float().abs().max() * torch.finfo(dtype if mode == "parameters" else torch.float32).eps
        scale = max(expected_context.abs().max().item(), 1e-3)
        assert (context - expected_context).abs().max() < 4 * tolerance * scale + noise

    output.float().mean().backward()
    assert given.grad.isfinite().all()
    assert all(parameter.grad.isfinite().all() for parameter in layer.parameters())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_dead_latents_stay_dead(dtype: torch.dtype) -> None:
    layer = LatentGNN(64, num_latents=8, gamma_init=1.0, graph_conv=True).eval()
    for kernel in layer.kernel_list:
        nn.init.constant_(kernel.gather_assign.norm.bias[:4].data, -100.0)
        nn.init.constant_(kernel.scatter_assign.norm.bias.data, -100.0)
    layer = layer.to(dtype)
    x = torch.randn(2, 64, 9, 9, dtype=dtype, requires_grad=True)
    output = layer(x)
    # No node takes anything from a latent, and the norms shift nothing: the input comes back.
    assert torch.equal(output, x)
    output.sum().backward()
    assert x.grad.isfinite().all()


def test_sums_over_very_many_nodes_stay_in_range() -> None:
    layer = LatentGNN(16, num_latents=2, reduction=2, gamma_init=1.0).eval()
    x = torch.ones(1, 16, 600, 600)
    expected = layer(x)
    assert relative_error(layer.half()(x.half()), expected) < 1e-2


@pytest.mark.parametrize("norm", ["batch_norm", "group_norm", "layer_norm"])
@pytest.mark.parametrize("options", [{"symmetric": True}, {"node_scale": "mean"}, {"graph_conv": True}], ids=str)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_gradients_over_more_nodes_than_float16_has_numbers(
    dtype: torch.dtype, options: dict[str, object], norm: str
) -> None:
    """Assignments, squares and ones of 70,000 nodes add up to more than 65,504, in maps and in a scene of points."""
    torch.manual_seed(0)
    layer = LatentGNN(16, num_latents=2, reduction=2, gamma_init=0.5, norm=norm, **options).eval()
    for kernel in layer.kernel_list:
        for assign in (kernel.gather_assign, kernel.scatter_assign):
            if assign is not None:
                # Every node has an assignment: where it is next to none, rounding decides where its unit length points.
                nn.init.constant_(assign.norm.bias.data, 3.0)
    layer.load_state_dict({name: value.to(dtype).float() for name, value in layer.state_dict().items()})
    x = (torch.randn(1, 16, 70_000) + 1).to(dtype)
    # In float64: some of the gradients are zero, which float32 does not see behind its rounding.
    exact, x64 = copy.deepcopy(layer).double(), x.double().requires_grad_()
    expected = exact(x64)
    # Times 16, as gradients of the mean alone are below what float16 can hold.
    wanted = torch.autograd.grad(16 * expected.mean(), [x64, *exact.parameters()])
    largest = max(gradient.norm() for gradient in wanted[1:])
    layer.to(dtype)
    points = PackedLatentGNN.from_config(layer.config, dtype=dtype).eval()
    points.load_state_dict(layer.state_dict())
    given = x.requires_grad_()
    packed = points(given[0].mT, torch.tensor([0, 70_000])).mT[None]
    for output, module in ((layer(given), layer), (packed, points)):
        assert relative_error(output, expected) < 2 * TOLERANCE[dtype]
        found = torch.autograd.grad(16 * output.float().mean(), [given, *module.parameters()])
        for ours, theirs in zip(found, wanted, strict=True):
            assert ours.isfinite().all()
            assert (ours.double() - theirs).norm() <= 0.1 * theirs.norm() + 0.02 * largest


def test_batch_norm_statistics_are_summed_in_float32() -> None:
    # In float16, the squares of values near 400 overflow.
    layer = LatentGNN(16, num_latents=2, reduction=2, gamma_init=1.0).train()
    x = 400 + torch.randn(4, 16, 10, 10)
    twin = LatentGNN(16, num_latents=2, reduction=2, gamma_init=1.0).train()
    twin.load_state_dict(layer.state_dict())
    with torch.autocast("cpu", torch.float16):
        layer(x)
    twin(x)
    running, expected = layer.gather_reduce.norm.running_mean, twin.gather_reduce.norm.running_mean
    assert running.dtype == torch.float32
    assert relative_error(running, expected) < 1e-3


def test_gradients_vanish_at_zero_pixels_where_division_by_a_tiny_length_would_explode() -> None:
    layer = LatentGNN(16, num_latents=4, reduction=2, norm=nn.Identity, gamma_init=1.0)
    x = torch.randn(1, 16, 6)
    x[..., 2] = 0
    x.requires_grad_()
    layer(x).square().sum().backward()
    assert x.grad.abs().max() < 1e3


def test_gradients_called_for_inside_autocast_are_those_of_the_forward_pass() -> None:
    layer = make_layer("two_kernels", "frozen").float()
    x = torch.randn(1, 32, 60, requires_grad=True)
    wanted = torch.autograd.grad(layer(x).square().sum(), [x, *layer.parameters()])
    loss = layer(x).square().sum()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = torch.autograd.grad(loss, [x, *layer.parameters()])
    assert all(torch.equal(one, other) for one, other in zip(found, wanted, strict=True))


def test_gradients_of_scatter_over_many_nodes_stay_in_range() -> None:
    """Sums over more than 65,504 nodes, the largest number in float16."""
    latent = torch.ones(1, 2, 3, requires_grad=True)
    assign = torch.ones(1, 70_000, 2, dtype=torch.float16)
    scatter(latent, assign).backward(torch.ones(1, 70_000, 3, dtype=torch.float16))
    assert latent.grad is not None
    torch.testing.assert_close(latent.grad, torch.full((1, 2, 3), 70_000.0), rtol=1e-3, atol=0)
