"""The Triton kernels against the reference, on a GPU or in Triton's interpreter, and compiled for GPUs not at hand."""

import os
import subprocess
import sys
from typing import Any

import pytest
import torch
from sweep import make_layer, relative_error
from torch import nn

import latentgnn
from latentgnn import FrozenBatchNorm, LatentGNN, machine, reference, tiles
from latentgnn.errors import UserError

pytest.importorskip("triton")
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture
def called(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Every device wants the kernels; the names of those that ran."""
    from latentgnn import triton_kernels

    names: list[str] = []
    for name in ("gather", "scatter"):
        function = getattr(triton_kernels, name)

        def counted(*arguments: Any, name: str = name, function: Any = function) -> Any:
            names.append(name)
            return function(*arguments)

        monkeypatch.setattr(triton_kernels, name, counted)
    monkeypatch.setattr(tiles, "wants_triton", lambda device: True)
    return names


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(
    "config",
    [
        *("asymmetric", "two_kernels", "graph_conv", "graph_conv_two_kernels", "groups", "groups_graph_conv"),
        *("mean", "no_residual"),
    ],
)
def test_kernels_agree_with_the_reference(
    config: str, masked: bool, called: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tiles, "nodes_per_tile", lambda *_: 150)
    layer, exact = make_layer(config, "frozen").float().to(DEVICE), make_layer(config, "frozen").to(DEVICE)
    x = torch.randn(2, 32, 10, 17, device=DEVICE)
    mask = torch.rand(2, 10, 17, device=DEVICE) > 0.3 if masked else None
    with torch.no_grad():
        output = layer(x, mask)
    # Two tiles for each sample.
    assert called == ["gather"] * 4 + ["scatter"] * 4
    for sample in range(2):
        valid = slice(None) if mask is None else mask[sample].flatten()
        alone = x[sample : sample + 1].double().flatten(2)[..., valid]
        found = output[sample : sample + 1].flatten(2)[..., valid]
        assert relative_error(found, reference.forward(exact, alone)) < 1e-5


@pytest.mark.parametrize("config", ["two_kernels", "groups_graph_conv"])
def test_samples_share_a_tile(config: str, called: list[str]) -> None:
    layer, exact = make_layer(config, "frozen").float().to(DEVICE), make_layer(config, "frozen").to(DEVICE)
    x = torch.randn(3, 32, 70, device=DEVICE)
    mask = torch.rand(3, 70, device=DEVICE) > 0.3
    mask[1] = False
    with torch.no_grad():
        output = layer(x, mask)
    assert called == ["gather", "scatter"]
    assert torch.equal(output[1], x[1])
    for sample in (0, 2):
        valid = mask[sample]
        expected = reference.forward(exact, x[sample : sample + 1, :, valid].double())
        assert relative_error(output[sample : sample + 1, :, valid], expected) < 1e-5


def shifted_layer(channels: int, **arguments: Any) -> LatentGNN:
    """A layer whose scatter shifts its assignments: where nothing is shifted, a CPU goes another way."""
    layer = LatentGNN(channels, norm=FrozenBatchNorm, gamma_init=0.5, device=DEVICE, **arguments)
    for kernel in layer.kernel_list:
        kernel.scatter_assign.norm.bias.fill_(0.1)
    return layer


def test_latents_take_several_blocks(called: list[str]) -> None:
    layer = shifted_layer(32, num_latents=(70, 130))
    x = torch.randn(1, 32, 150, device=DEVICE)
    with torch.no_grad():
        output = layer(x)
    assert called == ["gather", "scatter"]
    assert relative_error(output, reference.forward(layer, x)) < 1e-5


def test_what_is_not_a_number_spreads(called: list[str]) -> None:
    layer = make_layer("graph_conv", "frozen").float().to(DEVICE)
    x = torch.randn(1, 32, 40, device=DEVICE)
    x[0, 0, 3] = float("nan")
    with torch.no_grad():
        assert layer(x).isnan().all()
    assert called


def test_gradients_follow_the_kernels(called: list[str]) -> None:
    layer, exact = make_layer("graph_conv", "frozen").float().to(DEVICE), make_layer("graph_conv", "frozen").to(DEVICE)
    x = torch.randn(2, 32, 9, 9, device=DEVICE, requires_grad=True)
    wide = x.detach().double().requires_grad_()
    layer(x).square().sum().backward()
    reference.forward(exact, wide).square().sum().backward()
    assert called == ["gather", "scatter"]
    assert relative_error(x.grad, wide.grad) < 1e-4


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_kernels_in_half_precision(dtype: torch.dtype, called: list[str]) -> None:
    if dtype == torch.bfloat16 and DEVICE.type == "cpu":
        pytest.skip("Triton's interpreter does not know bfloat16")
    layer, exact = (make_layer("graph_conv_two_kernels", "frozen").to(DEVICE) for _ in range(2))
    layer.to(dtype)
    exact.load_state_dict({name: value.double() for name, value in layer.state_dict().items()})
    x = torch.randn(2, 32, 9, 9, device=DEVICE).to(dtype)
    x[:, :, ::3] = 0
    with torch.no_grad():
        output = layer(x)
    assert called
    assert output.dtype == dtype
    assert relative_error(output, reference.forward(exact, x.double())) < (4e-2 if dtype == torch.bfloat16 else 6e-3)


@pytest.mark.parametrize(("config", "dtype"), [("symmetric", torch.float32), ("asymmetric", torch.float64)])
def test_what_the_kernels_do_not_know_goes_the_other_way(config: str, dtype: torch.dtype, called: list[str]) -> None:
    layer = make_layer(config, "frozen").to(DEVICE, dtype)
    x = torch.randn(1, 32, 30, dtype=dtype, device=DEVICE)
    assert relative_error(layer(x), reference.forward(layer, x)) < 1e-5
    assert not called


@pytest.mark.parametrize(
    ("channels", "latents", "known"), [(2048, 8, True), (2400, 8, False), (1024, 100, True), (1024, 150, False)]
)
def test_matrices_that_do_not_fit_go_the_other_way(channels: int, latents: int, known: bool, called: list[str]) -> None:
    """300 reduced channels are too wide; 128 by 256 numbers, as 150 latents are rounded up, are too many."""
    shifted_layer(channels, num_latents=latents)(torch.randn(1, channels, 5, device=DEVICE))
    assert bool(called) == known


def test_products_are_as_exact_as_those_of_pytorch() -> None:
    from latentgnn import triton_kernels

    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("high")
        assert triton_kernels._precision() == "tf32"
        torch.set_float32_matmul_precision("highest")
        assert triton_kernels._precision() == "ieee"
    finally:
        torch.set_float32_matmul_precision(before)


def test_they_are_used_where_they_are_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda, cpu = torch.device("cuda"), torch.device("cpu")
    monkeypatch.delenv("LATENTGNN_TRITON", raising=False)
    assert not machine.wants_triton(cuda)
    monkeypatch.setenv("LATENTGNN_TRITON", "1")
    assert machine.wants_triton(cuda)
    assert not machine.wants_triton(cpu)


def test_a_missing_triton_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiles, "wants_triton", lambda device: True)
    monkeypatch.delattr(latentgnn, "triton_kernels", raising=False)
    monkeypatch.delitem(sys.modules, "latentgnn.triton_kernels", raising=False)
    monkeypatch.setitem(sys.modules, "triton", None)
    with pytest.raises(UserError, match=r"LATENTGNN_TRITON=1 needs Triton"):
        LatentGNN(16, num_latents=3, norm=nn.Identity)(torch.randn(1, 16, 5))


_COMPILES = """
import sys, torch
from latentgnn import triton_kernels as kernels
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile

kind, width, latents, capability = sys.argv[1], *map(int, sys.argv[2:])
dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[kind]
kinds = dict.fromkeys(["u", "assign", "convolving", "feature"], kind)
kinds |= {"valid": "u8", "sums": "fp32", "squares": "fp32"}
nodes, block = kernels._nodes_of_block(width, dtype), kernels._block(latents)
nodes_of_scatter = kernels._nodes_of_block(max(width, latents), dtype)
assert block * width * dtype.itemsize <= kernels._MATRIX_BYTES
jobs = [
    (kernels._gather, {"BLOCK_N": nodes, "BLOCK_D": kernels._latents_of_block(nodes)}),
    (kernels._scatter, {"BLOCK_N": nodes_of_scatter, "BLOCK_D": block, "CONVOLVES": False}),
    (kernels._scatter, {"BLOCK_N": nodes_of_scatter, "BLOCK_D": block, "CONVOLVES": True}),
]
for kernel, constants in jobs:
    constants |= {"EPS2": 1e-24, "PRECISION": "ieee", "BLOCK_R": width, "MASKED": True}
    names = [name for name in kernel.arg_names if name not in constants]
    signature = {name: f"*{kinds[name]}" if name in kinds else "i32" for name in names}
    source = ASTSource(kernel, signature | dict.fromkeys(constants, "constexpr"), constexprs=constants)
    options = kernels._options(width, constants["BLOCK_D"])
    found = compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    assert found.asm["cubin"]
    print(found.metadata.shared)
"""
_SHARED_KIB = {80: 163, 86: 99, 90: 227}


@pytest.mark.slow
@pytest.mark.parametrize("capability", [80, 86, 90])
@pytest.mark.parametrize("kind", ["fp32", "bf16"])
@pytest.mark.parametrize(("width", "latents"), [(64, 150), (128, 100), (256, 50)], ids=["C3", "C4", "C5"])
def test_kernels_compile_for_gpus(width: int, latents: int, kind: str, capability: int) -> None:
    """To machine code, within the shared memory that a block has there; in a process without the interpreter."""
    command = [sys.executable, "-c", _COMPILES, kind, *map(str, (width, latents, capability))]
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    shared = [int(line) for line in done.stdout.split()]
    assert len(shared) == 3
    assert max(shared) <= _SHARED_KIB[capability] * 1024
