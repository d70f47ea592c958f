"""What the programs here share: options, how errors are told, and the names and headers of result files."""

import argparse
import difflib
import platform
import shlex
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from benchmarks.shapes import MODES, SHAPES, SQUARES
from latentgnn.errors import UserError
from latentgnn.files.writing import write_json, write_text
from latentgnn.machine import processor_name

RESULTS = Path(__file__).parent / "results"


def run(main: Callable[[list[str]], int | None], argv: Sequence[str] | None = None) -> int:
    """Run a program, and tell errors of the user and of the operating system in one line.

    Args:
        main: the program; it takes the command-line arguments and returns an exit code, ``None`` for 0.
        argv: the command-line arguments; ``None`` for those of the process.

    Returns:
        The exit code; 1 after such an error.
    """
    try:
        return main(list(sys.argv[1:] if argv is None else argv)) or 0
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return 1


def program(name: str, description: str | None, *, out: bool = False) -> argparse.ArgumentParser:
    """The argument parser of a program here; options cannot be abbreviated.

    Args:
        name: the name of the program's module.
        description: the module's docstring, shown as it stands.
        out: whether the program has an option ``--out``, the folder of its result files.
    """
    parser = argparse.ArgumentParser(
        prog=f"python -m benchmarks.{name}",
        description=description,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    if out:
        parser.add_argument("--out", type=Path, default=RESULTS, metavar="FOLDER", help="(benchmarks/results)")
    return parser


def add_run_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that all measurements have in common: rounds, threads, device and type.

    Args:
        parser: the parser that takes them.
    """
    parser.add_argument("--rounds", type=positive, default=7, metavar="N", help="measurements of each side (7)")
    parser.add_argument("--threads", type=positive, metavar="N", help="number of torch threads (torch's default)")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"], help="(cpu)")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"], help="(float32)")


def add_case_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that choose an input, a norm and a mode.

    Args:
        parser: the parser that takes them.
    """
    parser.add_argument("--shape", required=True, choices=[*SHAPES, *SQUARES], metavar="NAME")
    parser.add_argument("--norm", default="batch", choices=list(MODES), help="(batch)")
    parser.add_argument("--mode", choices=["evaluation", "training"], help="(the norm's first)")


def mode_of(parser: argparse.ArgumentParser, given: argparse.Namespace) -> str:
    """The mode that was chosen, or the norm's first.

    Args:
        parser: the parser, which refuses a mode that the norm is not measured in.
        given: the options of `add_case_options`.
    """
    modes = MODES[given.norm]
    mode: str = given.mode or modes[0]
    if mode not in modes:
        parser.error(f"--mode: {given.norm} norm is measured in {', '.join(modes)}; got {mode}")
    return mode


def positive(text: str) -> int:
    """An option's value as a whole number, at least 1.

    Args:
        text: the value as given.

    Raises:
        argparse.ArgumentTypeError: anything else.
    """
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number from 1 on, got {text!r}")
    return int(text)


def minutes(text: str) -> float:
    """An option's value as a time in minutes, returned in seconds.

    Args:
        text: the value as given.

    Raises:
        argparse.ArgumentTypeError: no number above 0.

    Example:
        >>> minutes("1.5")
        90.0
    """
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"expected a number of minutes above 0, got {text!r}")
    return 60 * value


def positives(text: str) -> list[int]:
    """An option's value as whole numbers from 1 on, with commas between.

    Args:
        text: the value as given.

    Raises:
        argparse.ArgumentTypeError: anything else.
    """
    return [positive(part) for part in text.split(",")]


def numbers(text: str) -> tuple[int, ...]:
    """An option's value as whole numbers with commas between.

    Args:
        text: the value as given.

    Raises:
        argparse.ArgumentTypeError: anything else.
    """
    parts = text.split(",")
    if not all(part.isdecimal() for part in parts):
        raise argparse.ArgumentTypeError(f"expected numbers with commas between, got {text!r}")
    return tuple(map(int, parts))


