"""The command line: ``latentgnn train | evaluate | predict | report | check-data | convert | recipes | ...``.

Exit codes: 0 success; 1 the command failed or was interrupted; 2 the command line, or the configuration that it names,
is invalid; 141 the program that reads the output has ended. Nothing heavy is imported before a command needs it.
"""

import argparse
import errno
import io
import os
import sys
import traceback
from collections.abc import Sequence
from contextlib import ExitStack, redirect_stdout, suppress
from importlib.metadata import version

from latentgnn.cli.arrays import apply, apply_arguments
from latentgnn.cli.information import cost, cost_arguments, recipes, recipes_arguments
from latentgnn.cli.looking import (
    diagnose,
    diagnose_arguments,
    explain,
    explain_arguments,
    explore,
    explore_arguments,
)
from latentgnn.cli.models import evaluate, evaluate_arguments, export, export_arguments, predict, predict_arguments
from latentgnn.cli.parsing import Command, Overrides, Parser, UsageError
from latentgnn.cli.sets import check_data, check_data_arguments, convert, convert_arguments
from latentgnn.cli.settings import TASKS, settings_help, split
from latentgnn.cli.training import report, report_arguments, train, train_arguments
from latentgnn.completion import SHELLS, choices, script
from latentgnn.configuration.recipes import list_recipes
from latentgnn.configuration.settings import Option, nearest
from latentgnn.errors import UserError, require, system_error, told
from latentgnn.training.runs import is_first_process

# The exit code that shells report for a program ended by SIGPIPE.
_CLOSED_PIPE = 141


_ON_WRITING = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: the arguments after the program's name; ``None`` takes the process's.

    Returns:
        The exit code.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):
        # A file name may contain characters that the terminal's encoding lacks; they are printed as escapes, as in
        # errors.
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        with ExitStack() as stack:
            if not is_first_process():
                # Only one of a command's processes prints.
                stack.enter_context(redirect_stdout(stack.enter_context(open(os.devnull, "w"))))
            return _guarded(list(sys.argv[1:] if argv is None else argv))
    finally:
        _end_output()


def _guarded(argv: list[str]) -> int:
    """Run a command and return its exit code; any error becomes a message."""
    try:
        try:
            code = _run(argv)
        except SystemExit as stop:
            # Raised at the end of --help and --version.
            code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
        # Without standard output, `print` does nothing.
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
            # Code that writes files names the file in errors; an error without a file name comes from `print`.
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
    epilog = settings_help(command.used) if command.settings else ""
    parser = Parser(f"latentgnn {name}", description=command.help, epilog=epilog)
    command.arguments(parser)
    own, overrides = split(argv[1:], parser, command)
    return command.run(parser.parse_args(own), overrides)


def _complain(message: str, code: int) -> int:
    # If the message cannot be printed, there is still the exit code.
    with suppress(OSError):
        print(f"latentgnn: {message}", file=sys.stderr)
    return code


def _end_output() -> None:
    """Replace a broken output: otherwise the interpreter would try to flush it at exit, and fail."""
    for stream in (sys.stdout, sys.stderr):
        try:
            if stream is not None:
                stream.flush()
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


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


COMMANDS = {
    "train": Command("Train a model; without arguments, a small one on data made on the fly.", train_arguments, train),
    "evaluate": Command("Score a trained model, or a file of results.", evaluate_arguments, evaluate),
    "predict": Command("Apply a trained model to images or scans.", predict_arguments, predict),
    "export": Command(
        "Write a trained model for others: safetensors, torch.export's or ONNX, checked against the model.",
        export_arguments,
        export,
        settings=False,
    ),
    "apply": Command(
        "Apply a layer to the nodes in a .npy file, which may be larger than memory; started again, it goes on.",
        apply_arguments,
        apply,
        settings=False,
    ),
    "explain": Command(
        "Show what each block of a trained model does on images or scans: pictures and a page.",
        explain_arguments,
        explain,
        used="explained",
    ),
    "diagnose": Command(
        "Say whether each block of a trained model does something, and what to try.",
        diagnose_arguments,
        diagnose,
        used="diagnosed",
    ),
    "explore": Command(
        "Look at a trained model's blocks on a local web page, node by node; without arguments, a small example's.",
        explore_arguments,
        explore,
        used="diagnosed",
    ),
    "report": Command("Write a run's report.html again, from its folder.", report_arguments, report, settings=False),
    "check-data": Command(
        "Check every record of a data set, and say what it holds; exit code 1 where there are faults.",
        check_data_arguments,
        check_data,
        used="checked",
    ),
    "convert": Command("Write a set of images of any format in COCO's.", convert_arguments, convert, used="converted"),
    "recipes": Command("List the recipes, or print one.", recipes_arguments, recipes, settings=False),
    "cost": Command("Print what a layer costs, beside a non-local block.", cost_arguments, cost, settings=False),
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
