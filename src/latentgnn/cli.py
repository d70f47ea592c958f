"""The command line: ``latentgnn train | evaluate | predict | report | check-data | convert | recipes | ...``.

Exit codes: 0 done; 1 the command failed, or was interrupted; 2 the command line, or the configuration that it names,
says something that cannot be understood; 141 the program that reads the output has ended. Nothing heavy is imported
before a command needs it.
"""

import argparse
import errno
import importlib
import io
import json
import os
import shlex
import sys
import textwrap
import traceback
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout, suppress
from dataclasses import dataclass
from functools import reduce
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path
from types import ModuleType
from typing import Any, NoReturn

from latentgnn.completion import SHELLS, choices, script
from latentgnn.configuration.recipes import list_recipes, load_recipe, read_recipe, to_yaml
from latentgnn.configuration.settings import Option, describe, nearest, options, parse_config, plain_data, renamed
from latentgnn.errors import UserError, require, system_error, told
from latentgnn.outputs import say_next
from latentgnn.training.runs import RunFolder

DEFAULT_RECIPE = "context"

# What shells report of a program that is ended by SIGPIPE.
_CLOSED_PIPE = 141

_ON_WRITING = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


@dataclass(frozen=True)
class Task:
    """Where a task lives: ``config.py`` (light) with its configuration, ``commands.py`` with what the commands do."""

    package: str
    config_name: str

    @property
    def config_class(self) -> type:
        config_class: type = getattr(importlib.import_module(f"{self.package}.config"), self.config_name)
        return config_class

    @property
    def free_when_trained(self) -> frozenset[str]:
        """Settings of a model that a trained one can be used with other values of."""
        free: frozenset[str] = importlib.import_module(f"{self.package}.config").FREE_WHEN_TRAINED
        return free

    @property
    def without_effect_alone(self) -> dict[str, str]:
        """Settings that mean something only where another one is given, and that one."""
        found: dict[str, str] = importlib.import_module(f"{self.package}.config").WITHOUT_EFFECT_ALONE
        return found

    def kept_by_runs(self, trained: Any, now: Any) -> dict[str, str]:
        """Settings besides the model's that stay a run's own when it is used, and why."""
        kept: dict[str, str] = importlib.import_module(f"{self.package}.config").kept_by_runs(trained, now)
        return kept

    @property
    def commands(self) -> ModuleType:
        return importlib.import_module(f"{self.package}.commands")

    def options(self, used: str | None) -> dict[str, Option]:
        """The settings that a command takes: all, or those in the tuple of this name in ``config.py``."""
        known = options(self.config_class)
        if used is None:
            return known
        names: Collection[str] = getattr(importlib.import_module(f"{self.package}.config"), used)
        return {name: known[name] for name in names}


TASKS = {
    "detection": Task("latentgnn.tasks.detection", "DetectionConfig"),
    "pointcloud": Task("latentgnn.tasks.pointcloud", "PointCloudConfig"),
}


class UsageError(UserError):
    """The command line cannot be understood."""


class Parser(argparse.ArgumentParser):
    """argparse that raises `UsageError` and takes no abbreviations."""

    def __init__(self, prog: str, **arguments: Any) -> None:
        super().__init__(
            prog=prog, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter, **arguments
        )

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message}\n{self.format_usage().strip()}")


Overrides = Sequence[tuple[str, str]]


@dataclass(frozen=True)
class Command:
    """One command.

    Args:
        help: its line in the list of commands.
        arguments: adds its own arguments to a parser.
        run: does it, and returns the exit code.
        settings: takes ``--group.name VALUE`` for settings of the configuration.
        used: of these, the ones that it uses, see `Task.options`.
    """

    help: str
    arguments: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace, Overrides], int]
    settings: bool = True
    used: str | None = None


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: the arguments after the program's name; ``None`` takes the process's.

    Returns:
        The exit code.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):
        # A file's name may hold what the terminal's encoding does not; as in errors, it is shown in escapes.
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        return _guarded(list(sys.argv[1:] if argv is None else argv))
    finally:
        _end_output()


