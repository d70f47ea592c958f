"""Runs on two machines, which are two processes here: copies or parts of the model, and other numbers of processes."""

import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from sharded_program import STEPS, model, train
from training_toy import ToyTask, state_of

from latentgnn.errors import UserError
from latentgnn.training.runs import RunFolder

PROGRAM = Path(__file__).with_name("sharded_program.py")
LAUNCHED = ("LOCAL_RANK", "NODE_RANK", "RANK", "WORLD_SIZE")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    train(folder / "from-one", stop_after=2, accumulate=2)
    train(folder / "one", accumulate=2)
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = str(server.getsockname()[1])
    keep = {name: value for name, value in os.environ.items() if name not in LAUNCHED}
    started = [
        subprocess.Popen(
            [sys.executable, str(PROGRAM), str(folder)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**keep, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "NODE_RANK": rank, "OMP_NUM_THREADS": "1"},
        )
        for rank in "01"
    ]
    try:
        told = [process.communicate(timeout=120) for process in started]
    finally:
        for process in started:
            process.kill()
    assert [process.returncode for process in started] == [0, 0], told
    return folder


def compare(found: Path, expected: Path, *, statistics: bool = True) -> None:
    """Weights and optimizer states of two runs, which differ by the order of sums alone."""
    states = [state_of(RunFolder.open(path)) for path in (found, expected)]
    weights, others = (state["weights"] for state in states)
    assert weights.keys() == others.keys()
    for name, value in others.items():
        if statistics or not re.search("running|batches", name):
            torch.testing.assert_close(
                weights[name], value, rtol=1e-5, atol=1e-6, msg=lambda m, name=name: f"{name} {m}"
            )
    for key, state in states[1]["optimizer"].items():
        for name, value in state.items():
            assert type(states[0]["optimizer"][key][name]) is type(value)
            torch.testing.assert_close(states[0]["optimizer"][key][name], value, rtol=1e-4, atol=1e-6)


def figures(run: Path) -> list[dict[str, float]]:
    return [record["metrics"] for record in RunFolder.open(run).validations()]


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        ("parts", "copies"),
        ("recomputed", "copies-adamw"),
        ("parts-then-copies", "copies"),
        ("copies-then-parts", "copies"),
    ],
)
def test_parts_of_a_model_are_trained_as_copies_of_it(found: str, expected: str, root: Path) -> None:
    """And leave checkpoints of the same form, which either goes on from."""
    compare(root / found, root / expected)
    assert torch.load(root / found / "checkpoints" / "last.ckpt", weights_only=True)["latentgnn"]["step"] == STEPS
    mine, theirs = (figures(root / name)[-1] for name in (found, expected))
    assert mine == pytest.approx(theirs, rel=1e-5)
    assert mine["count"] == 7


def test_two_processes_validate_what_the_checkpoint_holds(root: Path) -> None:
    """Each has running statistics of its own, and those of the first are kept: figures are of these."""
    task = ToyTask(model=model, noise=False)
    task.model.load_state_dict(
        torch.load(root / "parts" / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
    )
    task.model.eval()
    with torch.no_grad():
        samples = [task.collate([task.validation_set[index]]) for index in range(7)]
        score = task.score([result for batch in samples for result in task.predict(batch)])["score"]
    assert figures(root / "parts")[-1]["score"] == pytest.approx(score, rel=1e-6)


def test_two_processes_are_one_with_two_parts(root: Path) -> None:
    """Running statistics aside, which are those of the parts that a process sees."""
    compare(root / "copies", root / "one", statistics=False)


def test_a_run_of_one_process_goes_on_on_two_and_the_other_way_round(
    root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train(root / "to-be-one", resume=True, accumulate=2)
    told = (
        "resuming with the batch split 1 process x 2 parts instead of 2 x 1: the order of samples does not change, and"
    )
    assert told in capsys.readouterr().out
    compare(root / "to-be-one", root / "one", statistics=False)
    compare(root / "from-one", root / "one", statistics=False)


def test_another_batch_is_refused_and_other_parts_are_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train(tmp_path, stop_after=2, accumulate=2)
    with pytest.raises(UserError, match=r"training.batch_size was 4, is 2.*--training.accumulate splits it into more"):
        train(tmp_path, resume=True, batch_size=2)
    train(tmp_path, resume=True)
    told = "random numbers, batch norm and losses averaged within a part differ; --training.accumulate 2 splits it"
    assert told in capsys.readouterr().out
