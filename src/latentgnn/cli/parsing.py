"""Shared by all commands: parsing the command line, and where a command prints."""

import argparse
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from typing import Any, NoReturn

from latentgnn.errors import UserError
from latentgnn.tasks.settings import Used
from latentgnn.training.runs import is_first_process


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
    """A command.

    Args:
        help: its line in the list of commands.
        arguments: adds its arguments to a parser.
        run: runs the command, and returns the exit code.
        settings: whether it takes ``--group.name VALUE`` for settings of the configuration.
        used: the settings that it uses.
    """

    help: str
    arguments: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace, Overrides], int]
    settings: bool = True
    used: Used | None = None


def json_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print one JSON document, and messages to standard error")


@contextmanager
def output(*, as_json: bool) -> Iterator[Callable[[Callable[[], Any]], None]]:
    """Choose where a command prints: with ``--json`` to standard error, and the document to standard output.

    Gives a function that takes a function returning the document.
    """
    documents: list[Callable[[], Any]] = []
    if not as_json or not is_first_process():
        yield documents.append
        return
    with redirect_stdout(sys.stderr):
        yield documents.append
    for document in documents:
        print(json.dumps(document(), indent=2))


def overwrite_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--overwrite", action="store_true", help="replace the results of an earlier command in --out")
