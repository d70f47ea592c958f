"""What the weights of a run depend on, and so what a run that continues it must agree on."""

from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any

from latentgnn.configuration.settings import plain_data
from latentgnn.errors import UserError
from latentgnn.training.checkpoints import Checkpoint, check_weights
from latentgnn.training.config import TrainingConfig
from latentgnn.training.runs import RunFolder
from latentgnn.training.task import TrainingTask

# What a resumed run may change of `TrainingConfig`, because no weight depends on it. ``devices`` and ``machines`` are
# compared as the number of processes.
_FREE = (
    "accelerator",
    "checkpoint_every",
    "devices",
    "log_every",
    "logger",
    "machines",
    "monitor",
    "on_changed_data",
    "validate_every",
    "workers",
)


def course_of(config: TrainingConfig, run: RunFolder, *, processes: int) -> dict[str, Any]:
    """All settings, and what else the weights depend on, under dotted names."""
    settings = {**plain_data(run.config), "training": plain_data(config)}
    return {**dict(_flat(settings)), "processes": processes}


def check_resumable(
    checkpoint: Checkpoint,
    task: TrainingTask,
    run: RunFolder,
    course: Mapping[str, Any],
    may_change: Collection[str],
    of_today: Callable[[dict[str, Any]], dict[str, Any]] | None = None,
) -> None:
    """Compare a run with the checkpoint that it goes on from.

    Args:
        checkpoint: what was.
        task: with the model.
        run: the folder, for the errors.
        course: what is, from `course_of`.
        may_change: dotted beginnings of names that may differ.
        of_today: turns a configuration that an earlier version kept into one of this version, with all its settings.

    Raises:
        UserError: naming what differs.
    """
    free = (*may_change, *(f"training.{name}" for name in _FREE))
    absent = "(absent)"
    was = checkpoint.course
    if of_today is not None:
        was = {**dict(_flat(of_today(checkpoint.config))), "processes": was.get("processes", absent)}
    differences = [
        f"{name} was {was.get(name, absent)!r}, is {course.get(name, absent)!r}"
        for name in dict.fromkeys((*course, *was))
        if was.get(name, absent) != course.get(name, absent)
        and not any(name == start or name.startswith(f"{start}.") for start in free)
    ]
    if differences:
        raise UserError(
            f"the run in {run.path} cannot be resumed with another course: {'; '.join(differences)}. "
            "Resume it as it was, or start a new run"
        )
    check_weights(checkpoint.weights, task.model, str(checkpoint.path))


def _flat(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in tree.items():
        if isinstance(value, dict) and value:
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value
