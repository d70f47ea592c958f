"""The layer on a GPU, beside the published arithmetic on the CPU; `benchmarks/gpu` runs these."""

import pytest
import torch
from sweep import CONFIGS, make_layer, relative_error
from torch import Tensor, nn

from latentgnn import FrozenBatchNorm, LatentGNN, PackedLatentGNN, launches, reference
from latentgnn.norms import NormFactory, group_norm
from latentgnn.paths import Memory, memory

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.small_inputs,  # the paths that a user's inputs take
]


def assert_close(layer: LatentGNN, found: Tensor, oracle: LatentGNN, expected: Tensor, *inputs: Tensor) -> None:
    """Outputs, and gradients of two inputs and of all parameters."""
    assert relative_error(found.cpu(), expected) < 1e-10
    weight = torch.randn_like(expected)
    own = torch.autograd.grad((found * weight.cuda()).sum(), [inputs[0], *layer.parameters()])
    others = torch.autograd.grad((expected * weight).sum(), [inputs[1], *oracle.parameters()])
    for ours, theirs in zip(own, others, strict=True):
        assert relative_error(ours.cpu(), theirs) < 1e-7
    for ours, theirs in zip(layer.buffers(), oracle.buffers(), strict=True):
        assert torch.allclose(ours.cpu(), theirs)


@pytest.mark.parametrize("choice", ["auto", "hold"])
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("norm", ["batch", "frozen", "torchvision_frozen", "group", "layer", "rms", "none"])
@pytest.mark.parametrize("name", list(CONFIGS))
def test_outputs_and_gradients(name: str, norm: str, training: bool, choice: Memory) -> None:
    oracle = make_layer(name, norm, training=training)
    layer = make_layer(name, norm, training=training).cuda()
    x = torch.randn(2, 32, 9, 11, dtype=torch.float64, requires_grad=True)
    found = x.detach().cuda().requires_grad_()
    with memory(choice):
        out = layer(found)
    assert_close(layer, out, oracle, reference.forward(oracle, x), found, x)


@pytest.mark.parametrize("norm", ["batch", "frozen", "layer"])
@pytest.mark.parametrize("layout", ["channels_last", "single_node", "many_nodes"])
def test_layouts_and_sizes(layout: str, norm: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Channels innermost; every other of two nodes; so many nodes that their sums are cut."""
    monkeypatch.setattr(launches, "_FEWEST_NODES", 64)
    oracle, layer = make_layer("graph_conv", norm), make_layer("graph_conv", norm).cuda()
    x = torch.randn(2, 32, 21, 43, dtype=torch.float64)
    if layout == "channels_last":
        x = x.to(memory_format=torch.channels_last)
    if layout == "single_node":
        x = x[:1, :, :1, :2].repeat(1, 1, 1, 1)[..., ::2]
    x.requires_grad_()
    for choice in ("auto", "hold"):
        found = x.detach().cuda().requires_grad_()
        with memory(choice):
            out = layer(found)
        assert_close(layer, out, oracle, reference.forward(oracle, x), found, x)


@pytest.mark.parametrize("norm", ["batch", "frozen", "group", "layer"])
def test_masks(norm: str) -> None:
    oracle, layer = (make_layer("graph_conv", norm, training=norm == "batch") for _ in range(2))
    x = torch.randn(2, 32, 9, 11, dtype=torch.float64, requires_grad=True)
    mask = torch.ones(2, 9, 11, dtype=torch.bool)
    mask[..., 8:] = False
    found = x.detach().cuda().requires_grad_()
    out = layer.cuda()(found, mask.cuda())[..., :8]
    assert_close(layer, out, oracle, reference.forward(oracle, x[..., :8]), found, x)


@pytest.mark.parametrize("norm", [nn.BatchNorm1d, FrozenBatchNorm, group_norm, nn.LayerNorm])
def test_packed_points(norm: NormFactory) -> None:
    torch.manual_seed(0)
    layer = PackedLatentGNN(32, num_latents=8, norm=norm, gamma_init=0.5, dtype=torch.float64)
    x, offsets = torch.randn(700, 32, dtype=torch.float64, requires_grad=True), torch.tensor([0, 300, 700])
    expected = layer.train(norm is nn.BatchNorm1d)(x, offsets)
    (wanted,) = torch.autograd.grad(expected.square().sum(), x)
    found = x.detach().cuda().requires_grad_()
    out = layer.cuda()(found, offsets.cuda())
    assert relative_error(out.cpu(), expected) < 1e-10
    assert relative_error(torch.autograd.grad(out.square().sum(), found)[0].cpu(), wanted) < 1e-8


@pytest.mark.parametrize("size", [(8, 8), (40, 30), (200, 96)])
@pytest.mark.parametrize("norm", [nn.BatchNorm1d, FrozenBatchNorm, group_norm, nn.LayerNorm])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("autocast", [False, True])
def test_lower_precision(autocast: bool, dtype: torch.dtype, norm: NormFactory, size: tuple[int, int]) -> None:
    torch.manual_seed(0)
    layer = LatentGNN(64, num_latents=16, graph_conv=True, norm=norm, gamma_init=1.0)
    x = torch.randn(2, 64, *size)
    expected = reference.forward(layer, x)
    layer.cuda() if autocast else layer.to("cuda", dtype)
    x = (x.cuda() if autocast else x.to("cuda", dtype)).requires_grad_()
    with torch.autocast("cuda", dtype, enabled=autocast and dtype != torch.float32):
        out = layer(x)
    assert out.dtype == x.dtype
    # Convolutions of float32 may use TF32. The largest error over the largest output.
    most = {torch.float32: 3e-3, torch.float16: 3e-2, torch.bfloat16: 1e-1}
    assert relative_error(out.float().cpu(), expected) < most[dtype]
    out.float().square().sum().backward()
    assert x.grad is not None
    assert torch.isfinite(x.grad).all()


# It says so where it splits a sum; nothing is computed otherwise than it should.
@pytest.mark.filterwarnings(r"ignore:\s*Online softmax is disabled on the fly:UserWarning")
@pytest.mark.parametrize("norm", ["batch", "frozen"])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_compiled(memory_format: torch.memory_format, norm: str) -> None:
    layer = make_layer("graph_conv", norm, training=True).cuda()
    x = torch.randn(2, 32, 9, 11, dtype=torch.float64, device="cuda").contiguous(memory_format=memory_format)
    expected = reference.forward(make_layer("graph_conv", norm, training=True), x.cpu())
    out = torch.compile(layer, fullgraph=True)(x)
    assert relative_error(out.cpu(), expected) < 1e-10
    assert out.stride() == x.stride()
