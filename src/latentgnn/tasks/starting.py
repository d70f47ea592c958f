"""Starting a run from the weights that ``model.weights`` names, and what is printed and stored about it."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from torch import nn

from latentgnn.blocks import blocks_of
from latentgnn.configuration.settings import parse_config
from latentgnn.errors import UserError
from latentgnn.tasks.settings import task_of
from latentgnn.tasks.weights import Fit
from latentgnn.training.checkpoints import Checkpoint
from latentgnn.training.commands import trained_weights
from latentgnn.training.runs import RunFolder

SETTING = "model.weights"

Config = TypeVar("Config")


@dataclass(frozen=True, kw_only=True)
class Start:
    """What a model started from.

    Args:
        lines: lines for the user: what was loaded, left out and started untrained.
        trained: names of the parameters that were loaded whole, except those of blocks.
    """

    lines: tuple[str, ...]
    trained: frozenset[str]


def own_weights(path: Path, task: str, config_class: type[Config]) -> tuple[Checkpoint, Config]:
    """Return the weights of another run of a task, and its configuration.

    Args:
        path: its folder, a checkpoint or a saved model.
        task: name of the task.
        config_class: class of its configuration.

    Raises:
        UserError: if there is none, or it is of another task.
    """
    if not path.exists():
        raise UserError(f"{SETTING}: there is no run folder or checkpoint {path}")
    try:
        checkpoint = trained_weights(path)
    except UserError as error:
        raise UserError(f"{SETTING}: {error}") from error
    theirs = task_of(checkpoint.config, checkpoint.path)
    if theirs != task:
        raise UserError(f"{SETTING}: {checkpoint.path} is of task {theirs!r}, but this run is of task {task!r}")
    try:
        return checkpoint, parse_config(config_class, checkpoint.config, recorded=True)
    except UserError as error:
        raise UserError(f"{SETTING}: {checkpoint.path}: {error}") from error


def shown_setting(value: object) -> str:
    """Return the value of a setting as text, with a list as in YAML."""
    return str(list(value)) if isinstance(value, tuple) else str(value)


def taken_parameters(model: nn.Module, fit: Fit) -> frozenset[str]:
    """Return the names of a model's parameters that were loaded whole, except those of blocks."""
    in_blocks = tuple(f"{name}." for name in blocks_of(model))
    learning = {name for name, _ in model.named_parameters() if not name.startswith(in_blocks)}
    return frozenset(learning & set(fit.taken))


def begun_trained(run: RunFolder, start: Callable[[], Start], *, goes_on: bool) -> frozenset[str]:
    """Let a model start from other weights; return the names of the parameters that started trained.

    Args:
        run: run folder, which stores what the model started from.
        start: loads the weights.
        goes_on: whether the run is resumed, with its own weights.
    """
    if goes_on and (kept := run.trained_at_start()) is not None:
        return kept
    started = start()
    if run.writes:
        print("\n".join(started.lines))
    run.write_start(started.lines, started.trained)
    return started.trained
