"""Both tasks on two machines, which are two processes here: against one process."""

import json
import os
import shutil
import socket
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from latentgnn.cli import main
from tests.faults.jobs import STEPS, Job, make_job

PROGRAM = Path(__file__).with_name("machines_program.py")
TASKS = ("detection", "pointcloud")
LAUNCHED = ("LOCAL_RANK", "NODE_RANK", "RANK", "WORLD_SIZE", "LATENTGNN_RUN")


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port: int = server.getsockname()[1]
        return port


def environment(**more: str) -> dict[str, str]:
    keep = {name: value for name, value in os.environ.items() if name not in LAUNCHED}
    return {**keep, "OMP_NUM_THREADS": "1", **more}


@dataclass
class Both:
    """What two machines have done with a task.

    Args:
        job: data and recipe.
        folder: with ``run``, ``evaluation`` and ``found``.
        inputs: files to predict, one of them broken.
        told: what both have printed.
    """

    job: Job
    folder: Path
    inputs: Path
    told: tuple[str, str]


def commands(job: Job, folder: Path, inputs: Path, *parts: str) -> list[list[str]]:
    run = str(folder / "run")
    return [
        [*job.begin(Path(run)), *parts],
        ["evaluate", run, "--out", str(folder / "evaluation"), *parts[:2]],
        ["predict", run, str(inputs), "--out", str(folder / "found"), *parts[:2]],
    ]


def inputs_of(job: Job, folder: Path) -> Path:
    """Five files, of which the third cannot be read."""
    folder.mkdir()
    for number, file in enumerate(sorted([*job.training_files.iterdir(), *(job.user / "data" / "val").iterdir()])[:4]):
        shutil.copy(file, folder / f"{number if number < 2 else number + 1}{file.suffix}")
        (folder / f"2{file.suffix}").write_bytes(b"nothing of the kind")
    return folder


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Both]:
    """Each task trained, evaluated and applied by two machines of one process, with one start."""
    found: dict[str, Both] = {}
    argvs: list[list[str]] = []
    for task in TASKS:
        user = tmp_path_factory.mktemp(f"{task}-user")
        job = make_job(task, user)
        found[task] = Both(job, tmp_path_factory.mktemp(task), inputs_of(job, user / "inputs"), ("", ""))
        argvs += commands(job, found[task].folder, found[task].inputs, "--training.machines", "2")
    port = str(free_port())
    started = [
        subprocess.Popen(
            [sys.executable, str(PROGRAM), json.dumps(argvs)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment(MASTER_ADDR="127.0.0.1", MASTER_PORT=port, NODE_RANK=rank),
        )
        for rank in "01"
    ]
    try:
        told = [process.communicate(timeout=200) for process in started]
    finally:
        for process in started:
            process.kill()
    assert [process.returncode for process in started] == [0, 0], told
    first, other = told
    for task in TASKS:
        found[task].told = (first[0] + first[1], other[0] + other[1])
    # The broken file is the first machine's to tell; its exit code is the command's.
    assert [line for line in first[1].splitlines() if line.startswith("exit")] == ["exit 0", "exit 0", "exit 1"] * 2
    return found


@pytest.mark.parametrize("task", TASKS)
def test_two_machines_train_as_one(task: str, both: dict[str, Both], tmp_path: Path) -> None:
    """Two processes with a part each, and one process with two parts: the same but for rounding."""
    assert main([*both[task].job.begin(tmp_path / "run"), "--training.accumulate", "2"]) == 0
    kept = [
        torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)
        for run in (tmp_path / "run", both[task].folder / "run")
    ]
    assert [content["latentgnn"]["step"] for content in kept] == [STEPS, STEPS]
    total = largest = 0.0
    for name, value in kept[0]["state_dict"].items():
        # Batch norm's statistics of the whole course are those of the first process's parts.
        if "running" not in name and "num_batches" not in name:
            apart = float((kept[1]["state_dict"][name] - value).abs().max())
            # Adam's steps are as large as the rate, 0.001, where a gradient is nothing but rounding.
            assert apart < 5e-4, name
            total += apart
            largest += float(value.abs().max())
    assert total < 1e-4 * largest


@pytest.mark.parametrize("task", TASKS)
def test_two_machines_find_what_one_finds(
    task: str, both: dict[str, Both], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every file's result once, in the same order, with the same bytes; also beside a file that cannot be read."""
    capsys.readouterr()
    _, *use = commands(both[task].job, both[task].folder, both[task].inputs)
    one, two = tmp_path, both[task].folder
    for argv in use:
        argv[argv.index("--out") + 1] = str(one / Path(argv[argv.index("--out") + 1]).name)
    assert [main(argv) for argv in use] == [0, 1]
    told = capsys.readouterr().err
    assert "1 of 5" in told
    for kind in ("evaluation", "found"):
        files = {path.relative_to(one) for path in (one / kind).rglob("*") if path.is_file()}
        assert files == {path.relative_to(two) for path in (two / kind).rglob("*") if path.is_file()}
        assert len(files) > 2
        for file in files - {Path(kind) / ".latentgnn-results"}:
            assert (one / file).read_bytes() == (two / file).read_bytes(), file
    assert f"1 of 5 {'image' if task == 'detection' else 'scan'}s failed" in both[task].told[0]
    assert "of 5" not in both[task].told[1]
