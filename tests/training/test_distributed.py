import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from training_toy import ToyTask, config, linear_model, new_run, same, state_of

from latentgnn.training.loop import fit
from latentgnn.training.runs import RunFolder

PROGRAM = Path(__file__).with_name("ddp_program.py")


def train(folder: Path, mode: str = "plain") -> subprocess.CompletedProcess[str]:
    # A fresh program: Fabric starts the other process by running the same command again.
    keep = {name: value for name, value in os.environ.items() if name not in ("LOCAL_RANK", "NODE_RANK", "WORLD_SIZE")}
    return subprocess.run(
        [sys.executable, "-W", "error", str(PROGRAM), str(folder), mode],
        capture_output=True,
        text=True,
        timeout=240,
        env={**keep, "OMP_NUM_THREADS": "1"},
    )


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> tuple[RunFolder, str]:
    """A run of two processes, and what they printed."""
    folder = tmp_path_factory.mktemp("two") / "run"
    done = train(folder)
    assert done.returncode == 0, done.stderr
    # torch's own remark, which no filter of Python's sees: whether a parameter takes part depends on the batch.
    assert [line for line in done.stderr.splitlines() if "find_unused_parameters=True was specified" not in line] == []
    return RunFolder.open(folder), done.stdout


def test_two_processes_train_as_one(tmp_path: Path, two: tuple[RunFolder, str]) -> None:
    fit(
        ToyTask(noise=False, model=linear_model),
        config(steps=6, accumulate=1, clip_norm=None),
        new_run(tmp_path / "one"),
    )
    weights = [state_of(run)["weights"] for run in (RunFolder.open(tmp_path / "one"), two[0])]
    for name, value in weights[0].items():
        torch.testing.assert_close(weights[1][name], value, rtol=1e-5, atol=1e-7)
    # Every process returns the metrics of all seven samples; the first alone scores.
    assert "'count': 7.0} from 2 scores" in two[1]
    assert two[1].count("got {") == 2
    assert "'count': 7.0} from 0 scores" in two[1]
    assert two[1].count("step 6/6  loss") == 1


def test_parameters_without_part_in_a_batch_and_a_stop_of_one_process(tmp_path: Path) -> None:
    done = train(tmp_path / "run", mode="unused")
    assert done.returncode == 1, done.stderr
    assert "stopped by SIGTERM after step 5 of 6" in done.stdout
    assert torch.load(RunFolder.open(tmp_path / "run").checkpoint("last"), weights_only=True)["latentgnn"]["step"] == 5


def test_one_process_with_a_non_finite_loss_stops_all(tmp_path: Path) -> None:
    done = train(tmp_path / "run", mode="nan")
    assert done.returncode != 0
    assert "the loss is not finite in step 5: square = nan for samples" in done.stderr
    assert torch.load(RunFolder.open(tmp_path / "run").checkpoint("last"), weights_only=True)["latentgnn"]["step"] == 4


@pytest.mark.parametrize(
    ("mode", "gone", "code"),
    [
        ("kill other", 1, 1),
        pytest.param(
            "kill first",
            0,
            -9,
            marks=pytest.mark.slow,
        ),
        # The first is where nothing tells it, and is ended.
        ("busy", 1, 1),
    ],
)
def test_the_other_process_ends_with_one_that_is_killed(
    mode: str, gone: int, code: int, tmp_path: Path, two: tuple[RunFolder, str]
) -> None:
    done = train(tmp_path, mode)
    assert done.returncode == code, done.stderr
    assert f"process {gone} of 2 (counted from 0), on {socket.gethostname()}, is gone" in done.stderr
    assert "Traceback" not in done.stderr
    assert "last.ckpt is kept, resume the run" in done.stderr
    assert torch.load(RunFolder.open(tmp_path).checkpoint("last"), weights_only=True)["latentgnn"]["step"] == 4
    if mode == "kill other":
        assert train(tmp_path).returncode == 0
        assert same(state_of(RunFolder.open(tmp_path)), state_of(two[0]))
