"""Commands as processes of their own, forked from one that has imported everything once.

That one does nothing else: PyTorch has threads once it has computed, and a fork of a process that has some cannot
compute.
"""

import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path

import torch

# Not used here, but by all commands.
import latentgnn.tasks.detection.commands
import latentgnn.tasks.pointcloud.commands  # noqa: F401
from latentgnn.cli import main
from latentgnn.training.stopping import STOP_SIGNALS
from tests.faults.inside import Fault

_LONGEST = 150  # seconds: a command that has not ended by then never will
_fork = multiprocessing.get_context("fork")


@dataclass(frozen=True)
class Ended:
    """How a command ended.

    Args:
        code: the exit code, or minus the signal; ``None`` where it did not end and was killed.
        shown: what it printed.
        seconds: that it took.
        left: whether processes of its were still there a minute after its end.
    """

    code: int | None
    shown: str
    seconds: float
    left: bool


class Starter:
    """The process that commands are forked from; to be made before anything is computed here."""

    def __init__(self) -> None:
        self._connection, other = _fork.Pipe()
        self._process = _fork.Process(target=_serve, args=(other,))
        self._process.start()
        other.close()

    def run(self, argv: Sequence[str], shown: Path, fault: Fault | None = None) -> Ended:
        """Run a command of latentgnn to its end, whatever that is.

        Args:
            argv: its arguments.
            shown: the file that takes what it prints.
            fault: what happens to it.
        """
        self._connection.send((list(argv), shown, fault or Fault(kind="none")))
        ended: Ended = self._connection.recv()
        return ended

    def close(self) -> None:
        """End the process."""
        self._connection.send(None)
        self._process.join()


def command(argv: list[str], fault: Fault) -> None:
    """Run a command to which something happens, and end this process."""
    torch.set_num_threads(1)
    # Whoever starts this program may ignore them, as `nohup` does, and the commands would keep that.
    for number in STOP_SIGNALS:
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
    fault.install()
    sys.exit(main(argv))


def _serve(connection: Connection) -> None:
    while (request := connection.recv()) is not None:
        connection.send(_run(*request))


def _run(argv: list[str], shown: Path, fault: Fault) -> Ended:
    process = _fork.Process(target=_child, args=(argv, shown, fault))
    start = time.monotonic()
    process.start()
    pid = process.pid
    assert pid is not None
    if fault.after is not None:
        process.join(fault.after)
        if process.is_alive():
            os.kill(pid, getattr(signal, fault.signal))
    process.join(_LONGEST)
    code, seconds = process.exitcode, time.monotonic() - start
    left = not _group_ends(pid, within=0 if code is None else 60)
    process.join()
    return Ended(code, shown.read_text() if shown.exists() else "", seconds, left)


def _child(argv: list[str], shown: Path, fault: Fault) -> None:
    """In the new process: leave the group of the one before, and run the command."""
    os.setsid()
    output = os.open(shown, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for stream in (1, 2):
        os.dup2(output, stream)
    # Fabric starts the processes for further devices by this program's command.
    sys.argv[1:] = ["child", fault.to_json(), *argv]
    command(argv, fault)


def _group_ends(group: int, *, within: float) -> bool:
    """Whether a group of processes is gone within some seconds; what is left of it then is killed.

    The other processes of a run end by themselves when theirs is gone.
    """
    deadline = time.monotonic() + within
    while True:
        try:
            os.killpg(group, 0)
        except ProcessLookupError:
            return True
        if time.monotonic() >= deadline:
            os.killpg(group, signal.SIGKILL)
            return False
        time.sleep(0.01)
