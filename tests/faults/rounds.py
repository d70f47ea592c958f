"""Rounds: a run that meets one fault after the other, goes on after each, and is compared with one that met none."""

import os
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from tests.faults import judging
from tests.faults.inside import Fault
from tests.faults.jobs import STEPS, Job
from tests.faults.processes import Ended, Starter


@dataclass
class Met:
    """A fault that a run met.

    Args:
        kind: of the fault.
        happened: whether it did; a run may be at its end before.
        code: the exit code, or minus the signal.
        kept: the step of the newest sound checkpoint after it.
        file: in whose writing the process was killed, if in one.
    """

    kind: str
    happened: bool
    code: int | None
    kept: int
    file: str


@dataclass
class Round:
    """What came of one run.

    Args:
        task: its task.
        met: the faults, in their order.
        problems: all that should not be; empty where all is well.
    """

    task: str
    met: list[Met] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)


class Whole:
    """The run of a job that meets no fault.

    Args:
        job: what is run.
        folder: for the run.
        starter: starts it.
    """

    def __init__(self, job: Job, folder: Path, starter: Starter) -> None:
        self.job, self.folder, self.starter = job, folder, starter
        self._names = folder / "written.txt"
        folder.mkdir(parents=True)
        fault = Fault(kind="none", record=str(self._names))
        ended = starter.run(job.begin(folder / "run"), folder / "shown.txt", fault)
        if ended.code != 0:
            raise RuntimeError(f"the run without faults failed:\n{ended.shown}")
        self.seconds = ended.seconds

    @cached_property
    def state(self) -> dict[str, Any]:
        """Its final state."""
        return judging.final_state(self.folder / "run")

    @property
    def written(self) -> dict[str, int]:
        """How often it wrote each file, by the file's name."""
        names = self._names.read_text().splitlines()
        return {name: names.count(name) for name in dict.fromkeys(names)}


class Runner:
    """Takes the rounds of one job.

    Args:
        whole: the run to compare with.
        folder: for the rounds' folders; each is removed when all was well.
    """

    def __init__(self, whole: Whole, folder: Path) -> None:
        self._whole, self._folder, self._number = whole, folder, 0

    def take(self, faults: Sequence[Fault], *, own_data: bool = False, between: str = "") -> Round:
        """A run that meets faults.

        Args:
            faults: the first happens to the run, each further one to it when it goes on.
            own_data: the run makes the data for itself.
            between: what happens to the folder after the first fault; a name in `BETWEEN`.
        """
        self._number += 1
        place = self._folder / f"{self._whole.job.task}{self._number}"
        place.mkdir(parents=True)
        (place / "neighbour.txt").write_text("not of this run\n")
        one = _OneRun(self._whole, place, own_data=own_data)
        with _disk(place, faults[0].disk):
            one.go(faults, between)
        if not one.result.problems:
            shutil.rmtree(place)
        return one.result


