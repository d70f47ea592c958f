"""What `test_killed_runs` runs: trainings of the toy task, each killed inside the writing of a file."""

import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from training_toy import ToyTask, config, new_run

from latentgnn import files
from latentgnn.training.loop import fit

# Of each run: its name; the file in whose writing it is killed, for which time; and where in it.
KILLS = {
    "begun": ("last.ckpt", 2, "created"),
    "half written": ("last.ckpt", 2, "half"),
    "complete": ("last.ckpt", 2, "complete"),
    "linked": ("last.ckpt", 2, "linked"),
    "previous": ("last.ckpt", 2, "previous"),
    "renamed": ("last.ckpt", 2, "renamed"),
    "first": ("last.ckpt", 1, "half"),
    "the last step": ("last.ckpt", 5, "half"),
    "best": ("best.ckpt", 1, "half"),
    "best renamed": ("best.ckpt", 1, "renamed"),
    "validations": ("validations.json", 1, "half"),
    "course": ("metrics.csv", 2, "half"),
    "metrics": ("metrics.json", 1, "complete"),
}


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

    create, complete = files._create, files._complete

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

    files._create = after(counting_create, "created")
    files._complete = after(half_complete, "complete")
    files._rename = after(files._rename, "renamed")
    os.link = after(os.link, "linked")
    os.replace = after(os.replace, "previous", lambda source, target: Path(target).name == "previous.ckpt")


if __name__ == "__main__":
    for run_name, kill in KILLS.items():
        child = os.fork()
        if not child:
            kill_in(*kill)
            fit(ToyTask(), config(), new_run(Path(sys.argv[1]) / run_name))
            os._exit(0)
        _, status = os.waitpid(child, 0)
        print(f"{run_name}: {os.WTERMSIG(status) if os.WIFSIGNALED(status) else 'not killed'}", flush=True)
