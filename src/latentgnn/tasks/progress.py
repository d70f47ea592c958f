"""A bar in a terminal for predictions that take long."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.progress import Progress


@contextmanager
def file_bar() -> Iterator[Callable[[str, int, int], None]]:
    """A bar in a terminal, over the parts of one file after the other: its name, the parts done, and all."""
    with Progress(transient=True, disable=not sys.stdout.isatty()) as progress:
        shown = ""

        def update(name: str, number: int, total: int) -> None:
            nonlocal shown
            if name != shown:
                # Anew, or the time left would be reckoned from the file before.
                for bar in progress.task_ids:
                    progress.remove_task(bar)
                progress.add_task(name, total=total)
                shown = name
            progress.update(progress.task_ids[0], completed=number)

        yield update
