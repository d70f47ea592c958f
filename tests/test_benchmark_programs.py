"""The benchmark's programs: their options, what they refuse, what they write. No test here looks at a time."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks import (
    child,
    detector,
    embedded,
    few_images,
    gpu,
    gpu_time,
    large_scans,
    layer,
    options,
    pair,
    points,
    prepare,
    recipe_costs,
    report,
    shapes,
    sweeps,
)
from benchmarks.floors import Rates
from benchmarks.options import run
from benchmarks.peers import Side
from benchmarks.shapes import MODES, Case, Shape
from latentgnn import LatentGNN
from latentgnn.cost import cost
from latentgnn.errors import UserError
from latentgnn.machine import processor_name
from latentgnn.tasks.detection.config import ModelConfig

TINY = {"tiny": Shape(2, 16, (6, 5), (5,), everyday=True), "tiny-line": Shape(1, 16, (400_000,), (5,))}


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    """Programs know tiny inputs only, and measure pairs in this process, for no longer than they must."""
    monkeypatch.setattr(shapes, "SHAPES", TINY)
    monkeypatch.setattr(layer, "SHAPES", TINY)
    monkeypatch.setattr(layer, "run_forked", in_process)
    monkeypatch.setattr(layer, "start_server", lambda modules: None)


def in_process(function: Callable[..., Any], case: Case, sides: tuple[str, str], rounds: int, _: None) -> Any:
    assert function is pair.compare_alone
    return compare(case, sides, rounds=rounds)


def compare(case: Case, sides: tuple[str, str], *, rounds: int = 1) -> dict[str, Any]:
    rates = Rates(torch.device("cpu"), torch.float32, scale=16)
    return pair.compare(case, sides, rounds=rounds, least_seconds=0, rates=rates)


@pytest.mark.usefixtures("tiny")
def test_a_pair_has_all_fields() -> None:
    result = compare(Case("tiny", norm="frozen", mode="training"), ("latentgnn", "published"), rounds=3)
    for what in ("forward_ratio", "step_ratio"):
        assert 0 < result[what]["least"] <= result[what]["median"] <= result[what]["largest"]
    assert result["floor_seconds"] > 0
    assert list(result["sides"]) == ["latentgnn", "published"]
    for side in result["sides"].values():
        assert min(side["forward_seconds"], side["step_seconds"], side["over_floor"]["median"], side["held"]) > 0
        assert side["peak"] >= 2
    assert json.loads(json.dumps(result)) == result


@pytest.mark.usefixtures("tiny")
def test_a_side_beside_itself_holds_the_same() -> None:
    result = compare(Case("tiny"), ("published", "reference"))
    held = [side["held"] for side in result["sides"].values()]
    assert held[0] == pytest.approx(held[1], rel=0.1)


@pytest.mark.usefixtures("tiny")
def test_a_pair_that_cannot_be_says_why() -> None:
    assert "two dimensions" in compare(Case("tiny-line"), ("latentgnn", "LiteMLA"))["refused"]


def test_a_pair_runs_in_a_process_of_its_own() -> None:
    result = layer.run_pair(Case("unreduced16-b25"), ("latentgnn", "LiteMLA"), rounds=1, threads=1)
    assert "reduction of 8" in result["refused"]
    result = layer.run_pair(
        Case("square-16", norm="frozen", mode="training"), ("latentgnn", "published"), rounds=1, threads=1
    )
    assert set(result["sides"]) == {"latentgnn", "published"}


def test_a_child_that_fails_is_told_with_what_it_said() -> None:
    with pytest.raises(UserError, match=r"ended with code 2(.|\n)*C33"):
        child.run_child("benchmarks.pair", ["--shape", "C33"])


TOGETHER = """
import json, os, sys, time
rank = int(os.environ["RANK"])
if sys.argv[1] == "fail" and rank == 0:
    open(os.environ["PIDS"] + "/0", "w").write(str(os.getpid()))
    time.sleep(120)
if sys.argv[1] == "fail":
    while not os.path.exists(os.environ["PIDS"] + "/0"):
        time.sleep(0.01)
    raise SystemExit("this is why")