def _guarded(argv: list[str]) -> int:
    """The exit code of a command whatever happens in it, with what is wrong in words."""
    try:
        try:
            code = _run(argv)
        except SystemExit as stop:
            # The end of --help and --version.
            code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
        # Without a standard output, `print` does nothing.
        if sys.stdout is not None:
            sys.stdout.flush()
        return code
    except UsageError as error:
        return _complain(str(error), 2)
    except UserError as error:
        return _complain(str(error), 1)
    except KeyboardInterrupt:
        return _complain("interrupted", 1)
    except BrokenPipeError:
        # The reader of our output has closed it, as `| head` does.
        return _CLOSED_PIPE
    except Exception as error:
        if (fault := system_error(error)) is not None:
            # Who writes a file names it in errors; what names none comes from `print`.
            return _complain(told(fault, "standard output" if fault.errno in _ON_WRITING else None), 1)
        absent = error.name if isinstance(error, ModuleNotFoundError) else None
        if absent is not None and absent.split(".")[0] != "latentgnn":
            return _complain(f"this needs {absent!r}, which is not installed: pip install 'latentgnn[all]'", 1)
        traceback.print_exc()
        return _complain("this is a fault in latentgnn, not in your input; please report it with the lines above", 1)


def _run(argv: list[str]) -> int:
    top = Parser("latentgnn", description=_overview(), usage="latentgnn COMMAND [ARGUMENTS]")
    top.add_argument("--version", action="version", version=f"latentgnn {version('latentgnn')}")
    if not argv or argv[0].startswith("-"):
        top.parse_args(argv)
        raise UsageError(f"no command given\n\n{top.format_help().strip()}")
    name = argv[0]
    if name not in COMMANDS:
        raise UsageError(f"there is no command {name!r}; commands: {', '.join(COMMANDS)}{nearest(name, COMMANDS)}")
    command = COMMANDS[name]
    epilog = _settings_help(command.used) if command.settings else ""
    parser = Parser(f"latentgnn {name}", description=command.help, epilog=epilog)
    command.arguments(parser)
    own, overrides = _split(argv[1:], parser, command)
    return command.run(parser.parse_args(own), overrides)


def _complain(message: str, code: int) -> int:
    # Where nobody can be told, the exit code still says it.
    with suppress(OSError):
        print(f"latentgnn: {message}", file=sys.stderr)
    return code


def _end_output() -> None:
    """Let go of an output that takes nothing more: the interpreter would try again, and fail, at its end."""
    for stream in (sys.stdout, sys.stderr):
        try:
            if stream is not None:
                stream.flush()
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def _split(argv: Sequence[str], parser: argparse.ArgumentParser, command: Command) -> tuple[list[str], Overrides]:
    """A command's own arguments, and the settings among them; whatever is neither is refused by name."""
    own = [text for action in parser._actions for text in action.option_strings]
    known = set().union(*(task.options(command.used) for task in TASKS.values())) if command.settings else set()
    rest: list[str] = []
    overrides: list[tuple[str, str]] = []
    given: set[str] = set()
    tokens = iter(argv)
    for token in tokens:
        if token == "--":
            rest += [token, *tokens]
            break
        option, equals, value = token.partition("=")
        if option.startswith("--") and option in given:
            raise UsageError(f"{option} is given twice")
        given.add(option)
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


def _no_option(name: str, own: Iterable[str], task: Task | None, used: str | None) -> str:
    """A message about an option that a command does not take: what was perhaps meant, of the task at hand."""
    known = [text[2:] for text in own if text.startswith("--")]
    if task is not None:
        if now := renamed(task.config_class).get(name):
            return f"there is no option --{name} any more: it is called --{now} now"
        if any(name in options(other.config_class) for other in TASKS.values()):
            return f"--{name} is a setting that this command does not use: leave it out"
        known += task.options(used)
    return f"there is no option --{name}{_nearest_options(name, known)}"


def _nearest_options(name: str, known: Iterable[str]) -> str:
    return nearest(name, known).replace(" or ", " or --").replace("did you mean ", "did you mean --")


def _task_at_hand(argv: Sequence[str], parser: argparse.ArgumentParser) -> Task | None:
    """The task of the recipe, run or checkpoint that a command line names, before all of it is understood.

    ``None`` where what it names cannot be read, which is told once the options are right.
    """
    named = {"--config": DEFAULT_RECIPE} if "--config" in parser._option_string_actions else {}
    takes_model = any(action.dest == "model" for action in parser._actions)
    tokens = [part for token in argv for part in (token.split("=", 1) if token.startswith("--") else [token])]
    named |= {option: value for option, value in pairwise(tokens) if option in ("--config", "--resume")}
    if takes_model and tokens and not tokens[0].startswith("-"):
        named["model"] = tokens[0]
    try:
        if source := named.get("model") or named.get("--resume"):
            return _task_of(_recorded(Path(source)), source)
        return _task_of(load_recipe(named["--config"]) if named else {}, "")
    except (UserError, OSError):
        return None


