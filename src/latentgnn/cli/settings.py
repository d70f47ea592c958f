"""Settings on the command line: finding their task, applying them to a recipe or a run, and their help."""

import argparse
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import reduce
from importlib import import_module
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from latentgnn.cli.parsing import Command, Overrides, UsageError
from latentgnn.configuration.recipes import load_recipe
from latentgnn.configuration.settings import Option, describe, nearest, options, parse_config, renamed
from latentgnn.errors import UserError, require
from latentgnn.tasks.settings import TASKS as TASK_NAMES
from latentgnn.tasks.settings import TaskSettings, Used, settings_of, task_of
from latentgnn.training.runs import recorded_config

if TYPE_CHECKING:
    from latentgnn.tasks.commands import Commands

DEFAULT_RECIPE = "context"


@dataclass(frozen=True)
class Task:
    """A task by name; its settings are light to import, its commands are not."""

    name: str

    @property
    def settings(self) -> TaskSettings:
        return settings_of(self.name)

    @property
    def commands(self) -> "Commands[Any, Any, Any]":
        commands: Commands[Any, Any, Any] = import_module(f"latentgnn.tasks.{self.name}.commands").COMMANDS
        return commands

    def options(self, used: Used | None = None) -> dict[str, Option]:
        """Return the settings that a command takes: all, or a part of them."""
        known = options(self.settings.config)
        return known if used is None else {name: known[name] for name in getattr(self.settings, used)}


TASKS = {name: Task(name) for name in TASK_NAMES}


def split(argv: Sequence[str], parser: argparse.ArgumentParser, command: Command) -> tuple[list[str], Overrides]:
    """Split a command line into the command's own arguments and settings; anything else is refused by name."""
    own = [text for action in parser._actions for text in action.option_strings]
    known = set().union(*(task.options(command.used) for task in TASKS.values())) if command.settings else set()
    rest: list[str] = []
    overrides: list[tuple[str, str]] = []
    # Arguments that argparse collects may be given several times.
    gathered = [
        text for action in parser._actions if isinstance(action.default, list) for text in action.option_strings
    ]
    given: set[str] = set()
    tokens = iter(argv)
    for token in tokens:
        if token == "--":
            rest += [token, *tokens]
            break
        option, equals, value = token.partition("=")
        if option.startswith("--") and option in given:
            raise UsageError(f"{option} is given twice")
        given |= {option} - {*gathered}
        if not option.startswith("--") or option in own:
            rest.append(token)
            continue
        if option[2:] not in known:
            task = _task_at_hand(argv, parser) if command.settings else None
            raise UsageError(_no_option(option[2:], own, task, command.used))
        if not equals:
            value = next(tokens, "--")
            if value.startswith("--"):
                raise UsageError(f"{option} needs a value: {describe(_setting(option[2:]).type)}")
        overrides.append((option[2:], value))
    return rest, overrides


def _no_option(name: str, own: Iterable[str], task: Task | None, used: Used | None) -> str:
    """A message about an option that a command does not have, with suggestions for the current task."""
    known = [text[2:] for text in own if text.startswith("--")]
    if task is not None:
        if now := renamed(task.settings.config).get(name):
            return f"there is no option --{name} any more: it is called --{now} now"
        if any(name in other.options() for other in TASKS.values()):
            return f"--{name} is a setting that this command does not use: leave it out"
        known += task.options(used)
    return f"there is no option --{name}{_nearest_options(name, known)}"


def _nearest_options(name: str, known: Iterable[str]) -> str:
    return nearest(name, known).replace(" or ", " or --").replace("did you mean ", "did you mean --")


def _task_at_hand(argv: Sequence[str], parser: argparse.ArgumentParser) -> Task | None:
    """The task of the recipe, run or checkpoint on a command line, before all of it is parsed.

    ``None`` if it cannot be read; this is reported after the options have been checked.
    """
    named = {"--config": DEFAULT_RECIPE} if "--config" in parser._option_string_actions else {}
    takes_model = any(action.dest == "model" for action in parser._actions)
    tokens = [part for token in argv for part in (token.split("=", 1) if token.startswith("--") else [token])]
    named |= {option: value for option, value in pairwise(tokens) if option in ("--config", "--resume")}
    if takes_model and tokens and not tokens[0].startswith("-"):
        named["model"] = tokens[0]
    try:
        if source := named.get("model") or named.get("--resume"):
            return Task(task_of(recorded_config(Path(source)), source))
        return Task(task_of(load_recipe(named["--config"]) if named else {}, ""))
    except (UserError, OSError):
        return None


def _setting(name: str) -> Option:
    return next(known[name] for task in TASKS.values() if name in (known := task.options()))


