"""Ctrl-C and the signals that ask for an end stop a run after the current step, not in the middle of it."""

import signal
import threading
from types import FrameType, TracebackType
from typing import Any

from latentgnn.errors import UserError

# SIGINT: Ctrl-C. SIGTERM: `kill`, batch systems, shutdown. SIGHUP: the terminal is gone. SIGQUIT: Ctrl-\. SIGUSR1: what
# batch systems send some time before the end, such as Slurm's `--signal=USR1@120`. Not every system has all of them.
STOP_SIGNALS = tuple(
    getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGQUIT", "SIGUSR1") if hasattr(signal, name)
)


class TrainingStopped(UserError):
    """Training was asked to stop, and what it had done is kept."""


class StopSignals:
    """Notes `STOP_SIGNALS` instead of being interrupted by them; a second SIGINT interrupts at once.

    A step in the middle of its accumulated parts has already changed batch norm's running statistics, so the weights
    at that point are not those of an uninterrupted run after any step. Outside the main thread, where Python allows no
    handlers, nothing is changed; and what is ignored on purpose, as `nohup` ignores SIGHUP, stays ignored.

    Attributes:
        name: the signal that came first; ``None`` before.
    """

    def __init__(self) -> None:
        self.name: str | None = None
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> "StopSignals":
        if threading.current_thread() is threading.main_thread():
            for number in STOP_SIGNALS:
                if number == signal.SIGINT or signal.getsignal(number) is not signal.SIG_IGN:
                    self._before[number] = signal.signal(number, self._note)
        return self

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.name is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.name = self.name or signal.Signals(number).name

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            # A handler that was not set from Python is None, and cannot be set back.
            if handler is not None:
                signal.signal(number, handler)


def ignore_stop_signals() -> None:
    """In a data-loading process: leave stops to the process that it loads for.

    A terminal sends Ctrl-C, and a batch system its termination signal, to all processes of a run. A worker that ended
    then would make the current step fail.
    """
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
