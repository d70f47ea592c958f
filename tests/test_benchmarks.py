"""What the benchmarks measure with: inputs, peers, floors, bytes. No test here looks at a time."""

import ast
import dataclasses
import doctest
import mmap
import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from benchmarks import (
    floors,
    gpu_time,
    layer,
    measure,
    memory,
    options,
    peer_checks,
    peers,
    prepare,
    report,
    runs,
    shapes,
    study,
    study_report,
)
from benchmarks.shapes import MODES, SHAPES, SQUARES, Case, Shape, cases
from latentgnn import LatentGNN, PackedLatentGNN, reference
from latentgnn.cost import floor_operations
from latentgnn.errors import UserError

TINY = {
    "line": Shape(2, 16, (30,), (5,), reduction=4),
    "map": Shape(2, 16, (5, 6), (5, 3), graph_conv=True, reduction=4),
    "volume": Shape(2, 16, (3, 2, 5), (5,), reduction=4),
    "tokens": Shape(2, 16, (30,), (5,), reduction=4, kind="tokens"),
    "packed": Shape(3, 16, (30,), (5, 3), reduction=4, kind="packed", graph_conv=True),
}
NORM_MODES = [(norm, mode) for norm, modes in MODES.items() for mode in modes]


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shapes, "SHAPES", TINY)


def test_every_shape_has_a_layer_and_an_input() -> None:
    everyday = [shape for shape in SHAPES.values() if shape.everyday]
    assert {shape.kind for shape in everyday} == {"map", "tokens", "packed"}
    for name, shape in {**SHAPES, **SQUARES}.items():
        assert shape.config.reduced_channels == shape.channels // shape.reduction, name
        assert shape.size[-1 if shape.kind != "map" else 1] == shape.channels
    assert SHAPES["C3"].size == (2, 512, 100, 168)
    assert SHAPES["tokens-b8"].size == (8, 196, 768)
    assert SHAPES["packed-b8"].size == (8 * 4096, 64)


def test_cases_leave_out_what_there_is_not() -> None:
    found = cases(["C3", "million"], ["batch", "frozen"], ["evaluation", "training"], ["contiguous", "channels-last"])
    names = [case.name for case in found]
    assert len(names) == len(set(names)) == 3 * 2 + 3
    assert "C3 frozen training channels-last" in names
    assert not any("million" in name and "channels-last" in name for name in names)


def as_samples(shape: Shape, x: Tensor) -> Tensor:
    """Any input as (B, C, N)."""
    if shape.kind == "packed":
        return x.unflatten(0, (shape.batch, -1)).mT
    return x.mT if shape.kind == "tokens" else x


@pytest.mark.usefixtures("tiny")
@pytest.mark.parametrize(("norm", "mode"), NORM_MODES)
@pytest.mark.parametrize(("name", "layout"), [(name, layout) for name in TINY for layout in TINY[name].layouts])
def test_the_published_peer_is_the_reference(name: str, norm: str, mode: str, layout: str) -> None:
    shape = TINY[name]
    case = Case(name, norm, mode, layout, dtype="float64")
    layer = peers.make_layer(case)
    peer = peers.make_side("published", layer, case)
    assert peer.exact
    # A layer for (B, C, N) with the same weights, in which the reference can take tokens and scenes of equal sizes.
    oracle = LatentGNN.from_config(layer.config, dtype=torch.float64)
    oracle.load_state_dict(layer.state_dict())
    oracle.train(mode == "training")
    x = peers.make_input(case).requires_grad_()
    x_oracle = x.detach().clone().requires_grad_()
    if layout == "channels-last":
        assert not x.is_contiguous()
    out = as_samples(shape, peer.module(x))
    expected = reference.forward(oracle, as_samples(shape, x_oracle))
    assert (expected - as_samples(shape, x)).abs().max() > 0.1
    torch.testing.assert_close(out, expected, rtol=1e-10, atol=1e-10)
    weight = torch.randn_like(expected)
    (out * weight).sum().backward()
    (expected * weight).sum().backward()
    assert x.grad is not None
    torch.testing.assert_close(x.grad, x_oracle.grad, rtol=1e-8, atol=1e-9)
    ours = {key: value.grad for key, value in peer.module.named_parameters()}
    assert all(value is not None for value in ours.values())
    torch.testing.assert_close(ours["gamma"].flatten(), oracle.gamma.grad.flatten(), rtol=1e-8, atol=1e-9)  # type: ignore[union-attr]
    if norm == "batch":
        running = peer.module.get_submodule("up_channel.1").running_mean
        torch.testing.assert_close(running, oracle.expand.norm.running_mean)


