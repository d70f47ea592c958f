"""The settings that a run's weights depend on, on which a run that continues it must agree."""

from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any

from latentgnn.configuration.settings import plain_data
from latentgnn.errors import UserError
from latentgnn.training.checkpoints import Checkpoint, check_weights
from latentgnn.training.config import TrainingConfig
from latentgnn.training.runs import RunFolder
from latentgnn.training.task import TrainingTask

# Fields of `TrainingConfig` that a resumed run may change, because the weights do not depend on them beyond rounding.
# The numbers of processes and of accumulated parts may change too; `changed_parts` reports it.
_FREE = (
    "accelerator",
    "accumulate",
    "activation_checkpointing",
    "checkpoint_every",
    "devices",
    "log_every",
    "logger",
    "machines",
    "monitor",
    "on_changed_data",
    "optimizer.reference_batch",
    "strategy",
    "validate_every",
    "workers",
)


def course_of(config: TrainingConfig, run: RunFolder, *, processes: int) -> dict[str, Any]:
    """Return all settings, and everything else that the weights depend on, by dotted name."""
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
    """Compare a run with the checkpoint that it resumes from.

    Args:
        checkpoint: the checkpoint.
        task: the task, with the model.
        run: the folder, for error messages.
        course: the run's current settings, from `course_of`.
        may_change: prefixes of dotted names that may differ.
        of_today: converts a configuration stored by an earlier version to this version, with all its settings.

    Raises:
        UserError: if a setting differs; the message names it.
    """
    free = ("processes", *may_change, *(f"training.{name}" for name in _FREE))
    absent = "(absent)"
    was = checkpoint.course
    if of_today is not None:
        was = dict(_flat(of_today(checkpoint.config)))
    differences = [
        f"{name} was {was.get(name, absent)!r}, is {course.get(name, absent)!r}"
        for name in dict.fromkeys((*course, *was))
        if was.get(name, absent) != course.get(name, absent)
        and not any(name == start or name.startswith(f"{start}.") for start in free)
    ]
    if differences:
        batch = course.get("training.batch_size") != was.get("training.batch_size")
        hint = (
            "; with another number of processes the total batch stays the same, and --training.accumulate splits it "
            "into more or fewer parts"
        )
        raise UserError(
            f"the run in {run.path} cannot be resumed with other settings: {'; '.join(differences)}. "
            f"Resume with the old settings, or start a new run{hint if batch else ''}"
        )
    check_weights(checkpoint.weights, task.model, str(checkpoint.path))


def batch_told(config: TrainingConfig, *, processes: int) -> list[str]:
    """Return lines that describe the run's batch and the batch that its learning rate is meant for."""
    size, rate, meant = config.batch_size, config.optimizer.learning_rate, config.optimizer.reference_batch
    each = size // (processes * config.accumulate)
    lines = [
        f"batch of {size} = {each} a process x {_counted(processes, 'process', 'processes')} x "
        f"{_counted(config.accumulate, 'part', 'parts')}; learning rate {rate:g} for the whole batch"
    ]
    if meant is not None and meant != size:
        lines.append(
            f"warning: the recipe's learning rate is meant for a batch of {meant}, and this run's is {size}; the rate "
            "is used as it is. In proportion it would be "
            f"--training.optimizer.learning_rate {rate * size / meant:.3g}, "
            f"with {meant / size:.3g} times the steps. If it is meant so: --training.optimizer.reference_batch {size}"
        )
    return lines


def changed_parts(checkpoint: Checkpoint, course: Mapping[str, Any]) -> str | None:
    """Return a notice that a resumed run splits its batch into another number of parts; ``None`` if it does not."""
    names = ("processes", "training.accumulate")
    before, parts_before = (checkpoint.course.get(name) for name in names)
    processes, parts = (course[name] for name in names)
    if (before, parts_before) == (processes, parts) or not (isinstance(before, int) and isinstance(parts_before, int)):
        return None
    told = (
        f"resuming with the batch split {_counted(processes, 'process', 'processes')} x "
        f"{_counted(parts, 'part', 'parts')} instead of {before} x {parts_before}: the order of samples does not change"
    )
    cut = before * parts_before
    if cut == processes * parts:
        return f"{told}, and weights differ by rounding alone; running statistics of batch norm are the first process's"
    same = f"; --training.accumulate {cut // processes} splits it as before" if cut % processes == 0 else ""
    return f"{told}; random numbers, batch norm and losses averaged within a part differ{same}"


def _counted(number: int, one: str, many: str) -> str:
    return f"{number} {one if number == 1 else many}"


def _flat(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in tree.items():
        if isinstance(value, dict) and value:
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value