print("before")
print(json.dumps({"rank": rank}))
"""


def test_processes_that_run_together_end_when_one_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "together_here.py").write_text(TOGETHER)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    environments = [{"RANK": str(rank), "PIDS": str(tmp_path)} for rank in range(2)]
    assert child.run_together("together_here", ["run"], environments) == [{"rank": 0}, {"rank": 1}]
    began = time.monotonic()
    with pytest.raises(UserError, match=r"ended with code 1:\nthis is why"):
        child.run_together("together_here", ["fail"], environments)
    assert time.monotonic() - began < 60
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "0").read_text()), 0)


def test_a_function_runs_in_a_process_of_its_own() -> None:
    assert child.run_forked(os.getpid) != os.getpid()
    # Forked from a process that has called CUDA, it could not use it.
    child.start_server([child.PAIR, child.COMPILERS])
    assert child.run_forked(torch.cuda._is_in_bad_fork) is False


def test_a_server_imports_compilers_without_a_call_of_cuda() -> None:
    code = "import os, benchmarks.compilers, benchmarks.pair, benchmarks.detector, torch\nif os.fork() == 0:\n"
    code += "    os._exit(torch.cuda._is_in_bad_fork())\nraise SystemExit(os.wait()[1])"
    path = os.pathsep.join(filter(None, [str(child.ROOT), os.environ.get("PYTHONPATH")]))
    assert subprocess.run([sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": path}).returncode == 0


def test_a_forked_process_that_fails_is_told_with_what_it_said() -> None:
    with pytest.raises(UserError, match=r"^posix\.abort ended with code -6"):
        child.run_forked(os.abort)
    with pytest.raises(UserError, match=r"(?s)raised ValueError:.*Traceback.*not JSON|raised JSONDecodeError"):
        child.run_forked(json.loads, "not JSON")
    with pytest.raises(UserError, match=r"^there is no kind 'x'$"):
        child.run_forked(refuse, "x")
    with pytest.raises(UserError, match="ended after 1 seconds"):
        child.run_forked(time.sleep, 100, seconds=1)
    # What went before broke nothing.
    assert child.run_forked(abs, -3) == 3


def cache_misses(folder: str, case: Case, prepared: bool) -> dict[str, int]:
    """In a process of its own: what a pair of compiled sides finds in a folder, after or before they are prepared."""
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = folder
    from torch._dynamo.utils import counters

    torch.set_num_threads(1)
    if prepared:
        compare(case, ("compiled latentgnn", "compiled published"))
    else:
        pair.run_once(case, "compiled latentgnn", 1)
        pair.run_once(case, "compiled published", 1)
    return {key: value for key, value in counters["inductor"].items() if key.startswith("fxgraph_cache_miss")}


@pytest.mark.slow
def test_a_pair_finds_what_was_prepared(tmp_path: Path) -> None:
    child.start_server([child.PAIR, child.COMPILERS])
    case = Case("square-16", norm="frozen", mode="training")
    assert child.run_forked(cache_misses, str(tmp_path), case, False)["fxgraph_cache_miss"] >= 2
    assert child.run_forked(cache_misses, str(tmp_path), case, True) == {}


def refuse(kind: str) -> None:
    raise UserError(f"there is no kind {kind!r}")


@pytest.mark.usefixtures("tiny")
def test_the_table_is_written_and_printed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    # Times of tiny inputs say nothing.
    monkeypatch.setattr(report, "LITERAL_MARGIN", 1e9)
    argv = ["--shapes", "tiny", "--norms", "batch,layer", "--peers", "published,attention", "--rounds", "1"]
    assert run(layer.main, [*argv, "--processes", "2", "--layouts", "all", "--out", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert "| tiny | batch | training | channels-last | published |" in printed
    assert "| published | batch | contiguous | 2 |" in printed
    (path,) = tmp_path.glob("layer-*-cpu.json")
    written = json.loads(path.read_text())
    assert len(written["pairs"]) == 3 * 2 * 2
    assert set(written["literal"]) == {
        f"{pair['shape']} {pair['norm']} {pair['mode']} {pair['layout']}" for pair in written["pairs"]
    }
    assert {"command", "date", "processor", "torch", "threads", "python"} <= set(written)
    assert "--norms batch,layer" in written["command"]
    text = path.with_suffix(".md").read_text()
    assert text.count("| tiny | layer | training |") == 4
    assert "Floors: operations at the best routine's rate" in text
    assert not [file for file in tmp_path.iterdir() if file.name.endswith(".tmp")]


def ratios(forward: float, step: float) -> dict[str, Any]:
    return {
        f"{name}_ratio": {"median": value, "least": value, "largest": value}
        for name, value in (("forward", forward), ("step", step))
    }


@pytest.mark.usefixtures("tiny")
@pytest.mark.parametrize(("forward", "step"), [(0.5, 1.0), (1.0, 0.8)])
def test_a_row_with_a_slow_literal_peer_is_refused(
    forward: float, step: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def slow(_: object, case: Case, sides: tuple[str, str], *__: object) -> dict[str, Any]:
        asked.append(sides)
        return ratios(forward, step)

    monkeypatch.setattr(layer, "run_forked", slow)
    assert run(layer.main, ["--shapes", "tiny", "--norms", "frozen", "--out", str(tmp_path)]) == 0
    assert asked == [("published", "reference")] * layer.LITERAL_ATTEMPTS
    (path,) = tmp_path.glob("*.json")
    (pair,) = json.loads(path.read_text())["pairs"]
    assert "times as long as `reference`" in pair["refused"]
    assert "forward_ratio" not in pair
    assert json.loads(path.read_text())["means"] == []


def test_a_literal_peer_may_be_a_little_slower() -> None:
    report.check_literal("tiny", ratios(0.95, 1.5))


def test_once_slow_may_be_chance(monkeypatch: pytest.MonkeyPatch) -> None:
    answers = iter([ratios(0.5, 0.5), ratios(1.0, 1.2)])
    monkeypatch.setattr(layer, "run_forked", lambda *_: next(answers))
    literal = layer.Literal(rounds=1, threads=None)
    literal.check(Case("C3"))
    assert literal.ratios == {"C3 batch evaluation contiguous": ratios(1.0, 1.2)}


@pytest.mark.usefixtures("tiny")
@pytest.mark.parametrize(("once", "times"), [([], 3), (["--literal", "once"], 1)])
@pytest.mark.parametrize("forward", [1.0, 0.5])
def test_the_literal_peer_can_be_checked_once_an_input(
    once: list[str], times: int, forward: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def answer(_: object, case: Case, sides: tuple[str, str], *__: object) -> dict[str, Any]:
        if sides != ("published", "reference"):
            return compare(case, sides)
        asked.append(case.name)
        return ratios(forward, 1.0)

    monkeypatch.setattr(layer, "run_forked", answer)
    assert run(layer.main, ["--shapes", "tiny", "--norms", "batch,frozen", *once, "--out", str(tmp_path)]) == 0
    assert len(asked) == times * (1 if forward == 1 else layer.LITERAL_ATTEMPTS)
    pairs = json.loads(next(tmp_path.glob("*.json")).read_text())["pairs"]
    assert [("refused" in pair, "forward_ratio" in pair) for pair in pairs] == [(forward < 1, forward == 1)] * 3


@pytest.mark.usefixtures("tiny")
def test_a_row_whose_process_fails_says_so_and_the_rest_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def answer(_: object, case: Case, sides: tuple[str, str], *__: object) -> dict[str, Any]:
        if case.mode == "evaluation":
            raise UserError("it ended with code -9:\nand said this")
        return compare(case, sides)

    monkeypatch.setattr(layer, "run_forked", answer)
    argv = ["--shapes", "tiny", "--norms", "batch", "--peers", "attention", "--rounds", "1", "--out", str(tmp_path)]
    assert run(layer.main, argv) == 1
    assert "tiny batch evaluation contiguous, attention: it ended with code -9" in capsys.readouterr().err
    (path,) = tmp_path.glob("*.json")
    written = json.loads(path.read_text())
    failed, measured = written["pairs"]
    assert failed["failed"].endswith("and said this")
    assert measured["forward_ratio"]["median"] > 0
    assert [mean["rows"] for mean in written["means"]] == [1]
    (line,) = (line for line in path.with_suffix(".md").read_text().splitlines() if "-9" in line)
    assert "| failed: it ended with code -9: |" in line
    assert line.count("|") == len(report.pair_head(gpu=False)) + 1


@pytest.mark.usefixtures("tiny")
def test_no_row_is_begun_after_the_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]

    def answer(*_: object) -> dict[str, Any]:
        now[0] += 50
        return {"refused": "no"}

    monkeypatch.setattr(layer, "run_forked", answer)
    monkeypatch.setattr(layer, "monotonic", lambda: now[0])
    argv = ["--shapes", "tiny", "--norms", "all", "--peers", "attention", "--limit", "1.5", "--out", str(tmp_path)]
    assert run(layer.main, argv) == 0
    (path,) = tmp_path.glob("*.json")
    written = json.loads(path.read_text())
    assert (len(written["pairs"]), written["not_begun"]) == (2, 3)
    assert "3 more rows were not begun." in path.with_suffix(".md").read_text()


def test_compiled_sides_run_at_the_inputs_that_are_named() -> None:
    chosen = [Case("C3"), Case("C4"), Case("C5")]
    rows = layer.rows_of(chosen, first="compiled latentgnn", peers=["published"], compiled=["C4", "C5"])
    assert [case.shape for case, _ in rows] == ["C4", "C5"]
    rows = layer.rows_of(chosen, first="latentgnn", peers=["published"], compiled=[])
    assert len(rows) == 3


def test_a_table_of_a_gpu_says_how_long_the_gpu_is_busy() -> None:
    times = {"forward_seconds": 0.004, "step_seconds": 0.008, "held": 1, "peak": 2, "over_floor": ratios(1, 1)}
    times["over_floor"] = times["over_floor"]["forward_ratio"]
    busy = {"forward_device_seconds": 0.001, "step_device_seconds": 0.003}
    named = {"shape": "C3", "norm": "batch", "mode": "training", "layout": "contiguous", "peer": "published"}
    row = {**named, **ratios(2, 3), "device": "cuda", "sides": {"latentgnn": times | busy, "published": times | busy}}
    cells = dict(zip(report.pair_head(gpu=True), report.pair_row(row), strict=True))
    assert cells["GPU time forward"] == "1.00 (1.00) ms"
    assert cells["GPU time step"] == "3.00 (3.00) ms"
    assert cells["forward"] == "4.00 (4.00) ms"
    plain = report.pair_row({**row, "device": "cpu"})
    assert plain == [cell for title, cell in cells.items() if "GPU" not in title]


def test_means_are_geometric_and_of_everyday_inputs() -> None:
    def row(forward: float, step: float, **values: Any) -> Mapping[str, Any]:
        named = {"peer": "published", "norm": "batch", "layout": "contiguous", "everyday": True}
        return {**named, **ratios(forward, step), **values}

    rows = [row(1, 2), row(4, 8), row(100, 100, everyday=False), row(3, 3, norm="layer")]
    refused = {"peer": "published", "norm": "batch", "layout": "contiguous", "everyday": True, "refused": "no"}
    batch, other = report.means([*rows, refused])
    assert (batch["rows"], batch["forward"], batch["step"]) == (2, pytest.approx(2), pytest.approx(4))
    assert (other["norm"], other["forward"]) == ("layer", pytest.approx(3))


def test_processes_are_pooled() -> None:
    one = {"ratio": {"median": 1.0, "least": 0.5, "largest": 2.0}, "seconds": 1.0}
    two = {"ratio": {"median": 3.0, "least": 0.1, "largest": 2.5}, "seconds": 4.0}
    expected = {"ratio": {"median": 2.0, "least": 0.1, "largest": 2.5}, "seconds": 2.5}
    assert report.pooled([one, two]) == expected
    assert report.pooled([{"refused": "no"}, {"refused": "no"}]) == {"refused": "no"}


def test_unknown_names_and_numbers_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    for argv, message in (
        (["--shapes", "C33"], "did you mean C3"),
        (["--norms", "batch,instance"], "there is no 'instance'"),
        (["--peers", "latentgnn"], "there is no 'latentgnn'"),
        (["--rounds", "0"], "whole number from 1 on"),
        (["--device", "cdua"], "invalid choice"),
    ):
        with pytest.raises(SystemExit, match="2"):
            layer.main(argv)
        assert message in capsys.readouterr().err
    for argv, message in (
        (["--sides", "latentgnn"], "expected two of"),
        (["--norm", "frozen", "--mode", "evaluation"], "is measured in training"),
        (["--shape", "million", "--layout", "channels-last"], "can be contiguous"),
    ):
        with pytest.raises(SystemExit, match="2"):
            pair.main(["--shape", "C3", *argv])
        assert message in capsys.readouterr().err


def test_points_are_measured() -> None:
    one = points.per_node(100, rounds=1, channels=16, latents=4)
    assert one["nodes"] == 100
    assert one["nanoseconds"] > 0
    packed = points.packed_against_padded([50, 3, 20], channels=16, latents=4, rounds=1, least_seconds=0)
    assert (packed["scenes"], packed["points"], packed["largest"]) == (3, 73, 50)


def test_sweeps_are_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sweeps, "SQUARES", {"square-16": shapes.SQUARES["square-16"]})
    side = {"forward_seconds": 1.0, "held": 1.5}

    def pairs(case: Case, sides: tuple[str, str], **_: Any) -> dict[str, Any]:
        if sides[1] == "attention":
            return {"refused": "too large"}
        return {**ratios(2, 3), "sides": dict.fromkeys(sides, side)}

    def child_of_points(module: str, arguments: list[str]) -> dict[str, Any]:
        assert module == "benchmarks.points"
        if arguments[0] == "per-node":
            return {"nodes": int(arguments[1]), "nanoseconds": 7}
        sizes = points.SCENES[arguments[1]]
        packed = {"scenes": len(sizes), "points": sum(sizes), "largest": max(sizes), "packed_seconds": 1.0}
        return {**packed, "padded_over_packed": ratios(2, 2)["step_ratio"]}

    monkeypatch.setattr(sweeps, "run_pair", pairs)
    monkeypatch.setattr(sweeps, "run_child", child_of_points)
    assert run(sweeps.main, ["--most", "100000", "--out", str(tmp_path)]) == 0
    (text,) = (path.read_text() for path in tmp_path.glob("sweeps-*-cpu.md"))
    assert "| 256 | published | 2.00 (2.00 to 2.00) | 3.00 (3.00 to 3.00) | 1000.00 ms |" in text
    assert "| 256 | attention | not run: too large |" in text
    assert "| 100,000 | 7 ns |" in text
    assert "1,000,000 | 7 ns" not in text
    assert "| 10 | 109,000 | 100,000 | 1000 ms | 2.00" in text
    (picture,) = tmp_path.glob("sweeps-*-cpu.png")
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_a_detectors_step_is_measured() -> None:
    config = ModelConfig(
        backbone="resnet18",
        blocks={"C5": 4},
        min_size=(64,),
        max_size=64,
        rpn_pre_nms=(20, 20),
        rpn_post_nms=(20, 20),
        box_head_channels=8,
        mask_head_channels=8,
    )
    result = detector.measure(
        config,
        images=1,
        size=(64, 64),
        rounds=1,
        device=torch.device("cpu"),
        dtype=torch.float32,
        least_seconds=0,
    )
    assert result["blocks"] == {"C5": 4}
    assert min(result["step_seconds"], result["step_seconds_without"], result["with_over_without"]["least"]) > 0


def value(step: gpu.Step, option: str) -> str:
    return step.arguments[step.arguments.index(option) + 1]


def test_the_gpu_plan_covers_every_form() -> None:
    plan = gpu.plan(out=Path("results"))
    assert [step.module for step in plan] == [
        *[gpu.LAYER] * 2,
        *[gpu.DETECTOR] * 2,
        gpu.TESTS,
        gpu.PREPARE,
        *[gpu.LAYER] * 4,
    ]
    tables = [step for step in plan if step.module == gpu.LAYER]
    (prepare,) = (step for step in plan if step.module == gpu.PREPARE)
    assert [(value(step, "--first"), value(step, "--peers"), value(step, "--dtype")) for step in tables] == [
        (first, peer, dtype)
        for first, peer in (
            ("latentgnn", "published"),
            ("latentgnn", "compiled published"),
            ("compiled latentgnn", "compiled published"),
        )
        for dtype in ("float32", "bfloat16")
    ]
    assert [step.compiled for step in plan] == [*[False] * 5, *[True] * 5]
    assert {value(step, "--compiled") for step in tables[:2]} == {"none"}
    assert {value(step, "--shapes") for step in tables[:2]} == {",".join(gpu.MEASURED)}
    assert {value(step, "--shapes") for step in (prepare, *tables[2:])} == {",".join(gpu.COMPILED)}
    assert {value(step, "--prepared") for step in tables[2:]} == {value(prepare, "--record")}
    assert value(prepare, "--dtypes") == "float32,bfloat16"
    assert all("--device" in step.arguments for step in plan if step.module != gpu.TESTS)
    assert [step.module for step in gpu.plan(["detector"])] == [gpu.DETECTOR] * 2


def test_the_gpu_plan_without_compiled_sides() -> None:
    (table,) = gpu.plan(["layer"], compiled=[], dtypes=["float32"])
    assert value(table, "--peers") == "published"
    assert gpu.plan(["layer"], shapes=["C3"], compiled=["C4"], dtypes=["float32"])[1:] == []


def test_the_gpu_plans_tables_are_written_to_files_of_their_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stems: list[Path] = []

    def note(*_: object, stem: Path, **__: object) -> dict[str, Any]:
        stems.append(stem)
        return {"pairs": []}

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a GPU")
    monkeypatch.setattr(layer, "start_server", lambda modules: None)
    monkeypatch.setattr(layer, "measure", note)
    (tmp_path / gpu.PREPARED).write_text("[]")
    tables = [step for step in gpu.plan(["layer"], out=tmp_path) if step.module == gpu.LAYER]
    assert [gpu.run_step(step, 90) for step in tables] == [0] * 6
    assert len(set(stems)) == 6


def test_the_gpu_plans_commands_can_be_read(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    # Each is taken by its program, which then finds no GPU.
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for step in [*gpu.plan(["layer", "detector"]), *gpu.plan(["layer"], compiled=[])]:
        assert gpu.run_step(step, 90) == 1
        assert "no CUDA device" in capsys.readouterr().err


def test_the_gpu_script_prints_its_plan() -> None:
    script = child.ROOT / "benchmarks" / "gpu"
    options = "--only layer,detector --shapes C3,C4,tokens-b8 --compiled C4 --norms frozen --dtypes float32"
    done = subprocess.run(
        [script, "--dry-run", *options.split()],
        env={**os.environ, "PYTHON": sys.executable},
        capture_output=True,
        text=True,
        check=True,
    )
    eager, detects, prepare, beside, compiled = done.stdout.splitlines()
    assert prepare.startswith("python -m benchmarks.prepare")
    assert detects.startswith("python -m benchmarks.detector")
    assert "--norms frozen --shapes C3,C4,tokens-b8 --first latentgnn --peers published" in eager
    assert "--norms frozen --shapes C4 --first latentgnn --peers 'compiled published'" in beside
    assert "--norms frozen --shapes C4 --first 'compiled latentgnn'" in compiled


def test_the_gpu_script_without_a_gpu(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(gpu, "run_all", lambda *_, **__: pytest.fail("nothing may run"))
    assert run(gpu.main, []) == 1
    assert "--dry-run prints what would be run" in capsys.readouterr().err


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, float]]:
    """The plan's steps take 40 seconds each, and the tests and the preparation fail; what ran, with its limit."""
    done: list[tuple[str, float]] = []
    now = [0.0]

    def run_step(step: gpu.Step, limit: float) -> int:
        done.append((step.module, limit))
        now[0] += 40
        return int(step.module in (gpu.PREPARE, gpu.TESTS))

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(gpu, "start_server", lambda modules: None)
    monkeypatch.setattr(gpu, "run_tests", lambda step, log, limit: run_step(step, limit))
    monkeypatch.setattr(gpu, "run_step", run_step)
    monkeypatch.setattr(gpu, "monotonic", lambda: now[0])
    return done


