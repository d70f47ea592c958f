"""The benchmark's programs: their options, what they refuse, what they write. No test here looks at a time."""

import json
import os
import subprocess
import sys
from collections.abc import Mapping
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
    large_scans,
    layer,
    options,
    pair,
    points,
    recipe_costs,
    report,
    shapes,
    sweeps,
)
from benchmarks.floors import Rates
from benchmarks.shapes import Case, Shape
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
    monkeypatch.setattr(pair, "SHAPES", TINY)
    monkeypatch.setattr(layer, "SHAPES", TINY)
    monkeypatch.setattr(layer, "run_child", in_process)


def in_process(module: str, arguments: list[str]) -> dict[str, Any]:
    assert module == "benchmarks.pair"
    text = dict(zip(arguments[::2], arguments[1::2], strict=True))
    case = Case(*(text[f"--{key}"] for key in ("shape", "norm", "mode", "layout", "device", "dtype")))
    first, second = text["--sides"].split(",")
    return compare(case, (first, second), rounds=int(text["--rounds"]))


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


@pytest.mark.usefixtures("tiny")
def test_the_table_is_written_and_printed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    # Times of tiny inputs say nothing.
    monkeypatch.setattr(report, "LITERAL_MARGIN", 1e9)
    argv = ["--shapes", "tiny", "--norms", "batch,layer", "--peers", "published,attention", "--rounds", "1"]
    assert layer.main([*argv, "--processes", "2", "--layouts", "all", "--out", str(tmp_path)]) == 0
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

    def slow(module: str, arguments: list[str]) -> dict[str, Any]:
        asked.append(arguments[arguments.index("--sides") + 1])
        return ratios(forward, step)

    monkeypatch.setattr(layer, "run_child", slow)
    assert layer.main(["--shapes", "tiny", "--norms", "frozen", "--out", str(tmp_path)]) == 0
    assert asked == ["published,reference"] * layer.LITERAL_ATTEMPTS
    (path,) = tmp_path.glob("*.json")
    (pair,) = json.loads(path.read_text())["pairs"]
    assert "times as long as `reference`" in pair["refused"]
    assert "forward_ratio" not in pair
    assert json.loads(path.read_text())["means"] == []


def test_a_literal_peer_may_be_a_little_slower() -> None:
    report.check_literal("tiny", ratios(0.95, 1.5))


def test_once_slow_may_be_chance(monkeypatch: pytest.MonkeyPatch) -> None:
    answers = iter([ratios(0.5, 0.5), ratios(1.0, 1.2)])
    monkeypatch.setattr(layer, "run_child", lambda module, arguments: next(answers))
    assert layer.literal_ratios(Case("C3"), rounds=1, threads=None) == ratios(1.0, 1.2)


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
    assert sweeps.main(["--most", "100000", "--out", str(tmp_path)]) == 0
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


def test_the_gpu_plan_covers_every_form() -> None:
    plan = gpu.plan(out=Path("results"))
    assert plan[0].arguments[:2] == ("-m", "pytest")
    tables = [step for step in plan if "benchmarks.layer" in step.arguments]
    forms = {
        (
            step.arguments[step.arguments.index("--dtype") + 1],
            step.arguments[step.arguments.index("--first") + 1],
            step.triton,
        )
        for step in tables
    }
    assert len(forms) == len(tables) == 8
    assert {dtype for dtype, _, _ in forms} == {"float32", "bfloat16"}
    assert sum("benchmarks.detector" in step.arguments for step in plan) == 4
    assert all("--device" in step.arguments for step in plan[1:])
    assert [step.arguments[1] for step in gpu.plan(["detector"])] == ["benchmarks.detector"] * 4


def test_the_gpu_plans_commands_can_be_read(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    # Each is taken by its program, which then finds no GPU.
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    programs = {"benchmarks.layer": layer.main, "benchmarks.detector": detector.main}
    for step in gpu.plan(["layer", "detector"]):
        assert programs[step.arguments[1]](step.arguments[2:]) == 1
        assert "no CUDA device" in capsys.readouterr().err


def test_the_gpu_script_prints_its_plan() -> None:
    script = child.ROOT / "benchmarks" / "gpu"
    done = subprocess.run(
        [script, "--dry-run", "--only", "layer,detector", "--shapes", "C3,C4", "--norms", "frozen"],
        env={**os.environ, "PYTHON": sys.executable},
        capture_output=True,
        text=True,
        check=True,
    )
    lines = done.stdout.splitlines()
    assert len(lines) == 12
    assert all("--shapes C3,C4 --norms frozen" in line for line in lines if "benchmarks.layer" in line)
    assert sum(line.startswith("LATENTGNN_TRITON=1 python -m") for line in lines) == 6


def test_the_gpu_script_without_a_gpu(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(gpu, "run", lambda step: pytest.fail("nothing may run"))
    assert gpu.main([]) == 1
    assert "--dry-run prints what would be run" in capsys.readouterr().err


def test_the_gpu_script_runs_to_its_end(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    ran: list[gpu.Step] = []

    def run(step: gpu.Step) -> int:
        ran.append(step)
        return int(len(ran) == 1)

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(gpu, "run", run)
    assert gpu.main(["--only", "tests,detector"]) == 1
    assert len(ran) == 5
    assert capsys.readouterr().err.count("failed: LATENTGNN_TRITON=0 python -m pytest") == 1


def test_the_header_says_what_it_was_made_with() -> None:
    head = options.header("benchmarks.layer", ["--peers", "latent queries"], device="cpu", dtype="float32", threads=3)
    assert head["command"] == "python -m benchmarks.layer --peers 'latent queries'"
    assert head["processor"] == processor_name()
    assert head["threads"] == 3
    assert head["torch"] == torch.__version__


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
    assert embedded.main(["--runs", str(tmp_path), "--steps", "2", "--threads", "1", "--out", str(tmp_path)]) == 1
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
    monkeypatch.setattr(large_scans, "RESULTS", tmp_path)
    argv = [str(tmp_path / "tiles"), "--points", "1000", "--whole-up-to", "1000", "--tiles", "20", "--name", "x"]
    assert large_scans.main([*argv, "--scratch", str(tmp_path), "--data.overlap", "0"]) == 0
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
    assert recipe_costs.main(["--recipes", "camvid_small", "--out", str(tmp_path)]) == 0
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
