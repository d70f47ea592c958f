"""The Triton kernels against the reference, on a GPU or in Triton's interpreter, and compiled for GPUs not at hand."""

import importlib
import mmap
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import pytest
import torch
from sweep import make_layer, relative_error
from torch import Tensor, nn

from benchmarks.measure import held_bytes
from latentgnn import FrozenBatchNorm, LatentGNN, PackedLatentGNN, kernels, reference
from latentgnn.core import passes as core_passes
from latentgnn.paths import memory

pytest.importorskip("triton")
# The interpreter of Triton 3.6, which comes with PyTorch 2.11, does so where a loop begins or ends at a tensor.
pytestmark = pytest.mark.filterwarnings("ignore:Conversion of an array with ndim > 0:DeprecationWarning")
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture
def called(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The kernels run on every device, and a GPU is exact; the names of the passes that ran."""
    passes = importlib.import_module("latentgnn.kernels.passes")
    names: list[str] = []
    for name in ("forward", "backward"):
        function = getattr(passes, name)

        def counted(*arguments: Any, name: str = name, function: Any = function, **options: Any) -> Any:
            names.append(name)
            return function(*arguments, **options)

        monkeypatch.setattr(passes, name, counted)
    monkeypatch.setattr(kernels, "DEVICES", ("cuda", "cpu"))
    return names


def tf32(*, allowed: bool) -> AbstractContextManager[None]:
    """Whether convolutions may use TF32; PyTorch's own tests, where they are imported, forbid to set it for good."""
    return torch.backends.cudnn.flags(enabled=True, allow_tf32=allowed)


@pytest.fixture(autouse=True)
def _exact() -> Iterator[None]:
    with tf32(allowed=False):
        yield


@pytest.fixture
def in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """The nodes of each sample are cut into several parts."""
    monkeypatch.setattr("latentgnn.kernels.rows._PROGRAMS", 64)


def reference_of_valid(layer: LatentGNN, x: Tensor, mask: Tensor | None) -> Tensor:
    """The reference over the valid nodes of each sample alone; the others as they are, (B, C, N)."""
    parts = []
    for index, sample in enumerate(x.flatten(2)):
        valid = torch.ones(sample.shape[1], dtype=torch.bool, device=x.device)
        if mask is not None:
            valid = mask[index].flatten()
        inside = reference.forward(layer, sample[None, :, valid])[0]
        parts.append(sample.masked_scatter(valid.expand_as(sample), inside))
    return torch.stack(parts)


def compare(layer: LatentGNN, exact: LatentGNN, x: Tensor, mask: Tensor | None, *, to: float = 1e-5) -> None:
    """Output and gradients of a layer in float32, with the reference's."""
    x = x.detach().requires_grad_()
    wide = x.detach().double().requires_grad_()
    output, expected = layer(x, mask), reference_of_valid(exact, wide, mask)
    assert output.stride() == x.stride()
    assert relative_error(output.flatten(2), expected) < to
    weight = torch.randn_like(output)
    output.backward(weight)
    expected.backward(weight.flatten(2).double())
    assert relative_error(x.grad, wide.grad) < 10 * to
    for (name, ours), theirs in zip(layer.named_parameters(), exact.parameters(), strict=True):
        if theirs.grad is None:
            assert ours.grad is None, name
        else:
            assert relative_error(ours.grad, theirs.grad) < 10 * to, name


@pytest.mark.parametrize(("masked", "choice"), [(False, "hold"), (True, "recompute")])
@pytest.mark.parametrize("norm", ["frozen", "batch", "none"])
@pytest.mark.parametrize("config", ["asymmetric", "graph_conv", "mean", "no_residual", "no_residual_graph_conv"])
def test_kernels_agree_with_the_reference(
    config: str, norm: str, masked: bool, choice: Any, called: list[str], in_parts: None
) -> None:
    layer, exact = make_layer(config, norm).float().to(DEVICE), make_layer(config, norm).to(DEVICE)
    x = torch.randn(2, 32, 10, 17, device=DEVICE)
    if choice == "hold":
        x = x.to(memory_format=torch.channels_last)
    mask = torch.rand(2, 10, 17, device=DEVICE) > 0.3 if masked else None
    with memory(choice):
        compare(layer, exact, x, mask)
    assert called == ["forward", "backward"]


@pytest.mark.parametrize(("channels", "latents"), [(96, 70), (40, 3), (512, 33)])
def test_sizes_that_are_no_powers_of_two(channels: int, latents: int, called: list[str]) -> None:
    make = partial(
        LatentGNN, channels, num_latents=latents, norm=FrozenBatchNorm, graph_conv=True, gamma_init=0.5, device=DEVICE
    )
    torch.manual_seed(0)
    layer = make()
    exact = make(dtype=torch.float64)
    exact.load_state_dict(layer.state_dict())
    compare(layer, exact, torch.randn(3, channels, 21, device=DEVICE), None)
    assert called == ["forward", "backward"]


def test_strides_are_as_they_come(called: list[str]) -> None:
    layer, exact = (make_layer("graph_conv", "frozen").to(DEVICE) for _ in range(2))
    x = torch.randn(2, 32, 9, 8, device=DEVICE).repeat_interleave(2, -1)[..., ::2]
    with torch.no_grad():
        output = layer.float()(x)
    assert called == ["forward"]
    assert relative_error(output, reference.forward(exact, x.double())) < 1e-5


def test_a_sample_without_valid_nodes(called: list[str]) -> None:
    layer = make_layer("graph_conv", "frozen").float().to(DEVICE)
    x = torch.randn(2, 32, 50, device=DEVICE)
    mask = torch.ones(2, 50, dtype=torch.bool, device=DEVICE)
    mask[1] = False
    x[1] = float("nan")
    with torch.no_grad():
        output = layer(x, mask)
    assert called == ["forward"]
    assert output[0].isfinite().all()
    assert output[1].isnan().all()


def test_packed_points(called: list[str], in_parts: None) -> None:
    """Scenes of several sizes, one of them empty."""
    exact = make_layer("graph_conv", "batch").to(DEVICE)
    layer = PackedLatentGNN(32, num_latents=5, reduction=4, graph_conv=True, device=DEVICE).eval()
    layer.load_state_dict(exact.state_dict())
    bounds = [0, 12, 12, 20, 170]
    x = torch.randn(170, 32, device=DEVICE, requires_grad=True)
    wide = x.detach().double().requires_grad_()
    output = layer(x, offsets=torch.tensor(bounds))
    assert called == ["forward"]
    scenes = [wide[first:last].T[None] for first, last in ((0, 12), (12, 20), (20, 170))]
    expected = torch.cat([reference.forward(exact, scene)[0].T for scene in scenes])
    assert relative_error(output, expected) < 1e-5
    weight = torch.randn_like(output)
    output.backward(weight)
    expected.backward(weight.double())
    assert relative_error(x.grad, wide.grad) < 1e-4
    for (name, ours), theirs in zip(layer.named_parameters(), exact.parameters(), strict=True):
        assert relative_error(ours.grad, theirs.grad) < 1e-4, name


def test_scenes_of_unequal_size_share_the_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    """One huge scene is cut into more parts than many of its size would be, and no others than it must."""
    from latentgnn.kernels.rows import Rows

    monkeypatch.setattr("latentgnn.kernels.rows.multiprocessors", lambda device: 100)

    def parts(sizes: list[int]) -> int:
        bounds = [0, *torch.tensor(sizes).cumsum(0).tolist()]
        return Rows.of(torch.empty(1, bounds[-1], 1), None, bounds).splits(torch.device("cpu"), 1, 16)[0]

    assert parts([10_000] * 100) == 4
    assert parts([1_000_000, *[10_000] * 99]) == 16
    assert parts([1_000_000]) == parts([1_000_000, 10]) == 399  # of a multiple of 16 nodes


def test_what_is_not_a_number_spreads(called: list[str]) -> None:
    layer = make_layer("graph_conv", "frozen").float().to(DEVICE)
    x = torch.randn(1, 32, 40, device=DEVICE)
    x[0, 0, 3] = float("nan")
    with torch.no_grad():
        assert layer(x).isnan().all()
    assert called == ["forward"]


@pytest.mark.parametrize("wanted", ["input", "gamma", "gather_reduce.weight"])
def test_gradients_of_some_alone(wanted: str, called: list[str]) -> None:
    layer, exact = make_layer("graph_conv", "frozen").float().to(DEVICE), make_layer("graph_conv", "frozen").to(DEVICE)
    x = torch.randn(2, 32, 30, device=DEVICE, requires_grad=wanted == "input")
    wide = x.detach().double().requires_grad_(wanted == "input")
    for module in (layer, exact):
        for name, parameter in module.named_parameters():
            parameter.requires_grad_(name == wanted)
    layer(x).square().sum().backward()
    reference.forward(exact, wide).square().sum().backward()
    assert called == ["forward", "backward"]
    if wanted == "input":
        assert relative_error(x.grad, wide.grad) < 1e-4
    for ours, theirs in zip(layer.parameters(), exact.parameters(), strict=True):
        assert (ours.grad is None) == (theirs.grad is None)
        if theirs.grad is not None:
            assert relative_error(ours.grad, theirs.grad) < 1e-4


def test_a_compiled_layer_takes_the_kernels(called: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    # As one operator, whatever the input's size.
    monkeypatch.setattr("latentgnn.by_size.KERNELS_PAY_COMPILED", 0)
    layer, exact = (make_layer("graph_conv", "frozen").to(DEVICE) for _ in range(2))
    x = torch.randn(2, 32, 9, 9, device=DEVICE, requires_grad=True)
    wide = x.detach().double().requires_grad_()
    compiled = torch.compile(layer.float(), backend="aot_eager", fullgraph=True)
    output = compiled(x)
    output.square().sum().backward()
    expected = reference.forward(exact, wide)
    expected.square().sum().backward()
    assert called == ["forward", "backward"]
    assert relative_error(output, expected) < 1e-5
    assert relative_error(x.grad, wide.grad) < 1e-4


def test_compiled_kernels_give_gradients_of_what_is_computed(
    called: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a compiled program only its inputs say that they require gradients."""
    monkeypatch.setattr("latentgnn.by_size.KERNELS_PAY_COMPILED", 0)
    layer, exact = (make_layer("graph_conv", "batch").to(DEVICE) for _ in range(2))
    layer.float()
    halves = {name: (value.detach() / 2).requires_grad_() for name, value in layer.named_parameters()}
    x = torch.randn(2, 32, 9, 9, device=DEVICE)

    @torch.compile(backend="aot_eager", fullgraph=True)
    def call(halves: dict[str, Tensor], x: Tensor) -> Tensor:
        return torch.func.functional_call(layer, {name: 2 * half for name, half in halves.items()}, (x,))

    call(halves, x).square().sum().backward()
    reference.forward(exact, x.double()).square().sum().backward()
    assert called == ["forward", "backward"]
    for name, parameter in exact.named_parameters():
        assert relative_error(halves[name].grad, 2 * parameter.grad) < 1e-4, name


def test_parameters_and_statistics_of_any_strides(called: list[str]) -> None:
    layer, exact = (make_layer("graph_conv", "batch").to(DEVICE) for _ in range(2))
    layer.float()
    given = {
        name: value.detach().repeat_interleave(2, -1)[..., ::2] if value.dim() else value
        for name, value in (*layer.named_parameters(), *layer.named_buffers())
    }
    wanted = [given[name].requires_grad_() for name, _ in layer.named_parameters()]
    x = torch.randn(2, 32, 30, device=DEVICE)
    output, expected = torch.func.functional_call(layer, given, (x,)), reference.forward(exact, x.double())
    assert relative_error(output, expected) < 1e-5
    output.square().sum().backward()
    expected.square().sum().backward()
    assert called == ["forward", "backward"]
    for ours, theirs in zip(wanted, exact.parameters(), strict=True):
        assert relative_error(ours.grad, theirs.grad) < 1e-4


def test_imaginary_parts_whose_sign_is_a_bit(called: list[str]) -> None:
    layer, exact = (make_layer("graph_conv", "frozen").to(DEVICE) for _ in range(2))
    x, weight = (torch.randn(2, 32, 30, dtype=torch.complex64, device=DEVICE).conj().imag for _ in range(2))
    assert x.is_neg()
    wide = x.resolve_neg().double().requires_grad_()
    x.requires_grad_()
    output, expected = layer.float()(x), reference.forward(exact, wide)
    assert relative_error(output, expected) < 1e-5
    output.backward(weight)
    expected.backward(weight.resolve_neg().double())
    assert called == ["forward", "backward"]
    assert relative_error(x.grad, wide.grad) < 1e-4


def far_apart(values: Tensor) -> Tensor:
    """The same numbers, (1, N, 3), channels as far apart as 32 bits do not count; on a CPU in little memory."""
    distance = (1 << 30) + 64
    size = 2 * distance + values.shape[1]
    if DEVICE.type == "cuda":
        numbers = torch.empty(size, dtype=values.dtype, device=DEVICE)
    else:
        # The last flag is MAP_NORESERVE, for which Python has no name before 3.13.
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x4000
        pages = mmap.mmap(-1, size * values.element_size(), flags=flags)
        numbers = torch.frombuffer(pages, dtype=values.dtype)
    return numbers.as_strided(values.shape, (size, 1, distance)).copy_(values)


def test_distances_that_32_bits_do_not_count(called: list[str]) -> None:
    from latentgnn.kernels.gather import gather
    from latentgnn.kernels.rows import Rows
    from latentgnn.kernels.way import Way
    from latentgnn.kernels.weights import Projected

    torch.manual_seed(0)
    layer = LatentGNN(3, num_latents=4, reduction=1, norm=nn.Identity, gamma_init=0.5, device=DEVICE)
    x = torch.randn(1, 5, 3, device=DEVICE)
    far = far_apart(x)
    gradients = []
    with memory("hold"):
        for given in (x, far):
            layer.zero_grad()
            output = layer(given.mT)
            output.square().sum().backward()
            gradients.append([output.detach(), *(parameter.grad for parameter in layer.parameters())])
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs)
    assert called == ["forward", "backward"] * 2
    projected = Projected(torch.randn(4, 3, device=DEVICE), [None] * 4, 0.0)
    rows = Rows.of(x, None, None)
    sums = [gather(Way(given, None, rows, projected, projected), mean=False) for given in (x, far)]
    torch.testing.assert_close(*sums)


def test_sums_over_many_rows_are_of_few_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """A grid's second and third dimensions end at 65,535, and each part has memory of the size of the result."""
    from latentgnn.kernels import contract

    kernel, grids = contract.contract_kernel, []

    class Recorded:
        def __getitem__(self, grid: tuple[int, ...]) -> Any:
            grids.append(grid)
            return kernel[grid]

    monkeypatch.setattr(contract, "contract_kernel", Recorded())
    monkeypatch.setattr(contract, "multiprocessors", lambda device: 3)
    left, right = torch.randn(17, 5, 19, device=DEVICE), torch.randn(17, 5, 21, device=DEVICE)
    sums = contract.contract(left, right, totals=True)
    expected = torch.einsum("bno,bnc->oc", left.double(), right.double())
    assert relative_error(sums, torch.cat([expected, right.double().sum((0, 1))[None]])) < 1e-5
    assert grids == [(6,)]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_kernels_in_half_precision(dtype: torch.dtype, called: list[str]) -> None:
    if dtype == torch.bfloat16 and DEVICE.type == "cpu":
        pytest.skip("Triton's interpreter does not know bfloat16")
    layer, exact = (make_layer("graph_conv", "frozen").to(DEVICE) for _ in range(2))
    limit = 1e-1 if dtype == torch.bfloat16 else 1e-2
    # Products with the input leave float16's range, unless the rows are taken down.
    layer.gather_reduce.weight.data *= 1e5
    layer.to(dtype)
    exact.load_state_dict({name: value.double() for name, value in layer.state_dict().items()})
    x = torch.randn(2, 32, 9, 9, device=DEVICE).to(dtype)
    x[:, :, ::3] = 0
    with torch.no_grad():
        output = layer(x)
    assert output.dtype == dtype
    assert relative_error(output, reference.forward(exact, x.double())) < limit
    for module in (layer, exact):
        module.gather_reduce.weight.data /= 1e5
    x.requires_grad_()
    wide = x.detach().double().requires_grad_()
    weight = torch.randn_like(x)
    layer(x).backward(weight)
    reference.forward(exact, wide).backward(weight.double())
    assert called == ["forward", "forward", "backward"]
    assert relative_error(x.grad, wide.grad) < limit


def test_recomputing_holds_the_input_and_the_latents(called: list[str]) -> None:
    layer = LatentGNN(64, num_latents=4, norm=FrozenBatchNorm, device=DEVICE)
    x = torch.randn(2, 64, 300, device=DEVICE, requires_grad=True)
    size = x.numel() * 4
    with memory("recompute"):
        assert held_bytes(layer, x, layer) <= 1.05 * size
    with memory("hold"):
        # Both reductions' 8 channels and the features' 8 beside 64.
        assert 1.3 * size < held_bytes(layer, x, layer) < 1.45 * size
    assert called == ["forward"] * 2


def why_not(monkeypatch: pytest.MonkeyPatch, call: Any) -> str | None:
    """What `core.passes.forward` is told while a call runs."""
    told: list[str | None] = []

    def spy(*arguments: Any, **options: Any) -> str | None:
        told.append(function(*arguments, **options))
        return told[-1]

    function = core_passes.why_not_kernels
    with monkeypatch.context() as patch:
        patch.setattr(core_passes, "why_not_kernels", spy)
        call()
    (reason,) = told
    return reason


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ({}, None),
        ({"symmetric": True}, "share their assignments"),
        ({"num_latents": (4, 5)}, "one kernel of latents"),
        ({"num_groups": 2}, "one group of channels"),
        ({"dtype": torch.float64}, "sums are of float32"),
        ({"norm": nn.BatchNorm1d}, "norms need their statistics"),
        ({"channels": 600}, "at most 256 reduced channels, the layer has 300"),
    ],
)
def test_a_layer_is_told_why_not(
    arguments: dict[str, Any], reason: str | None, called: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"channels": 128, "num_latents": 4, "norm": nn.Identity, "reduction": 2, "device": DEVICE, **arguments}
    layer = LatentGNN(options.pop("channels"), **options)
    x = torch.randn(1, layer.config.channels, 6, device=DEVICE, dtype=arguments.get("dtype"))
    with torch.no_grad(), memory("hold"):
        told = why_not(monkeypatch, partial(layer, x))
    assert bool(called) == (told is None)
    assert told is reason if reason is None else re.search(reason, told or "")


@pytest.mark.parametrize(
    ("devices", "switch", "reason"),
    [(("cuda", "cpu"), "0", "LATENTGNN_TRITON=0 is set"), (("xpu",), "1", "compiles for CUDA, the layer is on")],
)
def test_kernels_run_where_they_may(
    devices: tuple[str, ...], switch: str, reason: str, called: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernels, "DEVICES", devices)
    monkeypatch.setenv("LATENTGNN_TRITON", switch)
    kernels._is_switched_off.cache_clear()
    layer = LatentGNN(16, num_latents=4, norm=nn.Identity, device=DEVICE)
    try:
        with memory("hold"):
            assert reason in str(why_not(monkeypatch, partial(layer, torch.randn(1, 16, 6, device=DEVICE))))
    finally:
        kernels._is_switched_off.cache_clear()
    assert not called


def test_a_switch_between_the_passes_changes_nothing(called: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """The core's backward pass starts from other sums than the kernels'."""
    layer, exact = make_layer("graph_conv", "frozen").float().to(DEVICE), make_layer("graph_conv", "frozen").to(DEVICE)
    x = torch.randn(2, 32, 30, device=DEVICE, requires_grad=True)
    wide = x.detach().double().requires_grad_()
    output = layer(x)
    monkeypatch.setenv("LATENTGNN_TRITON", "0")
    output.square().sum().backward()
    reference.forward(exact, wide).square().sum().backward()
    assert called == ["forward", "backward"]
    assert relative_error(x.grad, wide.grad) < 1e-4


def test_tensors_of_other_kinds_are_left_to_pytorch(called: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Whichever of a layer's tensors it is: a DTensor has no memory of its own."""

    class Other(Tensor):
        pass

    layer = make_layer("graph_conv", "frozen").float().to(DEVICE)
    mean = layer.expand.norm.running_mean
    layer.expand.norm.register_buffer("running_mean", mean.as_subclass(Other))
    with torch.no_grad(), memory("hold"):
        assert "of a kind that Triton does not know" in str(
            why_not(monkeypatch, partial(layer, torch.randn(1, 32, 6, device=DEVICE)))
        )
    assert not called


def test_products_are_as_exact_as_those_of_pytorch() -> None:
    from latentgnn.kernels.common import projections_in, sums_in

    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("high")
        assert sums_in() == "tf32"
        torch.set_float32_matmul_precision("highest")
        assert sums_in() == "tf32x3"
    finally:
        torch.set_float32_matmul_precision(before)
    assert projections_in() == "tf32x3"
    with tf32(allowed=True):
        assert projections_in() == "tf32"


def test_without_triton_the_layer_goes_the_other_way(called: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "_has_triton", lambda: False)
    layer, x = make_layer("asymmetric", "frozen").to(DEVICE), torch.randn(1, 32, 5, dtype=torch.float64, device=DEVICE)
    with torch.no_grad():
        assert relative_error(layer.float()(x.float()), reference.forward(layer.double(), x)) < 1e-5
    assert not called


def test_the_library_is_imported_without_triton() -> None:
    program = (
        "import sys, torch, latentgnn, latentgnn.kernels; print('triton' in sys.modules); sys.modules['triton'] = None;"
        "print(*latentgnn.LatentGNN(16, num_latents=3)(torch.randn(1, 16, 5)).shape)"
    )
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert found.stdout.splitlines() == ["False", "1 16 5"]


_COMPILES = """
import sys, torch
from latentgnn.kernels import sizes
from latentgnn.kernels.contract import contract_kernel
from latentgnn.kernels.gather import gather_kernel, gather_values_kernel
from latentgnn.kernels.mix import mix_backward_kernel, mix_kernel, _columns
from latentgnn.kernels.scatter import scatter_kernel
from latentgnn.kernels.scatter_matrices import matrices_kernel
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile

kind, innermost, width, latents, capability = sys.argv[1], sys.argv[2], *map(int, sys.argv[3:])
given = ["u", "psi", "to_feature", "feature", "grad_feature", "grad_u", "left", "right", "conv"]
norms = [f"{place}_{part}" for place in ("reduce", "assign", "conv") for part in ("weight", "bias", "mean", "var")]
wide = ["parts", "lengths", "sums", "weights", "latent", "unit", "grad", "mixed", "grad_mixed", "totals", "grad_sums"]
kinds = dict.fromkeys(given, kind) | dict.fromkeys([*norms, *wide, "grad_weights", "up"], "fp32")
kinds |= {"valid": "u8", "bounds": "i64"}
options = sizes.Sizes.of(width).options()
blocks = {name: options.pop(name) for name in ("BLOCK_N", "BLOCK_R", "BLOCK_D")}
common = {"EPS2": 1e-24, "PROJECTIONS": "tf32", "SUMS": "tf32x3", f"u_{innermost}": 1, **blocks}
mixed_in = "tf32x3" if kind == "fp32" else "tf32"
mixing = {"PRECISION": mixed_in, "BLOCK_M": 16, "BLOCK_D": _columns(width, latents), "BLOCK_R": blocks["BLOCK_R"]}
few = {"num_warps": 8 if width > 64 else 4, "num_stages": 1}
rows = {**mixing, "BACKWARD": True, "to_feature": None, "BLOCK_O": max(min(width, 8192 // width), 16)}
contracted = {"TOTALS": True, "PRECISION": "tf32", "BLOCK_N": 32, "BLOCK_O": 128, "BLOCK_C": 128}
jobs = [
    (gather_kernel, {**common, "BACKWARD": False, "MEAN": False, "grad_sums": None, "grad_weights": None}, options),
    (gather_kernel, {**common, "BACKWARD": True, "MEAN": False, "up": None}, options),
    (gather_values_kernel, {**common, "MEAN": True, "valid": None, "bounds": None}, options),
    (scatter_kernel, {**common, "BACKWARD": True, "GRAPH_CONV": True, f"feature_{innermost}": 1}, options),
    (matrices_kernel, {**common, f"feature_{innermost}": 1}, options),
    (mix_kernel, rows, few),
    (mix_backward_kernel, {**mixing, "MEAN": False, "EPS": 1e-12, "EPS2": 1e-24}, few),
    (contract_kernel, contracted, {"num_warps": 8, "num_stages": 3}),
]
for kernel, constants, chosen in jobs:
    names = [name for name in kernel.arg_names if name not in constants]
    number = lambda name: "fp32" if name.endswith("eps") else "i32"
    signature = {name: f"*{kinds[name]}" if name in kinds else number(name) for name in names}
    source = ASTSource(kernel, signature | dict.fromkeys(constants, "constexpr"), constexprs=constants)
    compiled = compile(source, target=GPUTarget("cuda", capability, 32), options=chosen)
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
    """To machine code, within the shared memory that `sizes` tells; in a process without the interpreter."""
    from latentgnn.kernels.sizes import shared_bytes

    most = shared_bytes(width, 4 if kind == "fp32" else 2)
    if most > _SHARED_KIB[capability] * 1024:
        pytest.skip("the kernels are not taken there")
    command = [sys.executable, "-c", _COMPILES, kind, innermost, *map(str, (width, latents, capability))]
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    shared = [int(line) for line in done.stdout.split()]
    assert len(shared) == 8
    assert max(shared) <= most
