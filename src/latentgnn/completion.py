"""Shell completion of the command line with shtab: a script that the shell reads once, without running Python."""

import argparse
from collections.abc import Iterable, Sequence
from typing import Any, Literal, get_args, get_origin

from latentgnn.errors import require

SHELLS = ("bash", "zsh", "fish")

# Arguments that name folders; all others without choices name files.
_FOLDERS = {"FOLDER", "RUN", "SOURCE"}
_RECIPES = {"RECIPE", "NAME"}


def script(parser: argparse.ArgumentParser, shell: str, *, recipes: Sequence[str]) -> str:
    """Return the completion script for a parser.

    Args:
        parser: parser with all commands and their options.
        shell: one of `SHELLS`.
        recipes: names of recipes.

    Raises:
        UserError: if shtab is not installed.
    """
    shtab: Any = require("shtab", extra="train")
    for action in _actions(parser):
        if action.choices is not None or action.nargs == 0:
            continue
        metavar = action.metavar if isinstance(action.metavar, str) else ""
        if metavar in _RECIPES:
            action.complete = _recipe(recipes)  # type: ignore[attr-defined]
        else:
            action.complete = shtab.DIRECTORY if metavar in _FOLDERS else shtab.FILE  # type: ignore[attr-defined]
    text: str = shtab.complete(parser, shell=shell)
    return text


def choices(hint: Any) -> list[str] | None:
    """Return the words that a setting accepts, if its type defines them.

    Example:
        >>> choices(Literal["sgd", "adamw"]), choices(bool), choices(int)
        (['sgd', 'adamw'], ['true', 'false'], None)
    """
    if hint is bool:
        return ["true", "false"]
    if get_origin(hint) is Literal:
        return [str(value) for value in get_args(hint)]
    return None


def _actions(parser: argparse.ArgumentParser) -> Iterable[argparse.Action]:
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for command in action.choices.values():
                yield from _actions(command)
        else:
            yield action


def _recipe(names: Sequence[str]) -> dict[str, Any]:
    """Completes a recipe's name, and in bash and fish also a file."""
    words = " ".join(names)
    bash = f"_latentgnn_recipes() {{\n  compgen -W '{words}' -- $1\n  compgen -f -X '!*.y*ml' -- $1\n}}\n"
    return {
        "bash": "_latentgnn_recipes",
        "zsh": f"({words})",
        "fish": f"(printf '%s\\n' {words}; __fish_complete_suffix .yaml)",
        "preamble": {"bash": bash},
    }
