"""All that needs a GPU, in one command: tests, a detector's step, and the layer beside its peers in every form.

benchmarks/gpu [--dry-run] [--only tests,detector,layer] [--limit MINUTES]

What is compiled is compiled first, in many processes at a time, while the tests run; then everything is timed, alone.
"""

import argparse
import os
import shlex
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from math import inf, isfinite
from pathlib import Path
from time import monotonic

from benchmarks.child import COMPILERS, PAIR, ROOT, start_server
from benchmarks.layer import LAYERS
from benchmarks.options import RESULTS, minutes, names_of, names_or_none, positive, require_device
from benchmarks.shapes import MODES, SHAPES
from latentgnn.errors import UserError

PARTS = ("tests", "detector", "layer")
DTYPES = ("float32", "bfloat16")
# The norms of detectors and of training from scratch; all four would take twice as long.
NORMS = ("batch", "frozen")
# Inputs that are common, the most telling first, for a limit of time cuts off the last.
MEASURED = (
    *("C4", "stage4-b8", "C3", "C5", "stage4-b32", "map", "narrow32-b8"),
    *("stage3-b8", "stage5-b8", "packed-b8", "tokens-b8"),
)
# Those at which compiled sides run too: compiling takes by far the longest of everything.
COMPILED = MEASURED[:7]

# What runs on a GPU where there is one.
GPU_TESTS = ("tests/test_cuda.py", "tests/kernels")
DETECTOR = "benchmarks.detector"
LAYER = "benchmarks.layer"
PREPARE = "benchmarks.prepare"
TESTS = "pytest"


@dataclass(frozen=True)
class Step:
    """One command of the plan.

    Args:
        module: that is run.
        arguments: for it.
        rows: for which it takes its share of the plan's limit, with its own ``--limit``; 0 for none.
    """

    module: str
    arguments: tuple[str, ...]
    rows: int = 0

    def __str__(self) -> str:
        return shlex.join(["python", "-m", self.module, *self.arguments])


