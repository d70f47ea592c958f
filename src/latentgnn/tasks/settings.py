"""The tasks, each a folder beside this file, and what each says of its settings: `SETTINGS` in its ``config.py``."""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any, Literal

from latentgnn.errors import UserError

TASKS = tuple(sorted(path.parent.name for path in Path(__file__).parent.glob("*/task.py")))
"""The names of their folders."""

Used = Literal["checked", "converted", "diagnosed", "explained"]
"""Parts of a task's settings that a command may be content with."""


def _keeps_nothing(trained: Any, now: Any) -> dict[str, str]:
    return {}


@dataclass(frozen=True, kw_only=True)
class TaskSettings:
    """What is known of a task's settings without anything heavy; settings have their names, such as ``data.root``.

    Args:
        config: the class of a run's configuration.
        loader: the function in ``loading.py`` that makes a trained model of a configuration and a checkpoint.
        places: settings that say where something lies on the machine that trained; a model that is saved for others has
            them not.
        checked: those that the check of a set uses.
        explained: those that explaining a model uses.
        diagnosed: those that looking at a model on its validation set uses.
        converted: those that the conversion of a set uses, if there is one.
        free_when_trained: settings of a model that a trained one can be used with other values of; all others belong to
            its weights.
        without_effect_alone: settings that mean something only where another one is given, and that one.
        kept_by_runs: for the configurations of a trained run and of its use, settings besides the model's that stay the
            run's own, and why.
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
    """Those of a task."""
    settings: TaskSettings = import_module(f"latentgnn.tasks.{task}.config").SETTINGS
    return settings


def task_of(values: Mapping[str, Any], source: Path | str) -> str:
    """The task of a configuration, which in the first versions had none to say.

    Args:
        values: the configuration, as plain data.
        source: where it comes from, for the error.

    Raises:
        UserError: there is no such task.
    """
    name = values.get("task", "detection")
    if not isinstance(name, str) or name not in TASKS:
        raise UserError(f"{source}: there is no task {name!r}; tasks: {', '.join(TASKS)}")
    return name
