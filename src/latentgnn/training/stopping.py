"""Ctrl-C and the termination signal end a run after the current step, not in the middle of it."""

import signal
import threading
from types import FrameType, TracebackType
from typing import Any

from latentgnn.errors import UserError


class TrainingStopped(UserError):
    """Training was asked to stop, and what it had done is kept."""


class StopSignals:
    """Notes SIGINT and SIGTERM instead of being interrupted by them; a second SIGINT interrupts at once.

    A step in the middle of its accumulated parts has already changed batch norm's running statistics, so the weights
    at that point are not those of an uninterrupted run after any step. ``install`` is apart from ``with`` because
    Lightning sets handlers of its own in between, which would raise there. Outside the main thread, where Python
    allows no handlers, nothing is changed.
    """

    def __init__(self) -> None:
        self.name: str | None = None
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> "StopSignals":
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def install(self) -> None:
        """Begin to take note."""
        for number in self._before:
            signal.signal(number, self._note)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.name is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.name = signal.Signals(number).name

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            # A handler that was not set from Python is None, and cannot be set back.
            if handler is not None:
                signal.signal(number, handler)


def ignore_stop_signals(worker: int) -> None:
    """In a data-loading process: leave stops to the process that it loads for.

    A terminal sends Ctrl-C, and a batch system its termination signal, to all processes of a run. A worker that ended
    then would make the current step fail. Workers end with the process that they load for.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
