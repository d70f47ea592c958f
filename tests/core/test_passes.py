"""The core against the published arithmetic, whatever the configuration, shape, strides, mask and block size."""

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sweep import make_layer, relative_error
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from benchmarks.measure import held_bytes
from latentgnn import FrozenBatchNorm, LatentGNN, reference
from latentgnn.core import autograd, inputs, layouts, passes
from latentgnn.paths import memory

AFFINE_NORMS = {"frozen": FrozenBatchNorm, "evaluation": nn.BatchNorm1d, "none": nn.Identity}

LAYERS = st.fixed_dictionaries(
    {
        "num_latents": st.lists(st.integers(1, 6), min_size=1, max_size=3).map(tuple),
        "num_groups": st.sampled_from([1, 2, 4]),
        "symmetric": st.booleans(),
        "graph_conv": st.booleans(),
        "residual": st.booleans(),
        "node_scale": st.sampled_from(["published", "mean"]),
    }
)
SIZES = st.lists(st.integers(1, 7), min_size=1, max_size=3)


def random_layer(arguments: dict[str, Any], norm: str, seed: int, channels: int = 16) -> LatentGNN:
    torch.manual_seed(seed)
    layer = LatentGNN(
        channels, reduction=2, norm=AFFINE_NORMS[norm], gamma_init=0.7, dtype=torch.float64, **arguments
    ).eval()
    for module in layer.modules():
        for name, low in (("weight", 0.5), ("running_var", 0.5), ("bias", -0.5), ("running_mean", -0.5)):
            value = getattr(module, name, None)
            if isinstance(value, Tensor) and value.dim() == 1:
                value.data.uniform_(low, low + 1)
    return layer


def laid_out(x: Tensor, layout: str) -> Tensor:
    if layout == "channels_last":
        return x.movedim(1, -1).contiguous().movedim(-1, 1)
    if layout == "every_other":
        return x.repeat_interleave(2, -1)[..., ::2]
    if layout == "part_of_more_channels":
        return torch.cat([x, x], 1)[:, : x.shape[1]]
    return x


def all_gradients(output: Tensor, x: Tensor, layer: nn.Module) -> list[Tensor]:
    weight = torch.linspace(-1, 1, output.numel(), dtype=output.dtype).view(output.shape)
    parameters = [parameter for parameter in layer.parameters() if parameter.requires_grad]
    return list(torch.autograd.grad((output * weight).sum(), [x, *parameters], materialize_grads=True))