def _setting(name: str) -> Option:
    return next(known[name] for task in TASKS.values() if name in (known := options(task.config_class)))


def _task_of(values: Mapping[str, Any], source: str) -> Task:
    name = values.get("task", "detection")
    if not isinstance(name, str) or name not in TASKS:
        raise UserError(f"{source}: there is no task {name!r}; tasks: {', '.join(TASKS)}")
    return TASKS[name]


def _configuration(source: str, overrides: Overrides) -> tuple[Task, Any]:
    """The task and the typed configuration of a recipe or file with settings laid over it."""
    # A missing package is not the command line's fault.
    require("yaml", extra="train")
    try:
        values = load_recipe(source)
        if not values:
            raise UserError("it holds no settings")
        task = _task_of(values, source)
        # First without the settings, so that an error says which of the two it is in.
        parse_config(task.config_class, values)
    except UserError as error:
        raise UsageError(f"{source}: {error}") from None
    return task, _with_settings(task, values, overrides)


def _refuse_settings_of_others(task: Task, overrides: Overrides) -> None:
    known = options(task.config_class)
    for name, _ in overrides:
        if name not in known:
            of = {title: name in options(other.config_class) for title, other in TASKS.items()}
            this = next(title for title, other in TASKS.items() if other is task)
            raise UsageError(
                f"--{name} is a setting of {' and '.join(title for title in of if of[title])}, and not of {this}"
                f"{_nearest_options(name, known)}"
            )


def _with_settings(task: Task, values: Mapping[str, Any], overrides: Overrides, *, recorded: bool = False) -> Any:
    _refuse_settings_of_others(task, overrides)
    try:
        config: Any = parse_config(task.config_class, values, overrides, recorded=recorded)
    except UserError as error:
        raise UsageError(f"--{error}") from None
    _refuse_without_effect(task, config, overrides, recorded=recorded)
    return config


def _refuse_without_effect(task: Task, config: Any, overrides: Overrides, *, recorded: bool) -> None:
    """Refuse settings that mean something only with another one, which is ``null``.

    Where that one is switched off on the command line, a recipe or a run may still say what belongs to it.
    """
    given, by_default = dict(overrides), task.config_class()
    for name, needed in task.without_effect_alone.items():
        value, default = (_value(of, name) for of in (config, by_default))
        in_recipe = not recorded and needed not in given and value != default
        if _value(config, needed) is None and value is not None and (name in given or in_recipe):
            raise UsageError(f"--{name} {_shown(value)} has no effect without --{needed}: give both, or leave it out")


def _value(config: Any, name: str) -> Any:
    return reduce(getattr, name.split("."), config)


def _train_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", metavar="RECIPE", help=f"a recipe's name or a YAML file ({DEFAULT_RECIPE})")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="the run's new folder (runs/RECIPE-DATE-TIME)")
    parser.add_argument(
        "--resume", type=Path, metavar="RUN", help="continue the run in this folder, as configured there"
    )
    parser.add_argument(
        "--compare", action="store_true", help="train the same model with blocks and without, and print both"
    )


def _train(arguments: argparse.Namespace, overrides: Overrides) -> int:
    run: Path | None = arguments.resume
    if run is not None:
        if arguments.config is not None or arguments.out is not None:
            raise UsageError("--resume takes configuration and folder from the run; leave out --config and --out")
        task, config = _configuration_of_model(run, overrides)
        name = run.name
    else:
        source = DEFAULT_RECIPE if arguments.config is None else arguments.config
        task, config = _configuration(source, overrides)
        run, name = arguments.out, Path(source).stem
    if arguments.compare and not config.model.blocks:
        raise UsageError(
            "--compare trains with and without blocks, but model.blocks is empty: "
            "choose a recipe that has blocks, or add some, for example --model.blocks '{C4: 100}' in a detector"
        )
    action = task.commands.compare if arguments.compare else task.commands.train
    action(config, run, name=name, resume=arguments.resume is not None)
    return 0


