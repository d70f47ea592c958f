"""The Triton kernels against the reference, on a GPU or in Triton's interpreter, and compiled for GPUs not at hand."""

import importlib
import os
import re
import subprocess
import sys
from functools import partial
from typing import Any

import pytest
import torch
from sweep import make_layer, relative_error
from torch import nn

from latentgnn import FrozenBatchNorm, LatentGNN, PackedLatentGNN, kernels, reference
from latentgnn.core import inputs
from latentgnn.errors import UserError
from latentgnn.paths import memory

pytest.importorskip("triton")
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture
def called(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The kernels are asked for, on every device; the names of those that ran."""
    steps = importlib.import_module("latentgnn.kernels.steps")
    names: list[str] = []
    for name in ("gather", "scatter"):
        function = getattr(steps, name)

        def counted(*arguments: Any, name: str = name, function: Any = function) -> Any:
            names.append(name)
            return function(*arguments)

        monkeypatch.setattr(steps, name, counted)
    monkeypatch.setattr(kernels, "DEVICES", ("cuda", "cpu"))
    monkeypatch.setenv("LATENTGNN_TRITON", "1")
    return names


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(
    "config",
    [
        *("asymmetric", "two_kernels", "graph_conv", "graph_conv_two_kernels", "groups", "groups_graph_conv"),
        *("mean", "no_residual", "no_residual_graph_conv"),
    ],
)
def test_kernels_agree_with_the_reference(
    config: str, masked: bool, called: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(inputs, "nodes_per_block", lambda *_: 80)
    layer, exact = make_layer(config, "frozen").float().to(DEVICE), make_layer(config, "frozen").to(DEVICE)
    x = torch.randn(2, 32, 10, 17, device=DEVICE)
    mask = torch.rand(2, 10, 17, device=DEVICE) > 0.3 if masked else None
    with torch.no_grad():
        output = layer(x, mask)
    # Three blocks for each sample.
    assert called == ["gather"] * 6 + ["scatter"] * 6
    for sample in range(2):
        valid = slice(None) if mask is None else mask[sample].flatten()
        alone = x[sample : sample + 1].double().flatten(2)[..., valid]
        found = output[sample : sample + 1].flatten(2)[..., valid]
        assert relative_error(found, reference.forward(exact, alone)) < 1e-5


@pytest.mark.parametrize("config", ["two_kernels", "groups_graph_conv"])
def test_samples_share_a_block(config: str, called: list[str]) -> None:
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


@pytest.mark.parametrize("layout", ["channels_last", "every_other"])
def test_strides_are_as_they_come(layout: str, called: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inputs, "nodes_per_block", lambda *_: 40)
    layer, exact = (make_layer("groups_graph_conv", "frozen").to(DEVICE) for _ in range(2))
    x = torch.randn(2, 32, 9, 8, device=DEVICE)
    if layout == "channels_last":
        x = x.to(memory_format=torch.channels_last)
    else:
        x = x.repeat_interleave(2, -1)[..., ::2]
    with torch.no_grad():
        output = layer.float()(x)
    assert called
    assert relative_error(output, reference.forward(exact, x.double())) < 1e-5


@pytest.mark.parametrize("config", ["asymmetric", "groups_graph_conv", "graph_conv_two_kernels"])
def test_norms_may_have_neither_scale_nor_shift(config: str, called: list[str]) -> None:
    layer, exact = (make_layer(config, "none").to(DEVICE) for _ in range(2))
    x = torch.randn(2, 32, 50, device=DEVICE)
    mask = torch.arange(50, device=DEVICE).expand(2, -1) < torch.tensor([[50], [30]], device=DEVICE)
    with torch.no_grad():
        output = layer.float()(x, mask)
    assert called == ["gather", "scatter"]
    for sample, count in enumerate((50, 30)):
        expected = reference.forward(exact, x[sample : sample + 1, :, :count].double())
        assert relative_error(output[sample : sample + 1, :, :count], expected) < 1e-5


@pytest.mark.parametrize("nodes", [1000, 20])
@pytest.mark.parametrize("config", ["two_kernels", "groups_graph_conv"])
def test_packed_points(config: str, nodes: int, called: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Scenes that share a block, one of them empty; and one that is cut into blocks."""
    monkeypatch.setattr(inputs, "nodes_per_block", lambda *_: nodes)
    exact = make_layer(config, "frozen").to(DEVICE)
    sizes = {"num_latents": exact.config.num_latents, "num_groups": exact.config.num_groups}
    layer = PackedLatentGNN(32, reduction=4, norm=FrozenBatchNorm, graph_conv=exact.config.graph_conv, **sizes)
    layer.load_state_dict(exact.state_dict())
    x, offsets = torch.randn(70, 32, device=DEVICE), torch.tensor([0, 12, 12, 20, 70], device=DEVICE)
    with torch.no_grad():
        output = layer.to(DEVICE)(x, offsets=offsets)
    scenes = 4 if nodes == 1000 else 6
    assert called == ["gather"] * scenes + ["scatter"] * scenes
    for first, last in ((0, 12), (12, 20), (20, 70)):
        expected = reference.forward(exact, x[first:last].double().T.unsqueeze(0))[0].T
        assert relative_error(output[first:last], expected) < 1e-5


def test_latents_take_several_blocks(called: list[str]) -> None:
    layer = LatentGNN(32, num_latents=(70, 130), norm=FrozenBatchNorm, gamma_init=0.5, device=DEVICE)
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
    with memory("recompute"):
        layer(x).square().sum().backward()
    reference.forward(exact, wide).square().sum().backward()
    assert called == ["gather", "scatter"]
    assert relative_error(x.grad, wide.grad) < 1e-4
    for ours, theirs in zip(layer.parameters(), exact.parameters(), strict=True):
        assert relative_error(ours.grad, theirs.grad) < 1e-4


def test_a_compiled_layer_takes_the_kernels(called: list[str]) -> None:
    layer, exact = (make_layer("graph_conv", "frozen").to(DEVICE) for _ in range(2))
    x = torch.randn(2, 32, 9, 9, device=DEVICE)
    compiled = torch.compile(layer.float(), backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        output = compiled(x)
    assert called == ["gather", "scatter"]
    assert relative_error(output, reference.forward(exact, x.double())) < 1e-5


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_kernels_in_half_precision(dtype: torch.dtype, called: list[str]) -> None:
    if dtype == torch.bfloat16 and DEVICE.type == "cpu":
        pytest.skip("Triton's interpreter does not know bfloat16")
    layer, exact = (make_layer("graph_conv_two_kernels", "frozen").to(DEVICE) for _ in range(2))
    # Products with the input leave float16's range, unless the rows are taken down.
    layer.gather_reduce.weight.data *= 1e5
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
def test_what_the_kernels_are_not_meant_for_goes_the_other_way(
    config: str, dtype: torch.dtype, called: list[str]
) -> None:
    layer = make_layer(config, "frozen").to(DEVICE, dtype)
    x = torch.randn(1, 32, 30, dtype=dtype, device=DEVICE)
    assert relative_error(layer(x), reference.forward(layer, x)) < 1e-5
    assert not called


@pytest.mark.parametrize(
    ("channels", "latents", "fit"), [(2048, 8, True), (2400, 8, False), (1024, 100, True), (1024, 150, False)]
)
def test_matrices_that_do_not_fit_go_the_other_way(channels: int, latents: int, fit: bool, called: list[str]) -> None:
    """300 reduced channels are too wide; 128 by 256 numbers, as 150 latents are rounded up, are too many."""
    layer = LatentGNN(channels, num_latents=latents, norm=FrozenBatchNorm, gamma_init=0.5, device=DEVICE)
    with torch.no_grad():
        layer(torch.randn(1, channels, 5, device=DEVICE))
    assert bool(called) == fit


def why_not(monkeypatch: pytest.MonkeyPatch, call: Any) -> str | None:
    """What `passes.forward` is told while a call runs."""
    told: list[str | None] = []

    def spy(*arguments: Any, **options: Any) -> str | None:
        told.append(function(*arguments, **options))
        return told[-1]

    function = kernels.why_not_kernels
    with monkeypatch.context() as patch:
        patch.setattr(kernels, "why_not_kernels", spy)
        call()
    (reason,) = told
    return reason


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ({}, None),
        ({"symmetric": True}, "share their assignments"),
        ({"dtype": torch.float64}, "sums are of float32"),
        ({"norm": nn.BatchNorm1d}, "norms need their statistics"),
        ({"num_latents": (5, 300)}, r"64 reduced channels .* by 300 latents .* in torch.float32 does not fit"),
    ],
)
def test_a_layer_is_told_why_not(
    arguments: dict[str, Any], reason: str | None, called: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    layer = LatentGNN(128, **{"num_latents": 4, "norm": nn.Identity, "reduction": 2, "device": DEVICE, **arguments})
    x = torch.randn(1, 128, 6, device=DEVICE, dtype=arguments.get("dtype"))
    with torch.no_grad():
        told = why_not(monkeypatch, partial(layer, x))
    assert bool(called) == (told is None)
    assert told is reason if reason is None else re.search(reason, told or "")


@pytest.mark.parametrize("choice", ["hold", "recompute"])
def test_kernels_hold_nothing(choice: Any, called: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    layer = LatentGNN(16, num_latents=4, norm=nn.Identity, device=DEVICE)
    x = torch.randn(1, 16, 6, device=DEVICE)
    with memory(choice):
        told = why_not(monkeypatch, partial(layer, x))
        assert (told is None) == (choice == "recompute")
        assert told is None or "held for the backward pass" in told
        # Without a backward pass nothing is held whatever the choice.
        with torch.no_grad():
            assert why_not(monkeypatch, partial(layer, x)) is None


@pytest.mark.parametrize(
    ("devices", "switch", "reason"),
    [
        (("cuda", "cpu"), None, "LATENTGNN_TRITON=1 is not set"),
        (("cuda", "cpu"), "0", "LATENTGNN_TRITON=1 is not set"),
        (("cuda",), "1", "compiles for CUDA, the layer is on cpu"),
    ],
)
def test_kernels_run_where_they_are_asked_for(
    devices: tuple[str, ...], switch: str | None, reason: str, called: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernels, "DEVICES", devices)
    if switch is None:
        monkeypatch.delenv("LATENTGNN_TRITON")
    else:
        monkeypatch.setenv("LATENTGNN_TRITON", switch)
    assert not kernels.wants_triton(torch.device("cpu"))
    assert kernels.wants_triton(torch.device("cuda")) == (switch == "1")
    layer = LatentGNN(16, num_latents=4, norm=nn.Identity)
    assert reason in str(why_not(monkeypatch, partial(layer, torch.randn(1, 16, 6))))
    assert not called


def test_products_are_as_exact_as_those_of_pytorch() -> None:
    from latentgnn.kernels.common import precision

    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("high")
        assert precision() == "tf32"
        torch.set_float32_matmul_precision("highest")
        assert precision() == "ieee"
    finally:
        torch.set_float32_matmul_precision(before)


def test_a_missing_triton_is_told(called: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "triton", None)
    with pytest.raises(UserError, match=r"LATENTGNN_TRITON=1 needs Triton.*pip install triton"), torch.no_grad():
        LatentGNN(16, num_latents=3, norm=nn.Identity, device=DEVICE)(torch.randn(1, 16, 5, device=DEVICE))


def test_the_library_is_imported_and_runs_without_triton() -> None:
    program = (
        "import sys, torch, latentgnn, latentgnn.kernels; print('triton' in sys.modules); sys.modules['triton'] = None;"
        "print(*latentgnn.LatentGNN(16, num_latents=3)(torch.randn(1, 16, 5)).shape)"
    )
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert found.stdout.splitlines() == ["False", "1 16 5"]


_COMPILES = """
import sys, torch
from latentgnn.kernels import sizes
from latentgnn.kernels.gather import gather_kernel
from latentgnn.kernels.scatter import scatter_kernel
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile

kind, innermost, width, latents, capability = sys.argv[1], sys.argv[2], *map(int, sys.argv[3:])
dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[kind]
kinds = dict.fromkeys(["u", "assign", "to_feature", "feature"], kind) | {"valid": "u8"}
kinds |= dict.fromkeys(["scale", "shift", "assign_shift", "conv_shift", "sums", "weights"], "fp32")
nodes, block = sizes.nodes_of_block(width, dtype), sizes.padded(latents)
nodes_of_scatter = sizes.nodes_of_block(max(width, latents), dtype)
assert sizes.fits(width, latents, dtype)
nothing = dict.fromkeys(["scale", "shift", "assign_shift", "valid"])
scatter = {"BLOCK_N": nodes_of_scatter, "BLOCK_D": block, f"feature_{innermost}": 1}
jobs = [
    (gather_kernel, {"BLOCK_N": nodes, "BLOCK_D": sizes.latents_of_block(nodes), "MEAN": False}),
    (scatter_kernel, {**scatter, "GRAPH_CONV": True}),
    (scatter_kernel, {**scatter, "GRAPH_CONV": False, "conv_shift": None, **nothing}),
]
for kernel, constants in jobs:
    # Triton compiles a stride of one into a kernel.
    constants |= {"EPS2": 1e-24, "PRECISION": "ieee", "BLOCK_R": width, f"u_{innermost}": 1}
    names = [name for name in kernel.arg_names if name not in constants]
    signature = {name: f"*{kinds[name]}" if name in kinds else "i32" for name in names}
    source = ASTSource(kernel, signature | dict.fromkeys(constants, "constexpr"), constexprs=constants)
    options = sizes.options(width, constants["BLOCK_D"])
    compiled = compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    assert compiled.asm["cubin"]
    print(compiled.metadata.shared)
"""
_SHARED_KIB = {80: 163, 86: 99, 90: 227}


@pytest.mark.slow
@pytest.mark.parametrize("capability", [80, 86, 90])
@pytest.mark.parametrize("kind", ["fp32", "bf16"])
@pytest.mark.parametrize("innermost", ["node", "channel"])
@pytest.mark.parametrize(("width", "latents"), [(64, 150), (128, 100), (256, 50)], ids=["C3", "C4", "C5"])
def test_kernels_compile_for_gpus(width: int, latents: int, innermost: str, kind: str, capability: int) -> None:
    """To machine code, within the shared memory that a block has there; in a process without the interpreter."""
    command = [sys.executable, "-c", _COMPILES, kind, innermost, *map(str, (width, latents, capability))]
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    shared = [int(line) for line in done.stdout.split()]
    assert len(shared) == 3
    assert max(shared) <= _SHARED_KIB[capability] * 1024
