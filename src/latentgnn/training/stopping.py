"""Ctrl-C and termination signals stop a run after the current step, not in the middle of it."""

import signal
import threading
from types import FrameType, TracebackType
from typing import Any

from latentgnn.errors import UserError

# SIGINT: Ctrl-C. SIGTERM: `kill`, batch systems, shutdown. SIGHUP: the terminal is gone. SIGQUIT: Ctrl-\. SIGUSR1: sent
# by batch systems some time before the end, such as with Slurm's `--signal=USR1@120`. Not every system has all of them.
STOP_SIGNALS = tuple(
    getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGQUIT", "SIGUSR1") if hasattr(signal, name)
)


class TrainingStopped(UserError):
    """Training was asked to stop; its work so far is saved."""


class StopSignals:
    """Records `STOP_SIGNALS` instead of being interrupted by them; a second SIGINT interrupts immediately.

    In the middle of a step with accumulated parts, batch norm's running statistics have already changed, so the weights
    at that point are not those of any step of an uninterrupted run. Outside the main thread, where Python allows no
    handlers, nothing is changed. Signals that are ignored on purpose, as `nohup` ignores SIGHUP, stay ignored.

    Attributes:
        name: the first signal received; ``None`` before.
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
            # A handler that was not installed from Python is None, and cannot be restored.
            if handler is not None:
                signal.signal(number, handler)


def ignore_stop_signals() -> None:
    """In a data-loading process: ignore stop signals, and leave them to the process that it loads for.

    A terminal sends Ctrl-C, and a batch system its termination signal, to all processes of a run. If a worker ended
    then, the current step would fail.
    """
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
