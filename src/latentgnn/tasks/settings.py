"""The tasks, each a folder beside this file, and information about their settings: `SETTINGS` in its ``config.py``."""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any, Literal

from latentgnn.errors import UserError

TASKS = tuple(sorted(path.parent.name for path in Path(__file__).parent.glob("*/task.py")))
"""The names of their folders, which are the names of the tasks."""

Used = Literal["checked", "converted", "diagnosed", "explained"]
"""Uses of a model or set for which a command needs only a part of a task's settings."""


def _keeps_nothing(trained: Any, now: Any) -> dict[str, str]:
    return {}


@dataclass(frozen=True, kw_only=True)
class TaskSettings:
    """Information about a task's settings without heavy imports; settings have names such as ``data.root``.

    Args:
        config: the class of a run's configuration.
        loader: name of the function in ``loading.py`` that makes a trained model from a configuration and a checkpoint.
        places: settings that are locations on the machine of the training; a model saved for others does not have them.
        checked: settings that the check of a set uses.
        explained: settings that explaining a model uses.
        diagnosed: settings that running a model on its validation set uses.
        converted: settings that the conversion of a set uses, if there is one.
        free_when_trained: model settings that may be changed when a trained model is used; all others belong to its
            weights.
        without_effect_alone: settings that only have an effect if another one is given, with that other one.
        kept_by_runs: given the configurations of a trained run and of its use, returns settings besides the model's
            that must stay as in the run, and why.
    """

    config: type
    loader: str
    places: Collection[str]
    checked: Collection[str]
    explained: Collection[str]
    diagnosed: Collection[str]
    converted: Collection[str] = ()
    free_when_trained: Collection[str] = frozenset()
    without_effect_alone: Mapping[str, str] = field(default_factory=dict)
    kept_by_runs: Callable[[Any, Any], dict[str, str]] = _keeps_nothing


def settings_of(task: str) -> TaskSettings:
    """Return the settings of a task."""
    settings: TaskSettings = import_module(f"latentgnn.tasks.{task}.config").SETTINGS
    return settings


def task_of(values: Mapping[str, Any], source: Path | str) -> str:
    """Return the task of a configuration; configurations of the first versions did not name one.

    Args:
        values: the configuration, as plain data.
        source: where it comes from, for the error.

    Raises:
        UserError: if there is no such task.
    """
    name = values.get("task", "detection")
    if not isinstance(name, str) or name not in TASKS:
        raise UserError(f"{source}: there is no task {name!r}; tasks: {', '.join(TASKS)}")
    return name
