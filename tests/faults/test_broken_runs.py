"""Real runs of both tasks are broken, ten kills in all and each other kind of fault once; `break_runs` does more."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.faults import judging
from tests.faults.rounds import EXPECTED

ROOT = Path(__file__).resolve().parents[2]


def break_runs(out: Path, *argv: str) -> dict[str, dict[str, int]]:
    """What came of each kind of fault; nothing went wrong."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.faults.break_runs", *argv, "--out", str(out)],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads(out.with_suffix(".json").read_text())
    assert report["problems"] == []
    assert report["runs"] == report["runs that ended as the uninterrupted one"] > 0
    kinds: dict[str, dict[str, int]] = report["kinds"]
    return kinds


def test_killed_runs_of_both_tasks(tmp_path: Path) -> None:
    kinds = break_runs(tmp_path / "report", "--kills", "10", "--others", "0", "--of-two", "0")
    assert set(kinds) == {"killed at a random moment", "killed in the writing of a file"}
    assert sum(kind["happened"] for kind in kinds.values()) >= 10


def test_runs_with_faults_of_every_other_kind(tmp_path: Path) -> None:
    kinds = break_runs(tmp_path / "report", "--tasks", "pointcloud", "--kills", "0", "--others", "1", "--of-two", "0")
    assert set(kinds) >= {
        "asked to stop in a step",
        "asked to stop at a random moment",
        "file too large",
        "checkpoint cut short",
        "a bit of the checkpoint flipped",
        "data replaced",
        "data vanished",
        "not numbers in the data",
        "out of memory",
    }
    # That moment may be after the end.
    assert all(kind["happened"] for name, kind in kinds.items() if name != "asked to stop at a random moment")


@pytest.mark.slow
@pytest.mark.parametrize("task", ["detection", "pointcloud"])
def test_a_process_of_two_that_is_lost(tmp_path: Path, task: str) -> None:
    kinds = break_runs(tmp_path / "report", "--tasks", task, "--kills", "0", "--others", "0", "--of-two", "1")
    assert kinds["a process of two killed"]["happened"] == 1


def test_the_page_shows_what_is_told() -> None:
    page = " ".join((ROOT / "docs" / "faults.md").read_text().replace("\n> ", " ").split())
    texts = [text for _, texts in EXPECTED.values() for text in texts]
    assert [text for text in texts if text not in page] == []


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A folder like a run's."""
    run = tmp_path / "run"
    (run / "checkpoints").mkdir(parents=True)
    content = {"latentgnn": {"step": 4}, "state_dict": {"weight": torch.arange(1000.0)}, "optimizer": {"state": {}}}
    torch.save(content, run / "checkpoints" / "last.ckpt")
    torch.save({**content, "latentgnn": {"step": 2}}, run / "checkpoints" / "previous.ckpt")
    (run / "metrics.json").write_text('{"step": 4}\n')
    (run / "metrics.csv").write_text("step,loss\n2,0.5\n4,0.25\n")
    (run / "config.yaml").write_text("training: {steps: 4}\ndata: {root: here}\n")
    return run


@pytest.mark.parametrize("name", ["checkpoints/last.ckpt", "metrics.json", "metrics.csv", "config.yaml"])
def test_partial_files_are_seen(run: Path, name: str) -> None:
    assert judging.partial_files(run) == []
    data = (run / name).read_bytes()
    (run / f".{Path(name).name}.1234-5.tmp").write_bytes(data[:3])
    assert judging.partial_files(run) == []
    (run / name).write_bytes(data[: len(data) * 2 // 3])
    assert [problem.split(" is not whole")[0] for problem in judging.partial_files(run)] == [name]


def test_the_newest_sound_checkpoint(run: Path) -> None:
    assert judging.newest_step(run) == 4
    assert judging.newest_step(run, damaged="last.ckpt") == 2
    last = run / "checkpoints" / "last.ckpt"
    data = bytearray(last.read_bytes())
    data[data.index(torch.arange(1000.0).numpy().tobytes()) + 40] ^= 1
    last.write_bytes(data)
    assert judging.newest_step(run) == 2


def test_what_is_of_another_kind_at_the_end_is_seen(run: Path) -> None:
    expected = judging.final_state(run)
    assert judging.differences(expected, judging.final_state(run)) == []
    content = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)
    content["state_dict"]["weight"][7] = content["state_dict"]["weight"][7].nextafter(torch.tensor(8.0))
    torch.save(content, run / "checkpoints" / "last.ckpt")
    (run / "metrics.json").unlink()
    (run / "scores.json").write_text("{}")
    assert judging.differences(expected, judging.final_state(run)) == [
        "metrics.json is missing at the end",
        "scores.json is left at the end",
        "checkpoints/last.ckpt is another at the end",
    ]


def test_what_is_touched_is_seen(tmp_path: Path) -> None:
    for name in ("same", "written", "dated", "removed"):
        (tmp_path / name).write_text(name)
    before = judging.snapshot(tmp_path)
    assert judging.touched(before, judging.snapshot(tmp_path)) == []
    (tmp_path / "written").write_text("else")
    os.utime(tmp_path / "dated", ns=(0, 0))
    (tmp_path / "removed").unlink()
    (tmp_path / "added").touch()
    names = [problem.split()[0] for problem in judging.touched(before, judging.snapshot(tmp_path))]
    assert names == ["added", "dated", "removed", "written"]