def _recorded(source: Path) -> Mapping[str, Any]:
    """The configuration in a run's folder, or the one inside a checkpoint."""
    if source.is_dir():
        return RunFolder.open(source).config
    if not source.is_file():
        raise UserError(f"there is no run folder or checkpoint at {source}")
    from latentgnn.training.checkpoints import read_checkpoint

    return read_checkpoint(source).config


def _configuration_of_model(source: Path, overrides: Overrides) -> tuple[Task, Any]:
    """The task and the typed configuration of a run's folder or a checkpoint, with settings laid over it."""
    values = _recorded(source)
    task = _task_of(values, str(source / "config.yaml" if source.is_dir() else source))
    return task, _with_settings(task, values, overrides, recorded=True)


def _configuration_in_use(source: Path, overrides: Overrides) -> tuple[Task, Any]:
    """`_configuration_of_model`, where a model is used as it was trained: what belongs to it or its run is refused."""
    task, config = _configuration_of_model(source, overrides)
    if not overrides:
        return task, config
    _, trained = _configuration_of_model(source, [])
    free, kept = task.free_when_trained, task.kept_by_runs(trained, config)
    for name, text in overrides:
        shapes = name.startswith("model.") and name not in free
        if not shapes and name not in kept:
            continue
        was, now = (_value(of, name) for of in (trained, config))
        if was != now and shapes:
            raise UsageError(
                f"--{name} {text}: the model in {source} is trained with {_shown(was)}, and its weights mean "
                f"nothing with another value; leave it out, or train anew from these weights: latentgnn train "
                f"--config RECIPE --model.weights {source} --{name} {text}"
            )
        if was != now:
            raise UsageError(
                f"--{name} {text}: the model in {source} is trained with {_shown(was)}, and {kept[name]}; leave it out"
            )
    return task, config


def _evaluate_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", type=Path, nargs="?", metavar="RUN_OR_CHECKPOINT", help="what train has written")
    parser.add_argument("--results", type=Path, metavar="FILE", help="score this COCO-results file (detection)")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="where to write (evaluation/ inside the run)")
    _overwrite_argument(parser)
    _tile_arguments(parser)
    _json_argument(parser)


def _evaluate(arguments: argparse.Namespace, overrides: Overrides) -> int:
    model: Path | None = arguments.model
    overrides = [*overrides, *_tile_settings(arguments)]
    if model is None and arguments.results is None:
        raise UsageError("evaluate needs a run's folder or a checkpoint, or --results FILE")
    if model is None:
        require("yaml", extra="train")
        task = _task_of(dict(overrides), "--task")
        config = _with_settings(task, {}, overrides)
        if config.data.root is None:
            raise UsageError("without a run's folder or a checkpoint, --results needs --data.root FOLDER")
    else:
        task, config = _configuration_in_use(model, overrides)
    default = model / "evaluation" if model is not None and model.is_dir() else Path("evaluation")
    out = arguments.out or default
    with _output(as_json=arguments.json) as give:
        scores = task.commands.evaluate(
            config, model, results=arguments.results, out=out, overwrite=arguments.overwrite
        )
        give(lambda: {"folder": str(out), **scores.to_json()})
    return 0


def _json_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print one JSON document, and messages to standard error")


@contextmanager
def _output(*, as_json: bool) -> Iterator[Callable[[Callable[[], Any]], None]]:
    """Where a command prints: with ``--json`` to standard error, and at its end the document to standard output.

    Gives a function that takes the document, as a function that makes it.
    """
    documents: list[Callable[[], Any]] = []
    if not as_json:
        yield documents.append
        return
    with redirect_stdout(sys.stderr):
        yield documents.append
    for document in documents:
        print(json.dumps(document(), indent=2))


def _overwrite_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--overwrite", action="store_true", help="replace the results of an earlier command in --out")


def _tile_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--tiles",
        metavar="SIZE",
        help="look at large images, or scans, by tiles of this side, in pixels or metres (--evaluation.tiles)",
    )
    parser.add_argument(
        "--overlap", metavar="FRACTION", help="of neighbouring tiles (--evaluation.tile_overlap; 0.2; detection)"
    )


def _tile_settings(arguments: argparse.Namespace) -> Overrides:
    given = {"evaluation.tiles": arguments.tiles, "evaluation.tile_overlap": arguments.overlap}
    return [(name, value) for name, value in given.items() if value is not None]


