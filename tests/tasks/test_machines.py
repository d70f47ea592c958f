"""All tasks on two machines, which are two processes here: against one process."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from latentgnn.cli import main
from tests.faults.jobs import STEPS, Job, make_job

PROGRAM = Path(__file__).with_name("machines_program.py")
TASKS = ("detection", "pointcloud")
# One of the tasks with the settings for large models.
HELD = {
    "detection": (),
    "pointcloud": ("--training.strategy", "fsdp", "--training.activation_checkpointing", "true"),
    "segmentation": (),
}
# What rounding makes of a segmenter's weights grows many times over at each step: they are compared early.
EARLY = 2
TAME = (
    *("--training.optimizer.learning_rate", "0.005"),
    *("--training.steps", str(EARLY), "--training.validate_every", "null"),
)
PARAMETERS = [*(pytest.param(task, marks=pytest.mark.slow) for task in ("detection", "segmentation")), "pointcloud"]
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
    for number, file in enumerate(sorted([*job.training_files.iterdir(), *job.validation_files.iterdir()])[:4]):
        shutil.copy(file, folder / f"{number if number < 2 else number + 1}{file.suffix}")
        (folder / f"2{file.suffix}").write_bytes(b"nothing of the kind")
    return folder


@pytest.fixture(scope="module", params=PARAMETERS)
def both(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Both:
    """A task trained, evaluated and applied by two machines of one process, with one start."""
    task = request.param
    user, folder = tmp_path_factory.mktemp(f"{task}-user"), tmp_path_factory.mktemp(task)
    job = make_job(task, user)
    inputs = inputs_of(job, user / "inputs")
    argvs = commands(job, folder, inputs, "--training.machines", "2", *HELD[task])
    if task == "segmentation":
        argvs.append([*job.begin(folder / "tame"), "--training.machines", "2", *TAME])
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
    # The broken file is the first machine's to tell; its exit code is the command's.
    assert [line for line in told[0][1].splitlines() if line.startswith("exit")] == [
        *("exit 0", "exit 0", "exit 1"),
        *["exit 0"] * len(argvs[3:]),
    ], told
    return Both(job, folder, inputs, (told[0][0] + told[0][1], told[1][0] + told[1][1]))


def test_two_machines_train_as_one(both: Both, tmp_path: Path) -> None:
    """Two processes with a part each, and one process with two parts: the same but for rounding."""
    tame = both.job.task == "segmentation"
    more = TAME if tame else ()
    assert main([*both.job.begin(tmp_path / "run"), "--training.accumulate", "2", *more]) == 0
    kept = [
        torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)
        for run in (tmp_path / "run", both.folder / ("tame" if tame else "run"))
    ]
    assert [content["latentgnn"]["step"] for content in kept] == [EARLY if tame else STEPS] * 2
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


def test_two_machines_find_what_one_finds(both: Both, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Every file's result once, in the same order, with the same bytes; also beside a file that cannot be read."""
    capsys.readouterr()
    _, *use = commands(both.job, both.folder, both.inputs)
    one, two = tmp_path, both.folder
    for argv in use:
        argv[argv.index("--out") + 1] = str(one / Path(argv[argv.index("--out") + 1]).name)
    assert [main(argv) for argv in use] == [0, 1]
    assert "1 of 5" in capsys.readouterr().err
    for kind in ("evaluation", "found"):
        files = {path.relative_to(one) for path in (one / kind).rglob("*") if path.is_file()}
        assert files == {path.relative_to(two) for path in (two / kind).rglob("*") if path.is_file()}
        assert len(files) > 2
        for file in files - {Path(kind) / ".latentgnn-results"}:
            assert (one / file).read_bytes() == (two / file).read_bytes(), file
    if both.job.task == "segmentation":
        # All of one class would be the same whatever the processes do.
        found = [np.unique(Image.open(path)).tolist() for path in sorted((one / "found" / "labels").iterdir())]
        assert len(found) == 4
        assert [3, 7] in found
    assert f"1 of 5 {'scan' if both.job.task == 'pointcloud' else 'image'}s failed" in both.told[0]
    assert "of 5" not in both.told[1]


