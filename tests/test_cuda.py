"""The layer on a GPU, beside the published arithmetic on the CPU; `benchmarks/gpu` runs these."""

import pytest
import torch
from sweep import CONFIGS, make_layer, relative_error
from torch import nn

from latentgnn import LatentGNN, reference

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("norm", ["batch", "frozen", "group", "layer"])
@pytest.mark.parametrize("name", list(CONFIGS))
def test_outputs_and_gradients(name: str, norm: str, training: bool) -> None:
    oracle = make_layer(name, norm, training=training)
    layer = make_layer(name, norm, training=training).cuda()
    x = torch.randn(2, 32, 9, 11, dtype=torch.float64)
    found, expected = x.cuda().requires_grad_(), x.clone().requires_grad_()
    out, wanted = layer(found), reference.forward(oracle, expected)
    assert relative_error(out.cpu(), wanted) < 1e-10
    weight = torch.randn_like(wanted)
    (out * weight.cuda()).sum().backward()
    (wanted * weight).sum().backward()
    assert found.grad is not None
    assert relative_error(found.grad.cpu(), expected.grad) < 1e-8
    wanted_grads = {key: value.grad for key, value in oracle.named_parameters()}
    for key, parameter in layer.named_parameters():
        if wanted_grads[key] is not None:
            assert parameter.grad is not None, key
            assert relative_error(parameter.grad.cpu(), wanted_grads[key]) < 1e-7, key


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_lower_precision(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    layer = LatentGNN(64, num_latents=16, graph_conv=True, norm=nn.LayerNorm, gamma_init=1.0)
    x = torch.randn(2, 64, 40, 30)
    expected = reference.forward(layer, x)
    out = layer.to("cuda", dtype)(x.to("cuda", dtype))
    assert out.dtype == dtype
    assert relative_error(out.float().cpu(), expected) < (1e-3 if dtype == torch.float32 else 5e-2)


# It says so where it splits a sum; nothing is computed otherwise than it should.
@pytest.mark.filterwarnings(r"ignore:\s*Online softmax is disabled on the fly:UserWarning")
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_compiled(memory_format: torch.memory_format) -> None:
    layer = make_layer("graph_conv", training=True).cuda()
    x = torch.randn(2, 32, 9, 11, dtype=torch.float64, device="cuda").contiguous(memory_format=memory_format)
    expected = reference.forward(make_layer("graph_conv", training=True), x.cpu())
    out = torch.compile(layer, fullgraph=True)(x)
    assert relative_error(out.cpu(), expected) < 1e-10
    assert out.stride() == x.stride()