def configuration(source: str, overrides: Overrides) -> tuple[Task, Any]:
    """Return the task and the typed configuration of a recipe or file, with settings applied to it."""
    # A missing package is not an error in the command line.
    require("yaml", extra="train")
    try:
        values = load_recipe(source)
        if not values:
            raise UserError("it holds no settings")
        task = Task(task_of(values, source))
        # First without the settings, so that an error says which of the two it is in.
        parse_config(task.settings.config, values)
    except UserError as error:
        raise UsageError(f"{source}: {error}") from None
    return task, with_settings(task, values, overrides)


def _refuse_settings_of_others(task: Task, overrides: Overrides) -> None:
    known = task.options()
    for name, _ in overrides:
        if name not in known:
            of = {title: name in other.options() for title, other in TASKS.items()}
            raise UsageError(
                f"--{name} is a setting of {' and '.join(title for title in of if of[title])}, and not of {task.name}"
                f"{_nearest_options(name, known)}"
            )


def with_settings(task: Task, values: Mapping[str, Any], overrides: Overrides, *, recorded: bool = False) -> Any:
    _refuse_settings_of_others(task, overrides)
    try:
        config: Any = parse_config(task.settings.config, values, overrides, recorded=recorded)
    except UserError as error:
        raise UsageError(f"--{error}") from None
    _refuse_without_effect(task, config, overrides, recorded=recorded)
    return config


def _refuse_without_effect(task: Task, config: Any, overrides: Overrides, *, recorded: bool) -> None:
    """Refuse settings that have an effect only together with another one, which is ``null``.

    If that one is switched off on the command line, the recipe or run may still contain settings that belong to it.
    """
    given, by_default = dict(overrides), task.settings.config()
    for name, needed in task.settings.without_effect_alone.items():
        value, default = (_value(of, name) for of in (config, by_default))
        in_recipe = not recorded and needed not in given and value != default
        if _value(config, needed) is None and value is not None and (name in given or in_recipe):
            raise UsageError(f"--{name} {_shown(value)} has no effect without --{needed}: give both, or leave it out")


def _value(config: Any, name: str) -> Any:
    return reduce(getattr, name.split("."), config)


def configuration_of_model(source: Path, overrides: Overrides) -> tuple[Task, Any]:
    """Return the task and the typed configuration of a run's folder or a checkpoint, with settings applied to it."""
    values = recorded_config(source)
    task = Task(task_of(values, source / "config.yaml" if source.is_dir() else source))
    return task, with_settings(task, values, overrides, recorded=True)


def configuration_in_use(source: Path, overrides: Overrides) -> tuple[Task, Any]:
    """`configuration_of_model` for using a trained model; settings that belong to the model or its run are refused."""
    task, config = configuration_of_model(source, overrides)
    given = dict(overrides)
    # The number of processes of the training does not apply to commands that use the model.
    alone = {name: to for name, to in (("devices", "auto"), ("machines", 1)) if f"training.{name}" not in given}
    config = replace(config, training=replace(config.training, **alone))
    if not overrides:
        return task, config
    _, trained = configuration_of_model(source, [])
    free, kept = task.settings.free_when_trained, task.settings.kept_by_runs(trained, config)
    for name, text in overrides:
        shapes = name.startswith("model.") and name not in free
        if not shapes and name not in kept:
            continue
        was, now = (_value(of, name) for of in (trained, config))
        if was != now and shapes:
            raise UsageError(
                f"--{name} {text}: the model in {source} is trained with {_shown(was)}, and its weights are "
                f"meaningless with another value; leave it out, or train anew from these weights: latentgnn train "
                f"--config RECIPE --model.weights {source} --{name} {text}"
            )
        if was != now:
            raise UsageError(
                f"--{name} {text}: the model in {source} is trained with {_shown(was)}, and {kept[name]}; leave it out"
            )
    return task, config


def settings_help(used: Used | None) -> str:
    known = {name: found for name, task in TASKS.items() if (found := task.options(used))}
    first, *others = known.values()
    common = {name for name, option in first.items() if others and all(other.get(name) == option for other in others)}
    lines = []
    if common:
        lines.append("settings (values as in YAML; the recipe's value where not given), of every task:")
        lines += _described({name: first[name] for name in first if name in common})
    for task, settings in known.items():
        lines += ["", f"settings of {task} (recipes say which task they are of):"]
        lines += _described({name: settings[name] for name in settings if name not in common})
    return "\n".join(lines)


def _described(settings: Mapping[str, Option]) -> list[str]:
    lines = []
    for name, option in settings.items():
        lines.append(f"  --{name}  {describe(option.type)}")
        text = f"{option.help} ({_shown(option.default)})".replace("``", "")
        lines += textwrap.wrap(text, 110, initial_indent=" " * 6, subsequent_indent=" " * 6)
    return lines


def _shown(default: Any) -> str:
    if default is None:
        return "null"
    if isinstance(default, bool):
        return str(default).lower()
    return str(list(default)) if isinstance(default, tuple) else str(default)