class _OneRun:
    def __init__(self, whole: Whole, place: Path, *, own_data: bool) -> None:
        self._whole, self._job, self._place, self._run = whole, whole.job, place, place / "disk" / "run"
        self._own_data = own_data
        self._user = judging.snapshot(self._job.user)
        self._damaged = ""
        self.result = Round(self._job.task)

    def go(self, faults: Sequence[Fault], between: str) -> None:
        finished = False
        for number, fault in enumerate(faults):
            ended = self._start(fault)
            happened = self._judge(fault, ended)
            kept = judging.newest_step(self._run)
            self.result.met.append(Met(fault.kind, happened, ended.code, kept, fault.file))
            finished = ended.code == 0
            if finished:
                break
            if number == 0 and fault.disk:
                subprocess.run(["mount", "-o", "remount,size=4g", str(self._run.parent)], check=True)
            if number == 0 and between:
                BETWEEN[between](self)
        if not finished:
            ended = self._start(None)
            self._expect(ended.code == 0, f"the run did not go on to its end: {_end_of(ended)}")
            finished = ended.code == 0
        if finished:
            left = [path.name for path in self._run.rglob("*.tmp")]
            self._expect(not left, f"left at the end: {', '.join(left)}")
            self.result.problems += judging.differences(self._whole.state, judging.final_state(self._run))

    def _start(self, fault: Fault | None) -> Ended:
        """Begin, or go on, as the person would who sees the folder."""
        job, run = self._job, self._run
        begun = (run / "config.yaml").exists()
        newest = judging.newest_step(run, damaged=self._damaged) if begun else 0
        ended = self._whole.starter.run(
            job.resume(run) if begun else job.begin(run, own_data=self._own_data), self._place / "shown.txt", fault
        )
        told = f"continuing after step {newest} of {STEPS}" in ended.shown or "this run is finished" in ended.shown
        wrong = "continuing after step" in ended.shown and not told
        self._expect(not wrong, f"it did not go on after step {newest}: {_end_of(ended)}")
        # It has another name by now.
        self._damaged = ""
        # Where a process was killed, it may not have come so far.
        self._expect(told or not newest or ended.code != 0, f"nothing was told of step {newest}: {_end_of(ended)}")
        return ended

    def _judge(self, fault: Fault, ended: Ended) -> bool:
        """Whether the fault happened, after what may not be was noted."""
        for gone in self._job.training_files.parent.glob("*.gone"):
            # Put back what the fault took away.
            gone.rename(gone.with_suffix(""))
        self._expect(ended.code is not None, f"{fault.kind}: it did not end")
        self._expect(not ended.left, f"{fault.kind}: processes were left")
        self._expect("Traceback" not in ended.shown, f"{fault.kind}: a traceback: {_end_of(ended)}")
        self._expect("fault in latentgnn" not in ended.shown, f"{fault.kind}: called a fault of ours: {_end_of(ended)}")
        self.result.problems += judging.partial_files(self._run)
        self.result.problems += judging.touched(self._user, judging.snapshot(self._job.user))
        neighbour = (self._place / "neighbour.txt").read_text()
        self._expect(neighbour == "not of this run\n", "a file beside the run was touched")
        if ended.code == 0:
            return False
        self._expect(_is_expected(fault, ended), f"{fault.kind}: ended with {ended.code}: {_end_of(ended)}")
        return True

    def _expect(self, is_so: bool, otherwise: str) -> None:
        if not is_so:
            self.result.problems.append(otherwise)

    def _damage(self) -> Path:
        self._damaged = "last.ckpt"
        return self._run / "checkpoints" / self._damaged

    def cut(self) -> None:
        """The newest checkpoint is cut short."""
        path = self._damage()
        os.truncate(path, path.stat().st_size * 2 // 3)

    def flip(self) -> None:
        """A bit of the newest checkpoint is another."""
        path = self._damage()
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 16
        path.write_bytes(data)

    def replace_data(self) -> None:
        """A training file holds what another one does: it is refused, and goes on when it is put back."""
        first, second = sorted(self._job.training_files.iterdir())[:2]
        content, times = first.read_bytes(), (first.stat().st_atime_ns, first.stat().st_mtime_ns)
        first.write_bytes(second.read_bytes())
        try:
            ended = self._whole.starter.run(self._job.resume(self._run), self._place / "shown.txt")
        finally:
            first.write_bytes(content)
            os.utime(first, ns=times)
        told = "the data are not those that the run was stopped with" in ended.shown and first.name in ended.shown
        self._expect(ended.code == 1 and told, f"other data were not told: {_end_of(ended)}")


BETWEEN: dict[str, Callable[[Any], None]] = {
    "cut": _OneRun.cut,
    "flip": _OneRun.flip,
    "replace data": _OneRun.replace_data,
}

# Of each kind: the exit code that it ends with, and what is told then.
EXPECTED: dict[str, tuple[int, tuple[str, ...]]] = {
    "out of memory": (1, ("out of memory in step", "training.batch_size")),
    "not numbers in the data": (1, ("the loss is not finite in step", "for samples")),
    "data vanished": (1, ("train",)),
    "disk full": (1, ("no space left on device: free some space",)),
    "file too large": (1, ("the limit on the size of files is reached",)),
    "a process of two killed": (1, ("process 1 of 2 (counted from 0), on",)),
}


def _is_expected(fault: Fault, ended: Ended) -> bool:
    if fault.kind in EXPECTED:
        code, texts = EXPECTED[fault.kind]
        return ended.code == code and all(text in ended.shown for text in texts) and "latentgnn: " in ended.shown
    number = -getattr(signal, fault.signal)
    if fault.signal == "SIGKILL" or ended.code == number:
        # Other signals end a process at once where it does not train yet, or does no more.
        return ended.code == number
    return ended.code == 1 and ("stopped by SIG" in ended.shown or "interrupted" in ended.shown)


def _end_of(ended: Ended) -> str:
    return f"exit code {ended.code}, {' | '.join(ended.shown.strip().splitlines()[-6:])[-800:]}"


@contextmanager
def _disk(place: Path, size: int) -> Iterator[None]:
    """A folder ``disk``, on a file system of its own where a size is given."""
    disk = place / "disk"
    disk.mkdir()
    if not size:
        yield
        return
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(disk)], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", str(disk)], check=True)