def test_a_machine_has_to_know_the_others(
    both: Both, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("MASTER_ADDR", "MASTER_PORT", "NODE_RANK"):
        monkeypatch.delenv(name, raising=False)
    assert main([*both.job.begin(both.folder / "alone"), "--training.machines", "2"]) == 1
    told = capsys.readouterr().err
    assert "MASTER_ADDR, MASTER_PORT, NODE_RANK is not in the environment" in told
    assert "torchrun" in told


def torchrun(node: int, port: str, argv: list[str], told: Path) -> subprocess.Popen[bytes]:
    place = ["--nnodes", "2", "--node-rank", str(node), "--nproc-per-node", "1"]
    where = ["--master-addr", "127.0.0.1", "--master-port", port]
    with told.open("wb") as file:
        return subprocess.Popen(
            [sys.executable, "-m", "torch.distributed.run", *place, *where, "-m", "latentgnn", *argv],
            stdout=file,
            stderr=subprocess.STDOUT,
            env=environment(),
            start_new_session=True,
        )


def end(launcher: subprocess.Popen[bytes]) -> None:
    """A machine that loses its power: the launcher and what it has started."""
    with suppress(ProcessLookupError):
        os.killpg(launcher.pid, signal.SIGKILL)
    for process in Path("/proc").glob("[0-9]*"):
        # Workers are in sessions of their own.
        with suppress(OSError, ValueError, IndexError):
            if int((process / "stat").read_text().rpartition(")")[2].split()[1]) == launcher.pid:
                os.kill(int(process.name), signal.SIGKILL)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="finds processes in /proc")
@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("gone", [0, 1])
def test_torchrun_on_two_machines_one_of_which_is_lost(task: str, gone: int, tmp_path: Path) -> None:
    """The other ends within a minute and names it, and the run goes on on one."""
    (tmp_path / "user").mkdir()
    job, run, port = make_job(task, tmp_path / "user"), tmp_path / "run", str(free_port())
    argv = [*job.begin(run), "--training.steps", "2000", "--training.validate_every", "null"]
    told = [tmp_path / f"told{node}" for node in (0, 1)]
    launchers = [torchrun(node, port, argv, told[node]) for node in (0, 1)]
    try:
        deadline = time.monotonic() + 120
        while not (run / "checkpoints" / "last.ckpt").exists():
            assert time.monotonic() < deadline, [path.read_text() for path in told]
            time.sleep(0.1)
        # First the process that works, for its launcher would end it too.
        worker = int(subprocess.check_output(["pgrep", "-P", str(launchers[gone].pid)]).split()[0])
        os.kill(launchers[gone].pid, signal.SIGSTOP)
        os.kill(worker, signal.SIGKILL)
        launchers[gone].kill()
        assert launchers[1 - gone].wait(timeout=60) == 1
    finally:
        for launcher in launchers:
            end(launcher)
            launcher.wait()
    other = told[1 - gone].read_text()
    assert f"process {gone} of 2 (counted from 0), on {socket.gethostname()}, is gone" in other
    assert "last.ckpt is kept" in other
    # Two parts in one process: the same course. As many steps remain as a test has time for.
    step = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["latentgnn"]["step"]
    lines = []
    with subprocess.Popen(
        [sys.executable, "-m", "latentgnn", *job.resume(run), "--training.accumulate", "2"],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environment(),
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            lines.append(line)
            if line.startswith(f"step {step + 2}/"):
                process.terminate()
    assert process.returncode == 1
    shown = "".join(lines)
    assert "resuming with the batch split 1 process x 2 parts instead of 2 x 1" in shown
    assert "stopped by SIGTERM" in shown


@pytest.mark.slow
@pytest.mark.parametrize("task", TASKS)
def test_torchrun_shares_files_too(task: str, tmp_path: Path) -> None:
    """As it is started by hand; a setting that says otherwise is refused."""
    (tmp_path / "user").mkdir()
    job = make_job(task, tmp_path / "user")
    assert main(job.begin(tmp_path / "run")) == 0
    inputs = inputs_of(job, tmp_path / "inputs")
    use = ["predict", str(tmp_path / "run"), str(inputs), "--out"]
    assert main([*use, str(tmp_path / "one")]) == 1
    told = [tmp_path / f"told{node}" for node in (0, 1)]
    port = str(free_port())
    launchers = [torchrun(node, port, [*use, str(tmp_path / "two")], told[node]) for node in (0, 1)]
    codes = [launcher.wait(timeout=120) for launcher in launchers]
    assert codes[0] == 1, [path.read_text() for path in told]
    for file in (
        path for path in (tmp_path / "one").rglob("*") if path.is_file() and path.name != ".latentgnn-results"
    ):
        assert file.read_bytes() == (tmp_path / "two" / file.relative_to(tmp_path / "one")).read_bytes()
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "latentgnn"]
    refused = subprocess.run(
        [*launch, "evaluate", str(tmp_path / "run"), "--training.devices", "3"],
        capture_output=True,
        text=True,
        env=environment(),
        timeout=120,
    )
    assert "training.devices is 3, but torchrun started 2 processes on each of 1 machines" in refused.stderr
