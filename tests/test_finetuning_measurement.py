"""The program that measures fine-tuning: what it would train, and what it makes of figures."""

import json
from pathlib import Path

import pytest

from benchmarks import finetuning, runs

FIGURES = {"mIoU": 0.5, "OA": 0.8, "mAcc": 0.6, "IoU/ground": 0.9, "IoU/building": 0.1}


def finished(work: Path, name: str, **changes: float) -> None:
    (work / name).mkdir(parents=True)
    (work / name / "metrics.json").write_text(json.dumps({"metrics": {**FIGURES, **changes}}))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("train/b.laz", "train/a.laz", "train/c.laz", "train/notes.txt", "val/d.laz"):
        (tmp_path / "tiles" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "tiles" / name).touch()
    return tmp_path / "tiles"


def test_the_table_has_the_means_of_the_seeds(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    work, out = tmp_path / "work", tmp_path / "out"
    for seed, (scratch, tuned) in enumerate([(0.25, 0.5), (0.75, 1.0)]):
        finished(work, f"pretrained-{seed}")
        finished(work, f"from%20scratch-{seed}", mIoU=scratch)
        finished(work, f"fine-tuned-{seed}", mIoU=tuned, OA=0.25 + seed / 2)
    finetuning.main([str(folder), "--work", str(work), "--out", str(out), "--seeds", "0", "1"])
    shown = capsys.readouterr().out
    assert "| | mIoU (seeds 0, 1) | ground | building | accuracy |" in shown
    assert "| from scratch | 0.500 (0.250, 0.750) | 0.900 | 0.100 | 0.800 |" in shown
    assert "| fine-tuned | 0.750 (0.500, 1.000) | 0.900 | 0.100 | 0.500 |" in shown
    record = json.loads(out.with_suffix(".json").read_text())
    assert record["seeds"]["1"]["fine-tuned"]["mIoU"] == 1.0
    assert str(tmp_path) not in out.with_suffix(".json").read_text() + out.with_suffix(".md").read_text()


def test_the_sides_differ_in_where_they_start_alone(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[list[str]] = []

    def trained(arguments: list[str]) -> int:
        asked.append(arguments)
        run = Path(arguments[arguments.index("--out") + 1])
        finished(run.parent, run.name)
        return 0

    monkeypatch.setattr(runs, "latentgnn", trained)
    finetuning.main([str(folder), "--work", str(tmp_path / "work"), "--out", str(tmp_path / "out"), "--seeds", "5"])
    before, scratch, tuned = asked
    assert json.loads(before[before.index("--data.train") + 1]) == ["train/a.laz", "train/b.laz"]
    assert scratch[scratch.index("--data.train") + 1] == '["train/c.laz"]'
    at = tuned.index("--model.weights")
    assert tuned[at + 1] == before[before.index("--out") + 1]
    assert tuned[:at] == scratch[: scratch.index("--out")]
    assert all(options[options.index("--training.seed") + 1] == "5" for options in asked)