@settings(max_examples=150, deadline=None, derandomize=True)
@given(
    arguments=LAYERS,
    norm=st.sampled_from(sorted(AFFINE_NORMS)),
    batch=st.integers(1, 4),
    spatial=SIZES,
    layout=st.sampled_from(["contiguous", "channels_last", "every_other", "part_of_more_channels"]),
    nodes=st.sampled_from([1, 3, 8, 50, 10000]),
    seed=st.integers(0, 1000),
    kept=st.sampled_from(["hold", "recompute"]),
)
def test_agrees_with_the_reference(
    arguments: dict[str, Any], norm: str, batch: int, spatial: list[int], layout: str, nodes: int, seed: int, kept: Any
) -> None:
    layer = random_layer(arguments, norm, seed)
    x = laid_out(torch.randn(batch, 16, *spatial, dtype=torch.float64), layout).detach().requires_grad_()
    expected = reference.forward(layer, x)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(inputs, "nodes_per_block", lambda *_: nodes)
        patch.setattr(layouts, "_NODES_AT_ONCE", max(nodes // 2, 1))
        with memory(kept):
            output = layer(x)
        found = all_gradients(output, x, layer)
    assert relative_error(output, expected) < 1e-10
    for ours, theirs in zip(found, all_gradients(expected, x, layer), strict=True):
        assert relative_error(ours, theirs) < 1e-8


@settings(max_examples=80, deadline=None, derandomize=True)
@given(
    arguments=LAYERS,
    norm=st.sampled_from(sorted(AFFINE_NORMS)),
    kept=st.lists(st.integers(1, 9), min_size=1, max_size=4),
    nodes=st.sampled_from([1, 4, 25, 10000]),
    seed=st.integers(0, 1000),
)
def test_a_mask_is_as_if_the_other_nodes_were_not_there(
    arguments: dict[str, Any], norm: str, kept: list[int], nodes: int, seed: int
) -> None:
    layer = random_layer(arguments, norm, seed)
    x = torch.randn(len(kept), 16, 9, dtype=torch.float64)
    mask = torch.arange(9).expand(len(kept), -1) < torch.tensor(kept)[:, None]
    mask = mask[:, torch.randperm(9)]
    x[~mask[:, None].expand_as(x)] = torch.nan
    x.requires_grad_()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(inputs, "nodes_per_block", lambda *_: nodes)
        output = layer(x, mask)
        inside = mask[:, None].expand_as(x)
        found = all_gradients(torch.where(inside, output, 0), x, layer)
    expected, wanted = torch.zeros_like(x), torch.zeros_like(x)
    weight = torch.linspace(-1, 1, x.numel(), dtype=x.dtype).view(x.shape)
    totals = [torch.zeros_like(parameter) for parameter in layer.parameters()]
    for sample in range(len(kept)):
        alone = x[sample : sample + 1, :, mask[sample]].detach().requires_grad_()
        y = reference.forward(layer, alone)
        loss = (y * weight[sample : sample + 1, :, mask[sample]]).sum()
        grad_x, *grads = torch.autograd.grad(loss, [alone, *layer.parameters()], materialize_grads=True)
        expected[sample, :, mask[sample]], wanted[sample, :, mask[sample]] = y.detach()[0], grad_x[0]
        totals = [total + grad for total, grad in zip(totals, grads, strict=True)]
    assert relative_error(output[inside], expected[inside]) < 1e-10
    assert output[~inside].isnan().all()
    for ours, theirs in zip(found, [wanted, *totals], strict=True):
        assert relative_error(ours, theirs) < 1e-8


@pytest.mark.parametrize("config", ["graph_conv_two_kernels", "groups_symmetric", "no_residual", "mean"])
@pytest.mark.parametrize("batch", [1, 2])
def test_gradients_agree_with_central_differences(config: str, batch: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inputs, "nodes_per_block", lambda *_: 4)
    layer = make_layer(config, "frozen", channels=16)
    x = torch.randn(batch, 16, 3, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(layer, (x,), eps=1e-6, atol=1e-6)


@pytest.mark.parametrize("graph_conv", [False, True])
@pytest.mark.parametrize(
    ("norm", "most"), [("frozen", 1.05), ("evaluation", 1.05), ("none", 1.05), ("layer", 1.05), ("batch", 2.0)]
)
def test_what_is_held_for_the_backward_pass(norm: str, most: float, graph_conv: bool) -> None:
    factories = {**AFFINE_NORMS, "layer": nn.LayerNorm, "batch": nn.BatchNorm1d}
    layer = LatentGNN(256, num_latents=50, graph_conv=graph_conv, norm=factories[norm], gamma_init=0.5)
    layer.train(norm == "batch")
    x = torch.randn(2, 256, 50, 80, requires_grad=True)
    size = x.numel() * x.element_size()
    with memory("recompute"):
        assert held_bytes(layer, x, layer) <= most * size
    assert held_bytes(lambda x: reference.forward(layer, x), x, layer) > 2.6 * size


@pytest.mark.parametrize("norm", ["frozen", "batch", "layer"])
def test_under_activation_checkpointing_the_layer_runs_once_more(norm: str, monkeypatch: pytest.MonkeyPatch) -> None:
    factories = {**AFFINE_NORMS, "layer": nn.LayerNorm, "batch": nn.BatchNorm1d}
    torch.manual_seed(0)
    layer = LatentGNN(16, num_latents=4, graph_conv=True, norm=factories[norm], gamma_init=0.5, dtype=torch.float64)
    x = torch.randn(2, 16, 5, 6, dtype=torch.float64, requires_grad=True)
    wanted = all_gradients(reference.forward(layer, x), x, layer)
    runs, forward = [], passes.forward
    monkeypatch.setattr(passes, "forward", lambda *values, **named: runs.append(1) or forward(*values, **named))
    found = all_gradients(checkpoint(layer, x, use_reentrant=False), x, layer)
    assert len(runs) == 2
    for ours, theirs in zip(found, wanted, strict=True):
        assert relative_error(ours, theirs) < 1e-7


def test_folded_matrices_are_not_held() -> None:
    """Where channels are many and nodes few, copies of the matrices would be as large as the input."""
    layer = LatentGNN(512, num_latents=8, graph_conv=True, norm=FrozenBatchNorm, gamma_init=0.5)
    x = torch.randn(1, 512, 10, 12, requires_grad=True)
    with memory("recompute"):
        assert held_bytes(layer, x, layer) <= 1.1 * x.numel() * x.element_size()


@pytest.mark.parametrize("mode", ["parameters", "autocast"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float16, 0.02), (torch.bfloat16, 0.11)])
@pytest.mark.parametrize("config", ["graph_conv", "two_kernels", "symmetric", "groups"])
def test_gradients_in_half_precision(config: str, dtype: torch.dtype, tolerance: float, mode: str) -> None:
    layer = make_layer(config, "frozen", channels=64).float()
    # Rows longer than 1, which float16 must take down on the way and up again.
    layer.gather_reduce.weight.data *= 30
    if mode == "parameters":
        layer.to(dtype)
    exact = make_layer(config, "frozen", channels=64).float()
    exact.load_state_dict({name: value.float() for name, value in layer.state_dict().items()})
    x = torch.randn(2, 64, 9, 11).to(dtype if mode == "parameters" else torch.float32).requires_grad_()
    with torch.autocast("cpu", dtype, enabled=mode == "autocast"):
        output = layer(x)
    x32 = x.detach().float().requires_grad_()
    wanted = reference.forward(exact, x32)
    for ours, theirs in zip(all_gradients(output, x, layer), all_gradients(wanted, x32, exact), strict=True):
        assert (ours.float() - theirs).norm() <= tolerance * theirs.norm() + 1e-3


def test_a_second_derivative_is_refused() -> None:
    layer = make_layer("asymmetric", "frozen", channels=16)
    x = torch.randn(1, 16, 4, dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(layer(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match=r"no second derivatives.*torch\.func\.grad"):
        gradient.sum().backward()


def test_nothing_is_computed_for_an_input_without_gradient() -> None:
    layer = make_layer("graph_conv", "frozen")
    x = torch.randn(2, 32, 5, 5, dtype=torch.float64)
    output, expected = layer(x), reference.forward(layer, x)
    found = torch.autograd.grad(output.square().sum(), list(layer.parameters()))
    wanted = torch.autograd.grad(expected.square().sum(), list(layer.parameters()))
    for ours, theirs in zip(found, wanted, strict=True):
        assert relative_error(ours, theirs) < 1e-9
    assert not output.isnan().any()


@pytest.mark.filterwarnings("default")  # PyTorch's check warns of its own internals
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("graph_conv", [False, True])
def test_the_operators_are_registered_as_pytorch_asks(
    symmetric: bool, graph_conv: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[tuple[Any, ...]] = []
    operator = torch.ops.latentgnn.forward
    monkeypatch.setattr(
        torch.ops.latentgnn, "forward", lambda *arguments: calls.append(arguments) or operator(*arguments)
    )
    layer = LatentGNN(
        16, num_latents=(3, 2), symmetric=symmetric, graph_conv=graph_conv, norm=FrozenBatchNorm, gamma_init=1.0
    )
    monkeypatch.setattr(autograd, "is_in_torch_dispatch_mode", lambda: True)
    layer(torch.randn(2, 16, 6, 5, requires_grad=True), torch.rand(2, 6, 5) > 0.2)
    monkeypatch.undo()
    ((x, mask, offsets, tensors, present, *plan),) = calls

    def leaf(tensor: Tensor) -> Tensor:
        return tensor.detach().clone().requires_grad_()

    tensors = [leaf(tensor) for tensor in tensors]
    torch.library.opcheck(torch.ops.latentgnn.forward.default, (leaf(x), mask, offsets, tensors, present, *plan))
    with torch.no_grad():
        out, sums, weights = operator(x, mask, offsets, tensors, present, *plan)
    needs = [True] * len(tensors)
    arguments = (torch.randn_like(out), x.detach(), mask, offsets, tensors, present, sums, weights, True, needs, *plan)
    # Without AOT autograd's test, which differentiates: there are no second derivatives.
    torch.library.opcheck(
        torch.ops.latentgnn.backward.default, arguments, test_utils=("test_schema", "test_faketensor")
    )


def test_float32_is_about_as_exact_as_the_reference() -> None:
    """Errors against float64, relative to the reference's own: outputs and gradients, as geometric means."""
    ratios: dict[str, list[float]] = {"output": [], "gradient": []}
    for config in ("graph_conv", "two_kernels", "symmetric", "mean"):
        single = make_layer(config, "frozen", channels=128).float()
        exact = make_layer(config, "frozen", channels=128)
        exact.load_state_dict(single.state_dict())
        torch.manual_seed(0)
        x32, grad = torch.randn(2, 128, 1600, requires_grad=True), torch.randn(2, 128, 1600)
        x = x32.detach().double().requires_grad_()

        def found(output: Tensor, x: Tensor, layer: nn.Module, grad: Tensor = grad) -> list[Tensor]:
            return [output, *torch.autograd.grad(output, [x, *layer.parameters()], grad.to(output.dtype))]

        wanted = found(reference.forward(exact, x), x, exact)
        ours = found(single(x32), x32, single)
        theirs = found(reference.forward(single, x32), x32, single)
        for index, (mine, published, true) in enumerate(zip(ours, theirs, wanted, strict=True)):
            ratio = (mine - true).detach().norm() / (published - true).detach().norm()
            ratios["gradient" if index else "output"].append(float(ratio.log()))
    assert math.exp(sum(ratios["output"]) / len(ratios["output"])) < 1.2
    assert math.exp(sum(ratios["gradient"]) / len(ratios["gradient"])) < 2
