"""Progress of long work: a bar on a terminal, if `rich` is installed; elsewhere lines, if requested."""

import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TypeVar

Item = TypeVar("Item")
Update = Callable[[str, int, int], None]
"""Called with the name of the current work, how much of it is done, and its total."""


def counted(items: Iterable[Item], title: str, *, total: int | None = None) -> Iterable[Item]:
    """Return the items unchanged, with a progress bar while they are iterated.

    Args:
        items: any items.
        title: text beside the bar.
        total: number of items; ``None`` takes their length, if they have one.
    """
    if not _has_bars():
        return items
    from rich.console import Console
    from rich.progress import track

    return track(items, title, total=total, console=Console(stderr=True), transient=True)


@contextmanager
def parts_done(*, lines: str | None = None) -> Iterator[Update]:
    """Give a function to call with the parts done, for one piece of work after another.

    Args:
        lines: what the parts are called in lines that are printed every ten seconds if there is no bar; ``None`` prints
            none.
    """
    if not _has_bars():
        yield (lambda title, done, total: None) if lines is None else _Lines(lines)
        return
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), transient=True) as progress:
        shown = ""

        def update(title: str, done: int, total: int) -> None:
            nonlocal shown
            if title != shown:
                # A new bar; otherwise the remaining time would be estimated from earlier work.
                for bar in progress.task_ids:
                    progress.remove_task(bar)
                progress.add_task(title, total=total)
                shown = title
            progress.update(progress.task_ids[0], completed=done)

        yield update


def _has_bars() -> bool:
    try:
        import rich.progress  # noqa: F401
    except ModuleNotFoundError:
        return False
    return sys.stderr.isatty()


class _Lines:
    def __init__(self, unit: str) -> None:
        self._unit, self._seconds = unit, 10.0
        self._title = ""
        self._began = self._told = time.monotonic()
        self._first = 0

    def __call__(self, title: str, done: int, total: int) -> None:
        now = time.monotonic()
        if title != self._title:
            self._title, self._began, self._first = title, now, done
        if now - self._told < self._seconds and done < total:
            return
        self._told, rate = now, (done - self._first) / max(now - self._began, 1e-9)
        left = f"  left {(total - done) / rate:.0f} s" if rate and done < total else ""
        print(f"{title} {done:,} of {total:,} {self._unit}{left}", flush=True)