def test_the_gpu_script_runs_to_its_end(ran: list[tuple[str, float]], capsys: pytest.CaptureFixture[str]) -> None:
    assert run(gpu.main, ["--limit", "10", "--only", "layer,tests", "--compiled", "C4"]) == 1
    assert [module for module, _ in ran] == [gpu.LAYER, gpu.LAYER, gpu.TESTS, gpu.PREPARE, *[gpu.LAYER] * 4]
    # Tables without compiled sides share all that is left, the preparation and the other tables what these leave.
    left = [600 - 40 * step for step in range(8)]
    shares = [1 / 2, 1, 1, 2 / 3, 1 / 4, 1 / 3, 1 / 2, 1]
    assert [limit for _, limit in ran] == pytest.approx([a * b for a, b in zip(left, shares, strict=True)])
    failed = [line for line in capsys.readouterr().err.splitlines() if line.startswith("failed: ")]
    assert [line.split()[3] for line in failed] == ["pytest", "benchmarks.prepare"]


def test_the_gpu_script_begins_nothing_after_its_limit(
    ran: list[tuple[str, float]], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(gpu.main, ["--limit", "2", "--compiled", "C4", "--dtypes", "float32"]) == 1
    assert [module for module, _ in ran] == [gpu.LAYER, gpu.DETECTOR, gpu.TESTS]
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("not begun within the limit: ")]
    assert [line.split()[7] for line in lines] == [gpu.PREPARE, gpu.LAYER, gpu.LAYER]