def plan(
    parts: Sequence[str] = PARTS,
    *,
    shapes: Sequence[str] = MEASURED,
    compiled: Sequence[str] = COMPILED,
    norms: Sequence[str] = NORMS,
    dtypes: Sequence[str] = DTYPES,
    rounds: int = 7,
    out: Path = RESULTS,
) -> list[Step]:
    """The commands, in order.

    Args:
        parts: some of `PARTS`.
        shapes: names in `benchmarks.shapes.SHAPES`.
        compiled: those at which compiled sides run.
        norms: names in `benchmarks.shapes.MODES`.
        dtypes: some of `DTYPES`.
        rounds: measurements of each side.
        out: where result files go.
    """
    steps = []
    tables = []
    compiled = [shape for shape in shapes if shape in compiled]
    common = ("--device", "cuda", "--rounds", str(rounds), "--out", str(out))
    inputs = ("--norms", ",".join(norms), "--shapes")
    some = ("--compiled", ",".join(compiled) or "none")
    modes = sum(len(MODES[norm]) for norm in norms)
    # In eager mode users replace the literal layer, or it under torch.compile; compiled, the latter.
    eager = "published,compiled published" if compiled else "published"
    for first, peers, places in ((LAYERS[0], eager, shapes), (LAYERS[1], "compiled published", compiled)):
        sides = ("--first", first, "--peers", peers, "--literal", "once", *some)
        rows = modes * (len(compiled) + (len(shapes) if first == LAYERS[0] else 0))
        for dtype in dtypes if places else ():
            arguments = (*common, "--dtype", dtype, *inputs, ",".join(places), *sides)
            tables.append(Step(LAYER, arguments, rows=rows))
    if "tests" in parts:
        workers = str(min(os.cpu_count() or 1, 8))
        steps.append(Step(TESTS, (*GPU_TESTS, "-n", workers, "--dist", "worksteal")))
    if "layer" in parts:
        types = ("--device", "cuda", "--dtypes", ",".join(dtypes))
        # A third of the time is enough for it, and all that it may take.
        prepared = max(sum(table.rows for table in tables) // 2, 1)
        steps.append(Step(PREPARE, (*types, *inputs, ",".join(shapes), *some), rows=prepared))
    if "detector" in parts:
        steps += [Step(DETECTOR, (*common, "--dtype", dtype)) for dtype in dtypes]
    if "layer" in parts:
        steps += tables
    return steps


def start_tests(step: Step) -> "subprocess.Popen[bytes]":
    """Start a command of the plan as a program, from the repository's root.

    Args:
        step: of the plan.
    """
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    return subprocess.Popen(
        [sys.executable, "-m", step.module, *step.arguments], cwd=ROOT, env={**os.environ, "PYTHONPATH": path}
    )


def run(step: Step, limit: float = inf) -> int:
    """Run one of this package's commands in this process, and return its exit code; what it times has its own.

    Args:
        step: of the plan, and not the tests.
        limit: seconds of the step, where it has rows.
    """
    arguments = [*step.arguments]
    if step.rows and isfinite(limit):
        arguments += ["--limit", f"{max(limit, 1) / 60:.3f}"]
    try:
        code: int = import_module(step.module).main(arguments)
    except UserError as error:
        print(error, file=sys.stderr, flush=True)
        return 1
    return code


def run_all(steps: Sequence[Step], limit: float = inf) -> list[Step]:
    """Run a plan to its end, whatever fails on the way: what times nothing together, then the rest one by one.

    Args:
        steps: from `plan`.
        limit: seconds; what is left of them is shared among the steps that are left, by their rows.

    Returns:
        The steps that failed.
    """
    end = monotonic() + limit
    failed = []
    tests = []
    for position, step in enumerate(steps):
        print(f"+ {step}", flush=True)
        if step.module == TESTS:
            tests.append((step, start_tests(step)))
            continue
        if step.module != PREPARE:
            failed += _ended(tests)
        left = sum(one.rows for one in steps[position:])
        began = monotonic()
        if run(step, (end - began) * step.rows / max(left, 1)) != 0:
            failed.append(step)
        print(f"  {monotonic() - began:.0f} s", flush=True)
    return failed + _ended(tests)


def _ended(tests: list[tuple[Step, "subprocess.Popen[bytes]"]]) -> list[Step]:
    """Wait for the tests, each once, and return those that failed."""
    failed = [step for step, process in tests if process.wait() != 0]
    tests.clear()
    return failed


def main(argv: Sequence[str] | None = None) -> int:
    """Run the plan.

    Args:
        argv: the arguments; ``None`` takes the process's.

    Returns:
        The exit code: 1 where a command failed.
    """
    parser = argparse.ArgumentParser(
        prog="benchmarks/gpu",
        description=__doc__,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    names = partial(partial, names_of)

    def add(name: str, known: Sequence[str], default: Sequence[str], what: str) -> None:
        chosen = ",".join(default)
        parser.add_argument(name, type=names(known), default=chosen, metavar="NAME,..", help=f"{what} ({chosen})")

    add("--only", PARTS, PARTS, "parts")
    add("--shapes", list(SHAPES), MEASURED, "inputs of the layer")
    chosen = ",".join(COMPILED)
    parser.add_argument(
        "--compiled",
        type=partial(names_or_none, SHAPES),
        default=chosen,
        metavar="NAME,..",
        help=f"those of them at which compiled sides run, or none ({chosen})",
    )
    add("--norms", list(MODES), NORMS, "norms of the layer")
    add("--dtypes", DTYPES, DTYPES, "types of the layer and of the detector")
    parser.add_argument("--rounds", type=positive, default=7, metavar="N", help="measurements of each side (7)")
    parser.add_argument(
        "--limit", type=minutes, default=inf, metavar="MINUTES", help="begin no row after them, shared by tables (none)"
    )
    parser.add_argument("--out", type=Path, default=RESULTS, metavar="FOLDER", help="(benchmarks/results)")
    parser.add_argument("--dry-run", action="store_true", help="print the commands and run none")
    given = parser.parse_args(argv)
    steps = plan(
        given.only,
        shapes=given.shapes,
        compiled=given.compiled,
        norms=given.norms,
        dtypes=given.dtypes,
        rounds=given.rounds,
        out=given.out.absolute(),
    )
    if given.dry_run:
        print("\n".join(map(str, steps)))
        return 0
    try:
        require_device("cuda")
    except UserError:
        print("error: PyTorch sees no CUDA device here; --dry-run prints what would be run", file=sys.stderr)
        return 1
    modules = {step.module for step in steps} - {TESTS}
    start_server([PAIR, *([COMPILERS] if given.compiled else []), *(modules & {DETECTOR})])
    for module in modules:
        # While the server imports the same, and not when nothing else is left to wait for.
        import_module(module)
    failed = run_all(steps, given.limit)
    for step in failed:
        print(f"failed: {step}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