def test_the_published_peer_uses_pytorchs_own_modules_for_maps() -> None:
    case = Case("narrow32-b8")
    kinds = {type(module) for module in peers.make_side("published", peers.make_layer(case), case).module.modules()}
    assert {nn.Conv2d, nn.BatchNorm2d} <= kinds
    assert not {nn.Conv1d, nn.BatchNorm1d} & kinds


@pytest.mark.parametrize("name", [name for name in peers.SIDES if "compiled" not in name])
def test_every_side_runs_at_a_map(name: str) -> None:
    case = Case("convnext14-b8", norm="frozen", mode="training")
    layer = peers.make_layer(case)
    x = peers.make_input(case)[:1]
    side = peers.make_side(name, layer, case)
    with torch.no_grad():
        peer_checks.check(name, side, x, layer(x))
        if not side.exact:
            peer_checks.check_context(name, side.module.eval(), x)


def test_sides_that_an_input_is_not_for_say_why() -> None:
    for name, side, reason in (
        ("million", "LiteMLA", "two dimensions"),
        ("million", "non-local", "GiB"),
        ("million", "attention", "operations"),
        ("tokens-b8", "latent queries", "spatial"),
        ("packed-b8", "reference", "spatial"),
        ("unreduced16-b25", "LiteMLA", "reduction"),
    ):
        case = Case(name)
        with pytest.raises(peers.Refused, match=reason):
            peers.make_side(side, LatentGNN(8, num_latents=1), case)


