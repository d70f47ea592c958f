import errno
import fcntl
import json
import os
import platform
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from latentgnn.configuration.settings import plain_data
from latentgnn.errors import UserError
from latentgnn.training import commands
from latentgnn.training.config import TrainingConfig
from latentgnn.training.locks import LOCK, sole_use
from latentgnn.training.runs import RunFolder

HOLD = """
import os, sys, time
from pathlib import Path
from latentgnn.training.locks import sole_use
with sole_use(Path(sys.argv[1])):
    if sys.argv[2:] and not os.fork():
        time.sleep(60)  # as a loading process that outlives the one it was forked from
    print("held", flush=True)
    time.sleep(60)
"""


@contextmanager
def holder(folder: Path, *arguments: str) -> Iterator[subprocess.Popen[str]]:
    """Another process that has locked a folder; in a process group of its own, which is killed at the end."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(folder), *arguments], stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        yield process
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        assert process.stdout is not None
        process.stdout.close()


def test_a_second_process_is_refused_and_told_who_holds_it(tmp_path: Path) -> None:
    with holder(tmp_path) as process:
        expected = rf"is in use by process {process.pid} on {platform.node()} since \d{{4}}-\d\d-\d\d \d\d:\d\d:\d\d"
        for _ in range(2):
            with pytest.raises(UserError, match=expected), sole_use(tmp_path):
                pytest.fail("it was let in")
        # Whatever the file holds, the lock is the kernel's.
        for text in ("", "[" * 1000, '{"process": 1, "host": "a\\nb", "since": ""}', "{}"):
            (tmp_path / LOCK).write_text(text)
            with pytest.raises(UserError, match="is in use by another process: wait for it"), sole_use(tmp_path):
                pytest.fail("it was let in")
    with sole_use(tmp_path):
        assert json.loads((tmp_path / LOCK).read_text())["process"] == os.getpid()


def test_a_killed_process_leaves_no_lock_though_its_children_live(tmp_path: Path) -> None:
    with holder(tmp_path, "forks") as process:
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        os.killpg(process.pid, 0)  # the child is there
        with sole_use(tmp_path):
            pass


def test_this_process_is_kept_out_too_and_does_not_lose_the_lock_by_asking(tmp_path: Path) -> None:
    with sole_use(tmp_path):
        with pytest.raises(UserError, match="in use by this process already"), sole_use(tmp_path):
            pytest.fail("it was let in")
        asked = subprocess.run([sys.executable, "-c", HOLD, str(tmp_path)], capture_output=True, text=True)
        assert f"in use by process {os.getpid()} on" in asked.stderr
    with sole_use(tmp_path):
        pass


def test_a_folder_without_locks_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def unknown(descriptor: int, operation: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "lockf", unknown)
    with sole_use(tmp_path):
        assert "cannot be locked on its file system" in capsys.readouterr().out


def job() -> commands.Job[None]:
    def load(config: TrainingConfig, folder: Path, resume: bool) -> None:
        assert (folder / "config.yaml").is_file()

    return commands.Job(load=load, train=lambda config, run, data, resume: {"resumed": resume}, titles=dict.fromkeys)


@pytest.mark.parametrize("resume", [False, True])
def test_training_commands_hold_the_folder(tmp_path: Path, resume: bool) -> None:
    config = TrainingConfig()
    run = RunFolder.create(tmp_path / "run", task="toy")
    run.write_config(plain_data(config))
    before = sorted(run.path.iterdir())
    with holder(run.path) as process:
        with pytest.raises(UserError, match=f"in use by process {process.pid} on"):
            commands.train(job(), config, run.path, name="toy", resume=resume)
        assert sorted(set(run.path.iterdir()) - {run.path / LOCK}) == before
    # Between its making and its use, another process may have trained into it.
    assert commands.train(job(), config, run.path, name="toy", resume=resume) == {"resumed": resume}


def test_a_run_that_another_process_began_meanwhile_is_refused(tmp_path: Path) -> None:
    ours = RunFolder.create(tmp_path / "run", task="toy")
    theirs = RunFolder.create(tmp_path / "run", task="toy")
    with theirs.held():
        theirs.write_config({})
        theirs.write_metrics({})
    with pytest.raises(UserError, match="holds a run already"), ours.held():
        pytest.fail("it was let in")
