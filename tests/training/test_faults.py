import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from training_toy import ToyTask, config, new_run

from latentgnn.errors import UserError
from latentgnn.training.checkpoints import read_checkpoint
from latentgnn.training.loop import fit
from latentgnn.training.runs import RunFolder

PROGRAM = Path(__file__).with_name("fault_program.py")


def start(folder: Path, mode: str, **streams: Any) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, str(PROGRAM), str(folder), mode], text=True, start_new_session=True, **streams
    )


def is_running(process: int) -> bool:
    """A process that has ended but was not waited for counts as ended."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="needs /proc")
def test_loading_processes_end_with_a_run_that_is_killed(tmp_path: Path) -> None:
    with start(tmp_path, "kill", stdout=subprocess.PIPE) as process:
        # Comes back when none of its processes can print any more.
        shown, _ = process.communicate(timeout=120)
    assert process.returncode == -signal.SIGKILL
    workers = [int(number) for number in shown.splitlines()[-1].split()]
    assert len(workers) == 2
    # Their outputs are closed a moment before they have ended.
    deadline = time.monotonic() + 60
    while any(is_running(worker) for worker in workers) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not any(is_running(worker) for worker in workers)


def test_signals_to_all_processes_stop_after_the_step(tmp_path: Path) -> None:
    with start(tmp_path, "terminal", stdout=subprocess.DEVNULL, stderr=subprocess.PIPE) as process:
        _, errors = process.communicate(timeout=120)
    assert process.returncode == 1
    assert re.fullmatch(r"latentgnn: stopped by SIG(INT|TERM) after step 3 of 1000: .*last.ckpt is kept, .*\n", errors)
    assert read_checkpoint(RunFolder.open(tmp_path).checkpoint("last")).step == 3


def test_a_run_stops_in_order_when_its_terminal_is_gone(tmp_path: Path) -> None:
    own, others = os.openpty()
    with start(tmp_path, "hang-up", stdout=others, stderr=subprocess.DEVNULL) as process:
        os.close(others)
        shown = b""
        while b"ready" not in shown:
            shown += os.read(own, 1000)
        os.close(own)
        process.send_signal(signal.SIGUSR2)
        assert process.wait(timeout=120) == 1
    run = RunFolder.open(tmp_path)
    assert read_checkpoint(run.checkpoint("last")).step == 3
    assert "stopped by SIGHUP after step 3" in run.log.read_text().splitlines()[-1]


def torch_memory() -> None:
    torch.empty(2**44)


def numpy_memory() -> None:
    np.empty(2**47)


def gpu_memory() -> None:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 8.00 GiB.\nSee documentation for the rest.")


@pytest.mark.parametrize("ask", [torch_memory, numpy_memory, gpu_memory])
def test_out_of_memory_in_a_step_says_what_to_lower(tmp_path: Path, ask: Callable[[], None]) -> None:
    run = new_run(tmp_path)
    with pytest.raises(UserError, match="out of memory in step 5 on cpu") as raised:
        fit(ToyTask(on_losses=lambda call: ask() if call == 10 else None), config(), run)
    text = str(raised.value)
    assert "\n" not in text
    for setting in ("training.batch_size", "training.accumulate", "training.precision", "model.blocks"):
        assert setting in text
    assert read_checkpoint(run.checkpoint("last")).step == 4
    fit(ToyTask(), config(), run, resume=True)


def test_out_of_memory_in_a_validation(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="out of memory in the validation after step 4 on cpu"):
        fit(ToyTask(on_predict=torch_memory), config(), new_run(tmp_path))


class Samples:
    """Samples of the toy's, one of which asks for something."""

    def __init__(self, ask: Callable[[], Any]) -> None:
        self.ask = ask
        self.sound = ToyTask().training_set

    def __len__(self) -> int:
        return len(self.sound)

    def group_of(self, index: int) -> int:
        return self.sound.group_of(index)

    def __getitem__(self, key: tuple[int, int]) -> Any:
        if key[1] == 7:
            self.ask()
        return self.sound[key]


@pytest.mark.parametrize("workers", [0, 2])
def test_out_of_memory_in_loading(tmp_path: Path, workers: int) -> None:
    task = ToyTask()
    task.training_set = Samples(numpy_memory)  # type: ignore[assignment]
    with pytest.raises(UserError, match=r"out of memory in step \d .*training\.workers"):
        fit(task, config(workers=workers), new_run(tmp_path))


def test_a_loading_process_that_is_killed(tmp_path: Path) -> None:
    task = ToyTask()
    task.training_set = Samples(lambda: os.kill(os.getpid(), signal.SIGKILL))  # type: ignore[assignment]
    with pytest.raises(UserError, match=r"a loading process ended in step \d .*lower training\.workers"):
        fit(task, config(workers=1), new_run(tmp_path))


def test_errors_of_other_kinds_keep_their_traceback(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match=r"^sizes do not fit$"):
        fit(ToyTask(on_losses=lambda call: fail()), config(), new_run(tmp_path))


def fail() -> None:
    raise RuntimeError("sizes do not fit")
