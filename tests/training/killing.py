"""A process that is killed where it writes a file."""

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

from latentgnn.files import writing

PLACES = ("created", "half", "complete", "renamed")
"""Where in the writing of any file; for ``last.ckpt`` there are ``linked`` and ``previous`` also."""


def kill_in(name: str, number: int, place: str) -> None:
    """Have this process killed where a file is written, without a chance to clean up."""
    seen, here = 0, False

    def after(step: Callable[..., Any], its_place: str, wanted: Callable[..., bool] = lambda *arguments: True) -> Any:
        def wrapped(*arguments: Any) -> Any:
            result = step(*arguments)
            if here and place == its_place and wanted(*arguments):
                os.kill(os.getpid(), signal.SIGKILL)
            return result

        return wrapped

    create, complete = writing._create, writing._complete

    def counting_create(path: Path) -> Any:
        nonlocal seen, here
        seen += path.name.startswith(f".{name}.")
        here = path.name.startswith(f".{name}.") and seen == number
        return create(path)

    def half_complete(file: Any) -> None:
        if here and place == "half":
            file.flush()
            file.truncate(file.seek(0, os.SEEK_END) // 2)
            os.kill(os.getpid(), signal.SIGKILL)
        complete(file)

    writing._create = after(counting_create, "created")
    writing._complete = after(half_complete, "complete")
    writing._rename = after(writing._rename, "renamed")
    os.link = after(os.link, "linked")
    os.replace = after(os.replace, "previous", lambda source, target: Path(target).name == "previous.ckpt")