class Double(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * x


class Fewer(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x[:, :2]


def test_a_wrong_side_is_not_timed() -> None:
    x = torch.randn(1, 4, 6, 6)
    with pytest.raises(UserError, match="differs by"):
        peer_checks.check("double", peers.Side(Double(), exact=True), x, x)
    peer_checks.check("double", peers.Side(Double(), exact=False), x, x)
    with pytest.raises(UserError, match="not finite and of shape"):
        peer_checks.check("fewer", peers.Side(Fewer(), exact=False), x, x)
    with pytest.raises(UserError, match="does not feel the last"), torch.no_grad():
        peer_checks.check_context("convolution", nn.Conv2d(4, 4, 3, padding=1), x)


def permissions() -> tuple[str, ...]:
    cudnn = torch.backends.cudnn
    return (torch.backends.cuda.matmul.fp32_precision, cudnn.conv.fp32_precision, cudnn.rnn.fp32_precision)


class Seen(nn.Module):
    """Notes what float32 products are permitted when it is called."""

    def __init__(self) -> None:
        super().__init__()
        self.permitted: list[tuple[str, ...]] = []

    def forward(self, x: Tensor) -> Tensor:
        self.permitted.append(permissions())
        return 1.01 * x


def test_sides_are_checked_in_full_precision_and_compiled_ones_as_they_are_timed() -> None:
    torch.backends.cuda.matmul.fp32_precision = "none"
    before = permissions()
    assert "tf32" in before
    x = torch.randn(1, 4, 6, 6)
    eager, compiled = Seen(), Seen()
    with pytest.raises(UserError, match=r"differs by 1\.0e-02"):
        peer_checks.check("published", peers.Side(eager, exact=True), x, x)
    with pytest.raises(UserError, match=r"differs by 1\.0e-02"):
        peer_checks.check("compiled published", peers.Side(compiled, exact=True), x, x)
    assert "tf32" not in eager.permitted[0]
    assert compiled.permitted == [before]
    assert permissions() == before


def test_what_an_output_may_differ_by() -> None:
    x = torch.zeros(1)

    class OnGpu:
        dtype, device = torch.float32, torch.device("cuda")

    gpu: Any = OnGpu()
    assert peer_checks.tolerance("published", x) == peer_checks.tolerance("compiled published", x) == 1e-4
    assert peer_checks.tolerance("published", gpu) == 1e-4
    assert peer_checks.tolerance("compiled published", gpu) == 2e-2
    assert peer_checks.tolerance("published", x.bfloat16()) == 5e-2


def test_packed_scenes_do_not_mix() -> None:
    case = Case("packed-b8", norm="layer", mode="training")
    layer = peers.make_layer(case)
    assert isinstance(layer, PackedLatentGNN)
    x = peers.make_input(case)
    moved = x.clone()
    moved[:4096] += 1
    module = peers.make_side("published", layer, case).module
    with torch.no_grad():
        assert torch.equal(module(x)[4096:], module(moved)[4096:])


@pytest.mark.parametrize("graph_conv", [True, False])
@pytest.mark.parametrize("nodes", [3, 100_000])
def test_the_floor_takes_the_cheaper_place_for_the_matrices(graph_conv: bool, nodes: int) -> None:
    c, r, d = 64, 8, 4
    config = dataclasses.replace(Shape(2, c, (nodes,), (d,)).config, graph_conv=graph_conv)
    common = nodes * (4 * c * r + 6 * r * d) + 4 * r * d * d
    scatter, expand = 2 * nodes * r * d, 2 * nodes * c * r
    if graph_conv:
        expected = common + scatter + expand + min(2 * nodes * r * r, 2 * r * r * d)
    else:
        expected = common + min(scatter + expand, 2 * c * r * d + 2 * nodes * c * d)
    assert floor_operations(config, (2, c, nodes)) == 2 * expected


def test_the_floor_is_the_larger_of_operations_and_bytes() -> None:
    rates = {"a": 10.0, "b": 20.0}
    assert floors.floor_seconds(200, 1, rates, 1e9) == 10
    assert floors.floor_seconds(1, 100, rates, 30.0) == 10


def test_rates_are_of_several_routines() -> None:
    rates = floors.Rates(torch.device("cpu"), torch.float32, scale=16)
    products = rates.products()
    assert {"torch.mm", "linear", "1x1 convolution"} <= set(products)
    assert ("oneDNN linear" in products) == torch.backends.mkldnn.is_available()
    assert min(*products.values(), rates.bandwidth()) > 0


def test_a_routine_that_is_much_slower_than_the_best_is_not_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    rates = floors.Rates(torch.device("cpu"), torch.float32, scale=64)
    calls: list[str] = []
    rates._products = {
        "fast": (100, lambda: calls.append("fast")),
        "near": (100, lambda: calls.append("near")),
        "slow": (100, lambda: calls.append("slow")),
    }
    taken = {"fast": 1.0, "near": 3.0, "slow": 5.0}

    def least(call: Callable[[], object], _: torch.device) -> float:
        call()
        return taken[calls[-1]]

    monkeypatch.setattr(floors, "_least_seconds", least)
    first = rates.products()
    taken["fast"] = 2.0
    assert rates.products() == {**first, "fast": 50.0}
    assert calls == ["fast", "near", "slow", "fast", "near"]


def test_the_onednn_routine_is_a_product() -> None:
    if not torch.backends.mkldnn.is_available():
        pytest.skip("this build of PyTorch has no oneDNN")
    x, w = torch.randn(8, 4), torch.randn(3, 4)
    found = torch.ops.mkldnn._linear_pointwise(x, w, None, "none", [], "")
    torch.testing.assert_close(found, x @ w.T)


def test_sides_take_turns() -> None:
    calls: list[Any] = []
    sides = [lambda: calls.append("A"), lambda: calls.append("B")]
    taken = measure.take_turns(
        sides, rounds=2, device=torch.device("cpu"), least_seconds=0, between=lambda: calls.append("-")
    )
    assert [len(one) for one in taken] == [2, 2]
    # Three calls each to settle and to count the repeats; then one that is not timed before each that is.
    assert "".join(calls) == "AAABBB-AABB-BBAA"


def test_short_calls_are_repeated() -> None:
    calls: list[int] = []
    measure.take_turns([lambda: calls.append(1)], rounds=1, device=torch.device("cpu"), least_seconds=1e-4)
    assert len(calls) > 10


def test_the_gpus_time_is_between_events_behind_work_that_lasts_longer(monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[str] = []
    milliseconds = iter([9.0, 2.0, 4.0])

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            done.append("record")

        def elapsed_time(self, other: "Event") -> float:
            return next(milliseconds)

    def sleep(cycles: int) -> None:
        # The call is taken to need 10 ms to be launched.
        assert cycles >= 0.01 * 1.98e9
        done.append("sleep")

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "_sleep", sleep, raising=False)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: done.append("wait"))
    monkeypatch.setattr(measure, "seconds", lambda call, device: 0.01)
    assert measure.device_seconds(lambda: done.append("call"), repeats=3) == 0.004
    assert done == ["sleep", "record", "call", "record", "wait"] * 3


def test_held_and_peak_bytes_are_counted() -> None:
    x = torch.randn(1000, requires_grad=True)
    size = x.numel() * 4
    module = nn.Linear(1000, 10)
    # A square keeps its input, a sine of it the square.
    assert measure.held_bytes(lambda x: (x * x).sin(), x, module) == 2 * size
    # Parameters are there anyway.
    assert measure.held_bytes(module, x, module) == size
    with torch.no_grad():
        assert measure.peak_bytes(lambda: (x + 1) + 1, x) == pytest.approx(3 * size, rel=0.02)
        assert measure.peak_bytes(lambda: x.clone().add_(1), x) == pytest.approx(2 * size, rel=0.02)


def test_no_program_needs_the_tests() -> None:
    imported: dict[str, list[str]] = {}
    for path in Path(shapes.__file__).parent.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                imported.setdefault(path.name, []).extend(alias.name for alias in node.names)
            elif isinstance(node, ast.ImportFrom):
                imported.setdefault(path.name, []).append(str(node.module))
    assert [name for name, modules in imported.items() if any(one.split(".")[0] == "tests" for one in modules)] == []
    assert "latentgnn" in imported["shapes.py"]


@pytest.mark.skipif(sys.platform != "linux", reason="memory is read from /proc")
def test_this_processs_memory_is_read() -> None:
    before, most = memory.process_bytes("VmRSS"), memory.process_bytes("VmHWM")
    assert 10e6 < before <= most
    with mmap.mmap(-1, 64 << 20, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as held:
        for page in range(0, len(held), mmap.PAGESIZE):
            held[page] = 1
        assert memory.process_bytes("VmRSS") - before > 60e6
        assert memory.process_bytes("VmHWM") >= memory.process_bytes("VmRSS") > memory.private_bytes(os.getpid()) > 60e6


def test_no_two_names_share_the_folder_of_a_run(tmp_path: Path) -> None:
    names = ["a b", "a-b", "a/b", "a%20b", "a_b.c-d", "a, b"]
    folders = {runs.run_folder(tmp_path, name) for name in names}
    assert len(folders) == len(names)
    assert {folder.parent for folder in folders} == {tmp_path}
    # Others keep their names.
    assert runs.run_folder(tmp_path, "a_b.c-d") == tmp_path / "a_b.c-d"


def test_a_step_begins_without_gradients() -> None:
    x = torch.ones(3, requires_grad=True)
    of_output = measure.step_of(lambda: 2 * x, [x], torch.tensor([1.0, 2.0, 3.0]))
    for _ in range(2):
        of_output()
        assert x.grad is not None
        assert x.grad.tolist() == [2, 4, 6]
    measure.step_of(lambda: (3 * x).sum(), [x])()
    assert x.grad.tolist() == [3, 3, 3]


def test_tables_in_markdown() -> None:
    table = report.markdown_table(["", "name", "number"], [["a", "", "1"]], right=["number"])
    assert table.splitlines() == ["| | name | number |", "| --- | --- | ---: |", "| a |  | 1 |"]


def test_the_kernels_of_a_run_are_summed_by_name_and_sorted_by_time() -> None:
    def event(name: str, microseconds: float, device: str = "CUDA") -> Any:
        return SimpleNamespace(name=name, device_type=SimpleNamespace(name=device), device_time=microseconds)

    run = [
        event("_gather_kernel", 10),
        event("aten::add", 1000, "CPU"),
        event("void at::native::(anonymous namespace)::add<4, at::native::Two<float>>(int, float*)", 20),
        event("void at::native::add<4, Two<float>>(long)", 22),
        event("Memset (Device)", 0.5),
    ]
    other = [*run[:-1], event("_gather_kernel", 5)]
    lines = gpu_time.table([*run, *other], 2).splitlines()
    assert [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines if "---" not in line] == [
        ["kernel", "calls", "microseconds"],
        ["add<4, Two<float>>", "2", "42.0"],
        ["_gather_kernel", "1.5", "12.5"],
        ["Memset", "0.5", "0.2"],
        ["together", "4", "54.8"],
    ]


def test_long_names_of_kernels_are_cut() -> None:
    assert gpu_time.shortened("k" * 60) == "k" * 60
    assert gpu_time.shortened("k" * 61) == "k" * 57 + "..."
    # Nothing is left of it without its brackets.
    assert gpu_time.shortened("(unknown)") == "(unknown)"


def test_kernels_are_profiled_after_a_warm_up(monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[str] = []
    kernel = SimpleNamespace(name="_k", device_type=SimpleNamespace(name="CUDA"), device_time=9.0)

    class Profiler:
        def __init__(self, **_: object) -> None:
            pass

        def __enter__(self) -> "Profiler":
            done.append("begin")
            return self

        def __exit__(self, *_: object) -> None:
            done.append("end")

        def events(self) -> list[Any]:
            return [kernel] * 3

    monkeypatch.setattr(gpu_time, "profile", Profiler)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: done.append("wait"))
    assert "| _k | 1 | 9.0 |" in gpu_time.profiled(lambda: done.append("call"))
    assert done == ["call", "wait", "begin", "call", "call", "call", "wait", "end"]


@pytest.mark.parametrize(
    "module",
    [floors, gpu_time, layer, measure, options, prepare, report, runs, shapes, study, study_report],
    ids=lambda module: module.__name__,
)
def test_examples_give_what_they_show(module: ModuleType) -> None:
    failures, tried = doctest.testmod(module)
    assert tried > 0
    assert failures == 0
