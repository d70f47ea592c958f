"""The program that measures CamVid: what it would train, and what it makes of figures."""

import json
import shutil
from pathlib import Path

import pytest

from benchmarks import camvid, runs
from benchmarks.runs import run_folder
from latentgnn import load_run
from tests.tasks.made_runs import SEGMENTER, write_segmenter

FIGURES = {"mIoU": 0.5, "mAcc": 0.6, "OA": 0.8, "IoU/sky": 0.9, "IoU/pole": 0.1}


def test_the_table_pairs_the_seeds(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    work, out = tmp_path / "work", tmp_path / "out"
    made = {
        "latentgnn": write_segmenter(tmp_path / "with"),
        "no block": write_segmenter(tmp_path / "without", {**SEGMENTER, "model": {**SEGMENTER["model"], "blocks": {}}}),
    }
    for seed, values in ((0, (0.40, 0.43)), (1, (0.50, 0.52)), (2, (0.45, 0.46))):
        for side, mean in zip(("no block", "latentgnn"), values, strict=True):
            folder = shutil.copytree(made[side], run_folder(work, f"{side}-{seed}"))
            (folder / "test").mkdir()
            for place, figures in ((folder, FIGURES), (folder / "test", {**FIGURES, "mIoU": mean})):
                (place / "metrics.json").write_text(json.dumps({"metrics": figures}))
    camvid.main(["FOLDER", "--work", str(work), "--out", str(out), "--report", "--seeds", "0", "1", "2", "3"])
    shown = capsys.readouterr().out
    # Differences of 0.03, 0.02 and 0.01: a deviation of 0.01, and Student's 4.303 for two degrees of freedom.
    assert "| mIoU | 0.450 ± 0.050 | 0.470 ± 0.046 | +0.020 (-0.005 to +0.045) |" in shown
    assert "| pole | 0.100 ± 0.000 | 0.100 ± 0.000 | +0.000 (+0.000 to +0.000) |" in shown
    record = json.loads(out.with_suffix(".json").read_text())
    assert record["missing"] == ["no block seed 3", "latentgnn seed 3"]
    with_block, without = (record["runs"][side][0]["parameters"] for side in ("latentgnn", "no block"))
    block = load_run(made["latentgnn"]).model.get_submodule("backbone.network.layer3.latentgnn")
    assert with_block - without == sum(parameter.numel() for parameter in block.parameters()) > 0
    assert str(tmp_path) not in out.with_suffix(".json").read_text() + out.with_suffix(".md").read_text()


def test_the_sides_differ_in_the_block_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[list[str]] = []

    def done(arguments: list[str]) -> int:
        asked.append(arguments)
        folder = Path(arguments[arguments.index("--out") + 1])
        folder.mkdir(parents=True)
        (folder / "metrics.json").write_text(json.dumps({"metrics": FIGURES}))
        return 0

    monkeypatch.setattr(camvid, "latentgnn", done)
    monkeypatch.setattr(runs, "latentgnn", done)
    monkeypatch.setattr(camvid, "write_report", lambda *given: None)
    argv = ["data", "--work", str(tmp_path / "work"), "--out", str(tmp_path / "out"), "--seeds", "5"]
    camvid.main([*argv, "--training.steps", "7"])
    without, scored, with_block, scored_too = asked
    at = without.index("--model.blocks")
    assert without[at + 1] == "{}"
    left = [*without[:at], *without[at + 2 : -1]]
    assert left == with_block[:-1]
    assert left[left.index("--training.steps") + 1] == "7"
    for argv in (scored, scored_too):
        assert argv[argv.index("--data.val") + 1] == "test"