def _predict_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", type=Path, metavar="RUN_OR_CHECKPOINT", help="what train has written")
    parser.add_argument("inputs", nargs="+", metavar="INPUT", help="files, folders and globs")
    parser.add_argument(
        "--out", type=Path, default=Path("predictions"), metavar="FOLDER", help="a new or empty folder (predictions)"
    )
    _overwrite_argument(parser)
    parser.add_argument(
        "--score-threshold", type=float, metavar="SCORE", help="leave out detections that score less (detection; 0.5)"
    )
    parser.add_argument("--no-pictures", action="store_true", help="write the results alone")
    _tile_arguments(parser)


def _predict(arguments: argparse.Namespace, overrides: Overrides) -> int:
    if arguments.score_threshold is not None and not 0 <= arguments.score_threshold <= 1:
        raise UsageError(f"--score-threshold: expected a number from 0 to 1; got {arguments.score_threshold}")
    task, config = _configuration_in_use(arguments.model, [*overrides, *_tile_settings(arguments)])
    task.commands.predict(
        config,
        arguments.model,
        arguments.inputs,
        out=arguments.out,
        overwrite=arguments.overwrite,
        score_threshold=arguments.score_threshold,
        pictures=not arguments.no_pictures,
    )
    return 0


def _check_data_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--config", metavar="RECIPE", help=f"the recipe, or YAML file, that the data should fit ({DEFAULT_RECIPE})"
    )
    _json_argument(parser)
    parser.add_argument(
        "--out", type=Path, metavar="FOLDER", help="write pictures of samples and summary.json (detection)"
    )
    _overwrite_argument(parser)


def _check_data(arguments: argparse.Namespace, overrides: Overrides) -> int:
    source = DEFAULT_RECIPE if arguments.config is None else arguments.config
    task, config = _configuration(source, overrides)
    with _output(as_json=arguments.json) as give:
        told = task.commands.check_data(config, recipe=source, out=arguments.out, overwrite=arguments.overwrite)
        say_next(_after_check(source, overrides, told))
        give(lambda: told)
    return 0 if told["faultless"] else 1


def _after_check(source: str, overrides: Overrides, told: Mapping[str, Any]) -> str:
    """The command that may follow a check, with the settings that the check was given."""
    given = "".join(f" --{name} {shlex.quote(text)}" for name, text in (("config", source), *overrides))
    if not told["faultless"]:
        return f"latentgnn check-data{given}   # when the faults are mended"
    if "val" not in told["splits"]:
        given += " --data.val_fraction 0.2"
    note = "   # with changes for what does not fit" if told.get("misfits") else ""
    return f"latentgnn train{given}{note}"


def _convert_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", metavar="SOURCE", help="the folder of the set, of any format")
    parser.add_argument(
        "--out", type=Path, required=True, metavar="FOLDER", help="a new or empty folder for a COCO-format set"
    )
    _overwrite_argument(parser)
    parser.add_argument("--no-images", action="store_true", help="write the annotations alone")


def _convert(arguments: argparse.Namespace, overrides: Overrides) -> int:
    require("yaml", extra="train")
    task = TASKS["detection"]
    config = _with_settings(task, {"data": {"root": arguments.source}}, overrides)
    task.commands.convert(config, out=arguments.out, overwrite=arguments.overwrite, with_images=not arguments.no_images)
    return 0


def _report_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", type=Path, metavar="RUN", help="a run's folder, finished or not, or a comparison's")


def _report(arguments: argparse.Namespace, overrides: Overrides) -> int:
    if not arguments.run.is_dir():
        raise UserError(f"there is no run folder at {arguments.run}")
    task, _ = _configuration_of_model(arguments.run, overrides)
    task.commands.report(arguments.run)
    return 0


def _recipes_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", nargs="?", metavar="NAME", help="print this recipe with every setting it leads to")
    _json_argument(parser)


def _recipes(arguments: argparse.Namespace, overrides: Overrides) -> int:
    if arguments.name is not None:
        _, config = _configuration(arguments.name, overrides)
        values = plain_data(config)
        description = read_recipe(arguments.name).description
        print(json.dumps(values, indent=2) if arguments.json else to_yaml(values, description=description).rstrip())
        return 0
    described = list_recipes()
    if arguments.json:
        listed = [{"name": name, "description": text} for name, text in described.items()]
        print(json.dumps({"default": DEFAULT_RECIPE, "recipes": listed}, indent=2))
        return 0
    width = max(map(len, described))
    for name, description in described.items():
        print(f"{name:{width}}  {description}{' (the default)' if name == DEFAULT_RECIPE else ''}")
    say_next("latentgnn train --config NAME", "latentgnn recipes NAME > mine.yaml   # to change it")
    return 0