FAILING = """
import signal, time

def test_first():
    assert 1 == 2, "this is why"

def test_second():
    signal.signal(signal.SIGINT, signal.{handler})
    time.sleep(120)
"""


@pytest.mark.slow
@pytest.mark.parametrize(("handler", "told"), [("default_int_handler", True), ("SIG_IGN", False)])
def test_tests_that_are_cut_off_have_told_what_failed(
    handler: str, told: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(gpu, "_TO_TELL", 2)
    (tmp_path / "test_it.py").write_text(FAILING.format(handler=handler))
    options = ("-v", "-p", "benchmarks.failures", "-p", "no:cacheprovider", "-c", os.devnull)
    log = tmp_path / "results" / "tests.log"
    began = time.monotonic()
    assert gpu.run_tests(gpu.Step(gpu.TESTS, (str(tmp_path / "test_it.py"), *options)), log, 10) != 0
    assert time.monotonic() - began < 60
    written = log.read_text()
    assert capsys.readouterr().out == written
    before, _, after = written.partition("test_second")
    assert "FAILED" in before
    assert "AssertionError: this is why" in before
    assert ("KeyboardInterrupt" in after) is told


def test_tests_in_several_processes_tell_each_failure_when_it_happens(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "test_it.py").write_text("def test_it():\n    raise OSError('this is why')\n")
    (tmp_path / "test_other.py").write_text("import not_there\n")
    options = ("--tb=short", "-v", "-p", "benchmarks.failures", "-p", "no:cacheprovider", "-c", os.devnull, "-n", "2")
    step = gpu.Step(gpu.TESTS, (str(tmp_path), *options, "--continue-on-collection-errors"))
    assert gpu.run_tests(step, tmp_path / "tests.log") == 1
    printed, _, _ = capsys.readouterr().out.partition("= ERRORS =")
    assert printed.count("E   ModuleNotFoundError: No module named 'not_there'") == 1
    assert printed.count("E   OSError: this is why") == 1


def test_a_limited_step_is_told_its_share(monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[list[str]] = []
    monkeypatch.setattr(layer, "main", lambda arguments: given.append(arguments) or 0)
    assert gpu.run_step(gpu.Step(gpu.LAYER, ("--rounds", "1"), rows=1), 90) == 0
    assert gpu.run_step(gpu.Step(gpu.LAYER, ("--rounds", "1")), 90) == 0
    assert gpu.run_step(gpu.Step(gpu.LAYER, ("--rounds", "1"), rows=1)) == 0
    assert given == [["--rounds", "1", "--limit", "1.500"], ["--rounds", "1"], ["--rounds", "1"]]


def test_sides_are_prepared_once_each_and_failures_are_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = []

    def answer(function: object, case: Case, side: str, threads: int | None, *, seconds: float) -> None:
        assert function is pair.run_once
        assert seconds == child.MOST_SECONDS
        asked.append((case.shape, case.dtype, case.mode, side))
        if side == "compiled published" and case.shape == "C4":
            raise UserError("the compiler is not there")

    monkeypatch.setattr(prepare, "run_forked", answer)
    monkeypatch.setattr(prepare, "start_server", lambda modules: None)
    record = tmp_path / "made" / "prepared.json"
    argv = "--shapes C3,C4 --norms batch --dtypes float32,bfloat16 --processes 1 --record"
    assert run(prepare.main, [*argv.split(), str(record)]) == 1
    assert asked == [
        (shape, dtype, mode, side)
        for shape in ("C3", "C4")
        for dtype in ("float32", "bfloat16")
        for mode in ("evaluation", "training")
        for side in ("compiled published", "compiled latentgnn")
    ]
    printed = capsys.readouterr()
    assert "prepared 12 of 16 sides" in printed.out
    assert printed.err.count("compiled published: the compiler is not there") == 4
    listed = json.loads(record.read_text())
    assert len(listed) == 12
    assert "C4 batch training contiguous cpu bfloat16, compiled latentgnn" in listed
    assert "C4 batch training contiguous cpu bfloat16, compiled published" not in listed


def sleep(case: Case, side: str, threads: int | None) -> None:
    time.sleep(100)


@pytest.mark.slow
def test_the_preparation_ends_at_its_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prepare, "run_once", sleep)
    jobs = [(Case(shape), "compiled published") for shape in ("C3", "C4")]
    began = time.monotonic()
    failures = prepare.prepare(jobs, processes=1, limit=4)
    assert time.monotonic() - began < 60
    ended, not_begun = failures.values()
    assert [prepare.job_name(*job) for job in jobs] == list(failures)
    assert "was ended after" in ended
    assert not_begun == "not begun within the limit"


@pytest.mark.usefixtures("tiny")
def test_rows_that_are_not_prepared_are_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(layer, "run_forked", lambda _, case, *__: {"refused": case.mode})
    record = tmp_path / "prepared.json"
    names = [prepare.job_name(Case("tiny", mode=mode), "compiled published") for mode in MODES["batch"]]
    options = ["--shapes", "tiny", "--norms", "batch", "--peers", "compiled published", "--prepared", str(record)]
    argv = [*options, "--out", str(tmp_path / "out")]
    # The list is not there: that is no list without names.
    assert run(layer.main, argv) == 1
    assert str(record) in capsys.readouterr().err
    record.write_text(json.dumps(names[1:]))
    assert run(layer.main, argv) == 0
    assert "1 of 2 rows in" in capsys.readouterr().out
    (path,) = (tmp_path / "out").glob("*.json")
    written = json.loads(path.read_text())
    assert ([pair["mode"] for pair in written["pairs"]], written["not_begun"]) == (["training"], 1)
    assert "1 more rows were not begun." in path.with_suffix(".md").read_text()
    # Of both sides, one is not prepared.
    path.unlink()
    assert run(layer.main, [*argv, "--first", "compiled latentgnn"]) == 0
    assert "0 of 2 rows in 0 s, nothing written" in capsys.readouterr().out
    assert not list((tmp_path / "out").glob("*.json"))


def test_kernels_are_shown_of_a_forward_pass_and_of_a_step(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        gpu_time.main(["--shape", "C3", "--norm", "frozen", "--mode", "evaluation"])
    assert "is measured in training" in capsys.readouterr().err
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert run(gpu_time.main, ["--shape", "C3"]) == 1
    assert "no CUDA device" in capsys.readouterr().err
    recorded: list[bool] = []

    class Small(torch.nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            recorded.append(torch.is_grad_enabled())
            return super().forward(x)

    def profiled(call: Callable[[], object]) -> str:
        call()
        return f"table {len(recorded)}"

    module = Small(5, 5)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(gpu_time, "make_layer", lambda case: None)
    monkeypatch.setattr(gpu_time, "make_input", lambda case: torch.ones(2, 5))
    monkeypatch.setattr(gpu_time, "make_side", lambda name, layer, case: Side(module, exact=False))
    monkeypatch.setattr(gpu_time, "profiled", profiled)
    assert run(gpu_time.main, ["--shape", "C3", "--norm", "frozen", "--dtype", "bfloat16"]) == 0
    printed = capsys.readouterr().out
    named = "latentgnn, C3 frozen training contiguous bfloat16"
    for number, what in ((1, "forward pass"), (2, "step")):
        assert f"{named}, {what}, a mean of 3 runs:\n\ntable {number}\n" in printed
    assert recorded == [False, True]
    assert module.weight.grad is not None


@pytest.mark.usefixtures("tiny")
def test_a_prepared_side_has_done_all_that_is_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    did: list[tuple[bool, bool]] = []

    class Seen(torch.nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            did.append((torch.is_grad_enabled(), x.requires_grad))
            return super().forward(x)

    modules: list[Seen] = []

    def make(name: str, *_: object) -> Side:
        modules.append(Seen(5, 5))
        return Side(modules[-1], exact=False)

    monkeypatch.setattr(pair, "make_side", make)
    pair.run_once(Case("tiny"), "compiled latentgnn", None)
    prepared = set(did)
    assert prepared == {(False, False), (True, True)}
    assert modules[0].weight.grad is not None
    did.clear()
    monkeypatch.setattr(pair, "_check", lambda *_: None)
    compare(Case("tiny"), ("latentgnn", "compiled latentgnn"))
    assert set(did) == prepared


def test_the_header_says_what_it_was_made_with() -> None:
    head = options.header("benchmarks.layer", ["--peers", "latent queries"], device="cpu", dtype="float32", threads=3)
    assert head["command"] == "python -m benchmarks.layer --peers 'latent queries'"
    assert head["processor"] == processor_name()
    assert head["threads"] == 3
    assert head["torch"] == torch.__version__


def test_a_users_error_is_told_in_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    def refuse(argv: list[str]) -> None:
        raise UserError(f"{argv}: no")

    assert run(refuse, ["--x"]) == 1
    assert capsys.readouterr().err == "error: ['--x']: no\n"
    assert run(lambda argv: None, []) == 0
    assert run(lambda argv: 3, []) == 3


def test_results_are_written_where_it_says(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    stem = options.result_stem(tmp_path, "layer", {"date": "2026-01-02T03:04:05+00:00"}, "", "version-1.2")
    options.write_results(stem, {"figure": 1}, "# Page\n")
    assert capsys.readouterr().out == f"written to {tmp_path / 'layer-2026-01-02-version-1.2'}.json and .md\n"
    assert json.loads((tmp_path / "layer-2026-01-02-version-1.2.json").read_text()) == {"figure": 1}
    assert (tmp_path / "layer-2026-01-02-version-1.2.md").read_text() == "# Page\n"


def test_the_processors_name_is_one_line() -> None:
    assert processor_name()
    assert "\n" not in processor_name()


def test_few_images_are_the_same_for_all_sides_and_others_for_another_seed(tmp_path: Path) -> None:
    images = [{"id": number, "file_name": f"{number}.png"} for number in range(9)]
    annotations = [{"id": number, "image_id": number % 9} for number in range(27)]
    path = tmp_path / "instances_train.json"
    path.write_text(json.dumps({"images": images, "annotations": annotations, "categories": [{"id": 1}]}))
    chosen = {}
    for seed in (0, 1):
        content = [json.loads(few_images.few(path, 4, seed, tmp_path).read_text()) for _ in range(2)]
        assert content[0] == content[1]
        ids = [image["id"] for image in content[0]["images"]]
        assert len(set(ids)) == 4
        assert [a["id"] for a in content[0]["annotations"]] == [n for n in range(27) if n % 9 in ids]
        assert content[0]["categories"] == [{"id": 1}]
        chosen[seed] = set(ids)
    assert chosen[0] != chosen[1]
    with pytest.raises(UserError, match=r"--images 10: .* has 9"):
        few_images.few(path, 10, 0, tmp_path)


def test_the_table_of_few_images_has_means_and_ranges() -> None:
    names = ("bbox/AP50", "bbox/AP", "segm/AP50", "segm/AP")
    runs = [
        {"images": 10, "seed": seed, "side": "from scratch", **dict.fromkeys(names, value)}
        for seed, value in enumerate((0.1, 0.2, 0.6))
    ]
    cell = "0.300 (0.100 to 0.600)"
    assert few_images.table({"runs": runs}).splitlines()[2] == f"| 10 | from scratch | {' | '.join([cell] * 4)} |"


def test_sides_of_the_embedded_set_start_alike_and_have_their_block_after_c4(tmp_path: Path) -> None:
    models = {
        side: embedded.build(embedded.settings(side, seed=1, steps=300, data=tmp_path), side).eval()
        for side in embedded.SIDES
    }
    shared = models["none"].state_dict()
    for model in models.values():
        assert all(torch.equal(model.state_dict()[name], value) for name, value in shared.items())
    (added,) = {name for name, _ in models["latentgnn"].named_modules() if name.endswith(".latentgnn")}
    block = models["global context"].get_submodule(added)
    # One vector for all nodes of an image: here, ones.
    torch.nn.init.ones_(block.get_parameter("block.mlp_add.fc2.bias"))
    image = torch.rand(1, 3, 64, 128)
    with torch.no_grad():
        plain, shifted = (models[side].get_submodule("backbone.body")(image) for side in ("none", "global context"))
    assert torch.allclose(shifted[-2], plain[-2] + 1, atol=1e-5)


def test_a_training_on_the_embedded_set_that_cannot_be_is_told_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(embedded.main, ["--runs", str(tmp_path), "--steps", "2", "--threads", "1", "--out", str(tmp_path)]) == 1
    assert capsys.readouterr().err.startswith("error: schedule.warmup_steps: expected fewer than all 2 steps")


def test_the_table_of_the_embedded_set_has_a_row_a_side_and_its_seeds() -> None:
    runs = [{"side": "none", "seed": seed, **dict.fromkeys(embedded.FIGURES, 0.1 + seed)} for seed in (0, 2)]
    cells = " | ".join(["0.100, 2.100"] * 4)
    assert embedded.table(runs).splitlines()[2:] == [f"| none | 0, 2 | {cells} |"]


def test_large_scans_are_repeated_and_predicted_both_ways(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    laspy = pytest.importorskip("laspy")
    rng = np.random.default_rng(0)
    header = laspy.LasHeader(point_format=3, version="1.2")
    header.offsets, header.scales = [700_000, 6_000_000, 0], [0.01] * 3
    las = laspy.LasData(header)
    las.xyz = rng.random((300, 3)) * [20, 10, 2] + header.offsets
    las.intensity, las.return_number, las.number_of_returns = rng.integers(1, 5, (3, 300))
    (tmp_path / "tiles").mkdir()
    las.write(tmp_path / "tiles" / "a.laz")
    large_scans.write_repeated(tmp_path / "many.laz", [tmp_path / "tiles" / "a.laz"], 1000)
    many = laspy.read(tmp_path / "many.laz")
    assert len(many.points) == 1000
    moved = many.xyz[:900].reshape(3, 300, 3) - las.xyz
    # Each copy lies beside the others, as it was.
    assert np.ptp(moved, axis=1).max() < 1e-6
    assert len(np.unique(moved[:, 0].round(), axis=0)) == 3

    def in_this_process(module: str, arguments: list[str]) -> dict[str, Any]:
        large_scans.main(arguments)
        result: dict[str, Any] = json.loads(capsys.readouterr().out.splitlines()[-1])
        return result

    monkeypatch.setattr(large_scans, "run_child", in_this_process)
    argv = [str(tmp_path / "tiles"), "--points", "1000", "--whole-up-to", "1000", "--tiles", "20", "--name", "x"]
    argv += ["--out", str(tmp_path)]
    assert run(large_scans.main, [*argv, "--scratch", str(tmp_path), "--data.overlap", "0"]) == 0
    (path,) = tmp_path.glob("large-scans-*-x.json")
    whole, tiled = json.loads(path.read_text())["rows"]
    assert (whole["read"], tiled["read"]) == ("whole", "by tiles")
    assert list(tiled["steps"]) == ["reading", "sorting", "segmenting", "writing"]
    assert tiled["peak"] >= tiled["peak_before"] > 0
    assert str(tmp_path) not in json.dumps(whole) + json.dumps(tiled)
    assert path.with_suffix(".md").read_text().count("| 1,000 |") == 2


def test_the_cost_of_a_recipes_blocks_is_that_of_the_layers_arithmetic(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(recipe_costs.main, ["--recipes", "camvid_small", "--out", str(tmp_path)]) == 0
    (file,) = tmp_path.glob("recipe-costs-*.json")
    sides = json.loads(file.read_text())["recipes"]["camvid_small"]
    model, program = recipe_costs.network("camvid_small", blocks=True)
    (block,) = (module for module in model.modules() if isinstance(module, LatentGNN))
    shapes: list[tuple[int, ...]] = []
    block.register_forward_pre_hook(lambda _, given: shapes.append(tuple(given[0].shape)))
    with torch.no_grad():
        program.network(**program.samples[0])
    expected = cost(block.config, shapes[0])
    more = {what: sides["with"][what] - sides["without"][what] for what in ("parameters", "operations")}
    assert more["parameters"] == expected.parameters
    assert more["operations"] == pytest.approx(expected.forward_operations, rel=0.05)
    assert f"{sides['with']['parameters']:,}" in capsys.readouterr().out