def require_device(device: str) -> None:
    """Say what to do where a GPU is asked for and there is none.

    Args:
        device: ``cpu`` or ``cuda``.

    Raises:
        UserError: PyTorch sees no CUDA device.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: PyTorch sees no CUDA device here; leave it out to measure on the CPU")


def names_of(known: Iterable[str], text: str) -> list[str]:
    """An option's value as names with commas between.

    Args:
        known: the names that there are.
        text: the value as given; ``all`` for all of them.

    Raises:
        argparse.ArgumentTypeError: a name that is not known, with those that are.

    Example:
        >>> names_of(["C3", "C4", "C5"], "C3,C5")
        ['C3', 'C5']
    """
    known = list(known)
    names = known if text == "all" else text.split(",")
    for name in names:
        if name not in known:
            close = difflib.get_close_matches(name, known, n=1)
            hint = f"; did you mean {close[0]}?" if close else ""
            raise argparse.ArgumentTypeError(f"there is no {name!r}; {', '.join(known)}{hint}")
    return names


def names_from(known: Iterable[str], *, or_none: bool = False) -> Callable[[str], list[str]]:
    """A function that reads an option's value as `names_of` does, for `argparse`.

    Args:
        known: the names that there are.
        or_none: whether the value ``none`` stands for no name.

    Example:
        >>> names_from(["C3", "C4"])("all"), names_from(["C3", "C4"], or_none=True)("none")
        (['C3', 'C4'], [])
    """

    def read(text: str) -> list[str]:
        return [] if or_none and text == "none" else names_of(known, text)

    return read


def add_names_option(
    parser: argparse.ArgumentParser,
    option: str,
    known: Iterable[str],
    what: str = "",
    *,
    default: str = "all",
    or_none: bool = False,
) -> None:
    """Add an option whose value is names with commas between.

    Args:
        parser: the parser that takes it.
        option: the option's name.
        known: the names that there are.
        what: the help.
        default: the value without the option.
        or_none: whether the value ``none`` stands for no name.
    """
    read = names_from(known, or_none=or_none)
    parser.add_argument(option, type=read, default=default, metavar="NAME,..", help=f"{what} ({default})".lstrip())


def header(program: str, arguments: Iterable[str], *, device: str, dtype: str, threads: int | None) -> dict[str, Any]:
    """The header of a result file: command, date, hardware and versions.

    Args:
        program: the module.
        arguments: the arguments that it was given.
        device: ``cpu`` or ``cuda``.
        dtype: the name of a dtype.
        threads: number of torch threads; ``None`` for torch's default.
    """
    return {
        "command": shlex.join(["python", "-m", program, *arguments]),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "processor": processor_name(),
        "gpu": torch.cuda.get_device_name() if device == "cuda" else None,
        "dtype": dtype,
        "threads": threads or torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def result_stem(out: Path, name: str, head: Mapping[str, Any], *labels: str) -> Path:
    """The path of a program's result files without their ending: name, date in UTC, and labels.

    Args:
        out: the folder of result files.
        name: what the files' names begin with.
        head: the result's header, from `header`.
        *labels: what the names end with; empty ones are left out.

    Example:
        >>> result_stem(Path("results"), "layer", {"date": "2026-11-26T12:00:00+00:00"}, "cpu", "").as_posix()
        'results/layer-2026-11-26-cpu'
    """
    return out / "-".join([name, head["date"][:10], *filter(None, labels)])


def save_results(stem: Path, report: Any, markdown: str | None = None) -> None:
    """Write a result as ``.json``, and as ``.md`` if there is a page of it.

    Args:
        stem: the path without an ending.
        report: the result.
        markdown: the page; ``None`` for none.
    """
    write_json(stem.with_name(f"{stem.name}.json"), report)
    if markdown is not None:
        write_text(stem.with_name(f"{stem.name}.md"), markdown)


def write_results(stem: Path, report: Any, markdown: str | None = None) -> None:
    """Write a result as `save_results` does, and print where.

    Args:
        stem: the path without an ending.
        report: the result.
        markdown: the page; ``None`` for none.
    """
    save_results(stem, report, markdown)
    print(f"written to {stem}.json{'' if markdown is None else ' and .md'}", flush=True)