def _completion_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("shell", choices=SHELLS, help="the shell that reads the script")


def _completion(arguments: argparse.Namespace, overrides: Overrides) -> int:
    require("yaml", extra="train")
    parser = Parser("latentgnn")
    commands = parser.add_subparsers()
    for name, command in COMMANDS.items():
        own = commands.add_parser(name, help=command.help)
        command.arguments(own)
        known: dict[str, Option] = {}
        for task in TASKS.values() if command.settings else ():
            known |= task.options(command.used)
        for setting, option in known.items():
            own.add_argument(f"--{setting}", help=option.help.replace("``", ""), choices=choices(option.type))
    print(script(parser, arguments.shell, recipes=list(list_recipes())))
    return 0


def _counts(text: str) -> tuple[int, ...]:
    """``100x168`` or ``150,100``."""
    parts = text.replace("x", ",").split(",")
    if not all(part.isdecimal() and int(part) > 0 for part in parts):
        raise argparse.ArgumentTypeError(f"expected numbers from 1 on, such as 100x168 or 150,100; got {text!r}")
    return tuple(map(int, parts))


def _cost_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--channels", type=int, required=True, metavar="C", help="channels of the input")
    parser.add_argument("--size", type=_counts, required=True, metavar="HxW", help="its nodes: N, HxW or DxHxW")
    parser.add_argument("--latents", type=_counts, required=True, metavar="D", help="latents, one number a kernel")
    parser.add_argument("--batch", type=int, default=1, metavar="B", help="(1)")
    parser.add_argument("--reduction", type=int, default=8, metavar="N", help="(8)")
    parser.add_argument("--groups", type=int, default=1, metavar="G", help="(1)")
    parser.add_argument("--symmetric", action="store_true", help="one assignment for gather and scatter")
    parser.add_argument("--graph-conv", action="store_true", help="a graph convolution after the scatter step")


def _cost(arguments: argparse.Namespace, overrides: Overrides) -> int:
    from latentgnn.config import LatentGNNConfig
    from latentgnn.cost import table

    try:
        config = LatentGNNConfig(
            channels=arguments.channels,
            num_latents=arguments.latents,
            reduction=arguments.reduction,
            num_groups=arguments.groups,
            symmetric=arguments.symmetric,
            graph_conv=arguments.graph_conv,
        )
        print(table(config, (arguments.batch, arguments.channels, *arguments.size)))
    except ValueError as error:
        raise UsageError(str(error)) from None
    return 0


COMMANDS = {
    "train": Command(
        "Train a model; without arguments, a small one on data made on the fly.", _train_arguments, _train
    ),
    "evaluate": Command("Score a trained model, or a file of results.", _evaluate_arguments, _evaluate),
    "predict": Command("Apply a trained model to images or scans.", _predict_arguments, _predict),
    "report": Command("Write a run's report.html again, from its folder.", _report_arguments, _report, settings=False),
    "check-data": Command(
        "Check every record of a data set, and say what it holds; exit code 1 where there are faults.",
        _check_data_arguments,
        _check_data,
        used="CHECKED",
    ),
    "convert": Command(
        "Write a set of images of any format in COCO's.", _convert_arguments, _convert, used="CONVERTED"
    ),
    "recipes": Command("List the recipes, or print one.", _recipes_arguments, _recipes, settings=False),
    "cost": Command("Print what a layer costs, beside a non-local block.", _cost_arguments, _cost, settings=False),
    "completion": Command(
        'Print a script that completes commands and options: eval "$(latentgnn completion bash)".',
        _completion_arguments,
        _completion,
        settings=False,
    ),
}


def _overview() -> str:
    lines = [f"  {name:11} {command.help}" for name, command in COMMANDS.items()]
    title = "Global context at linear cost, and the tools to train with it."
    codes = "exit codes: 0 done, 1 failed or interrupted, 2 wrong usage; `latentgnn COMMAND --help` says more"
    return "\n".join([title, "", "commands:", *lines, "", codes])


def _settings_help(used: str | None) -> str:
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
