"""Runs of the command ``latentgnn train``, their folders, and the header of a report on them."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

from latentgnn.cli import main as latentgnn
from latentgnn.training.environment import environment


def run_folder(folder: Path, *names: str) -> Path:
    """The folder of a run. Characters other than letters, digits and ``. _ - ~`` are quoted: no two names share one.

    Args:
        folder: the folder of all runs.
        *names: what tells runs apart, a level of folders each.

    Example:
        >>> run_folder(Path("runs"), "no block-0").as_posix(), run_folder(Path("runs"), "none", "seed-0").as_posix()
        ('runs/no%20block-0', 'runs/none/seed-0')
    """
    return folder.joinpath(*(quote(name, safe="") for name in names))


def train(run: Path, options: Sequence[str]) -> None:
    """Train to the end, unless that is done already; a stopped run is resumed.

    Args:
        run: the run's folder.
        options: the command's options for a new run.

    Raises:
        SystemExit: the command failed, and has said why.
    """
    if not (run / "metrics.json").exists():
        arguments = ["--resume", str(run)] if (run / "config.yaml").exists() else [*options, "--out", str(run)]
        if code := latentgnn(["train", *arguments]):
            raise SystemExit(code)


def runs_header(command: str) -> dict[str, Any]:
    """The header of a report on runs: hardware and versions. Paths describe a machine and not the figures.

    Args:
        command: the command that makes the report.
    """
    return {**{name: value for name, value in environment().items() if name != "folder"}, "command": command}


def header_line(head: Mapping[str, Any]) -> str:
    """A header as a line of Markdown: command, processor and PyTorch's version.

    Args:
        head: the header, from `runs_header`.
    """
    return f"`{head['command']}`, {head['cpu']['model']}, torch {head['packages']['torch']}"
