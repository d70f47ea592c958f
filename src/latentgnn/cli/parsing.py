"""How a command line is read, and where a command prints: what all commands share."""

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
    """One command.

    Args:
        help: its line in the list of commands.
        arguments: adds its own arguments to a parser.
        run: does it, and returns the exit code.
        settings: takes ``--group.name VALUE`` for settings of the configuration.
        used: of these, the ones that it uses.
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
    """Where a command prints: with ``--json`` to standard error, and at its end the document to standard output.

    Gives a function that takes the document, as a function that makes it.
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
