"""Runs killed inside the writing of each file: no part of one has its name, and they resume as if nothing had been."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from kill_program import KILLS
from training_toy import ToyTask, config, new_run, same, state_of

from latentgnn.training.checkpoints import newest_checkpoint, read_checkpoint
from latentgnn.training.loop import fit
from latentgnn.training.runs import RunFolder

PROGRAM = Path(__file__).with_name("kill_program.py")
# The newest step that each run has kept.
STEPS = {
    **dict.fromkeys(("begun", "half written", "complete", "linked", "previous"), 3),
    **dict.fromkeys(("renamed", "best", "best renamed", "course", "validations"), 4),
    "first": 0,
    "the last step": 8,
    "metrics": 9,
}


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("killed")
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, str(PROGRAM), str(folder)], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    lines = [line for line in done.stdout.splitlines() if line.partition(":")[0] in KILLS]
    assert lines == [f"{name}: 9" for name in KILLS], done.stdout
    return folder


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[RunFolder, dict[str, float]]:
    run = new_run(tmp_path_factory.mktemp("whole"))
    return run, fit(ToyTask(), config(), run)


@pytest.mark.parametrize("name", KILLS)
def test_killed_run_resumes_to_the_uninterrupted_one(killed: Path, whole: Any, name: str) -> None:
    expected, expected_metrics = whole
    run = RunFolder.open(killed / name)
    for path in run.path.rglob("*.ckpt"):
        read_checkpoint(path)
    newest = newest_checkpoint(run.checkpoints)
    if name in STEPS:
        assert (newest.step if newest else 0) == STEPS[name]

    with run.held():
        assert list(run.path.rglob("*.tmp")) == []
        assert fit(ToyTask(), config(), run, resume=True) == expected_metrics
    assert same(state_of(run), state_of(expected))
    assert run.validations() == expected.validations()
    assert run.metrics() == expected.metrics()
    best, expected_best = (torch.load(each.checkpoint("best"), weights_only=True) for each in (run, expected))
    assert same(best["state_dict"], expected_best["state_dict"])
    steps = [line.partition(",")[0] for line in (run.path / "metrics.csv").read_text().splitlines()]
    assert steps == [line.partition(",")[0] for line in (expected.path / "metrics.csv").read_text().splitlines()]
