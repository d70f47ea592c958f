"""Everything that needs a GPU, in one command: tests, a detector's step, and the layer compared with its peers.

benchmarks/gpu [--dry-run] [--only tests,detector,layer] [--limit MINUTES]

First the tables without compiled sides, and a detector's step; then the tests; then the compiled sides, which many
processes compile in parallel, and their tables. A time limit is spent in this order.
"""

import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from math import inf, isfinite
from pathlib import Path
from threading import Timer
from time import monotonic

import torch

from benchmarks.child import COMPILERS, PAIR, ROOT, start_server
from benchmarks.layer import LAYERS
from benchmarks.options import RESULTS, add_names_option, minutes, positive, program, run
from benchmarks.shapes import MODES, SHAPES
from latentgnn.errors import UserError

PARTS = ("tests", "detector", "layer")
DTYPES = ("float32", "bfloat16")
# The norms of detectors and of training from scratch; all four would take twice as long.
NORMS = ("batch", "frozen")
# Common inputs, the most informative first, because a time limit cuts off the last.
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
# In the folder of results.
TESTS_LOG = "tests-cuda.log"
PREPARED = "prepared-cuda.json"
# Seconds that interrupted tests have to report failures.
_TO_TELL = 15.0


@dataclass(frozen=True)
class Step:
    """One command of the plan.

    Args:
        module: that is run.
        arguments: for it.
        rows: weight of its share of the plan's time limit, passed as its ``--limit``; 0 for no limit.
        compiled: whether it shares, with the other steps for compiled sides, the time that the rest leaves.
    """

    module: str
    arguments: tuple[str, ...]
    rows: int = 0
    compiled: bool = False

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
    places = [shape for shape in shapes if shape in compiled]
    common = ("--device", "cuda", "--rounds", str(rounds), "--out", str(out))
    inputs = ("--norms", ",".join(norms), "--shapes")
    modes = sum(len(MODES[norm]) for norm in norms)
    steps = []
    if "layer" in parts:
        sides = ("--first", LAYERS[0], "--peers", "published", "--compiled", "none", "--literal", "once")
        for dtype in dtypes:
            arguments = (*common, "--dtype", dtype, *inputs, ",".join(shapes), *sides)
            # Checking the literal peer takes as long as a row.
            steps.append(Step(LAYER, arguments, rows=(modes + 1) * len(shapes)))
    if "detector" in parts:
        steps += [Step(DETECTOR, (*common, "--dtype", dtype)) for dtype in dtypes]
    if "tests" in parts:
        workers = str(min(os.cpu_count() or 1, 8))
        # A run that is cut off has reported its failures so far.
        told = ("-v", "--tb=short", "-p", "benchmarks.failures", "-m", "not slow")
        steps.append(Step(TESTS, (*GPU_TESTS, *told, "-n", workers, "--dist", "worksteal")))
    if "layer" in parts and places:
        prepared = str(out / PREPARED)
        each = modes * len(places)
        tables = []
        # Eager users replace the literal layer, compiled or not; compiled users replace the compiled literal layer.
        for first, label in ((LAYERS[0], ("--label", "beside-compiled")), (LAYERS[1], ())):
            sides = ("--first", first, "--peers", "compiled published", *label, "--prepared", prepared)
            for dtype in dtypes:
                arguments = (*common, "--dtype", dtype, *inputs, ",".join(places), *sides)
                tables.append(Step(LAYER, arguments, rows=each, compiled=True))
        types = ("--device", "cuda", "--dtypes", ",".join(dtypes), *inputs, ",".join(places), "--record", prepared)
        # Two thirds of the time: compiling takes longer than timing, and no row can start without it.
        steps.append(Step(PREPARE, types, rows=2 * each * len(tables), compiled=True))
        steps += tables
    return steps


def run_tests(step: Step, log: Path, limit: float = inf) -> int:
    """Run the tests as a program, from the repository's root, and return its exit code.

    Args:
        step: of the plan.
        log: a file that gets their output line by line, as it is printed.
        limit: seconds after which they are interrupted and report their failures so far.
    """
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    log.parent.mkdir(parents=True, exist_ok=True)
    process = subprocess.Popen(
        [sys.executable, "-u", "-m", step.module, *step.arguments],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": path},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        encoding="utf-8",
        errors="replace",
        # So that its workers can be ended with it.
        start_new_session=True,
    )
    timers = []
    if isfinite(limit):
        timers += [Timer(limit, process.send_signal, [signal.SIGINT])]
        timers += [Timer(limit + _TO_TELL, os.killpg, [process.pid, signal.SIGKILL])]
    with process, log.open("w") as file:
        assert process.stdout is not None
        for timer in timers:
            timer.start()
        try:
            for line in process.stdout:
                for stream in (sys.stdout, file):
                    print(line, end="", file=stream, flush=True)
        except BaseException:
            os.killpg(process.pid, signal.SIGKILL)
            raise
        finally:
            for timer in timers:
                timer.cancel()
    return process.returncode


def run_step(step: Step, limit: float = inf) -> int:
    """Run one of this package's commands in this process, and return its exit code; it times in other processes.

    Args:
        step: of the plan, and not the tests.
        limit: seconds of the step, where it has rows.
    """
    arguments = [*step.arguments]
    if step.rows and isfinite(limit):
        arguments += ["--limit", f"{max(limit, 1) / 60:.3f}"]
    return run(import_module(step.module).main, arguments)


def run_all(steps: Sequence[Step], *, log: Path, limit: float = inf) -> list[Step]:
    """Run a plan to its end, one step after the other, whatever fails on the way.

    Args:
        steps: from `plan`.
        log: of the tests, as `run_tests` takes it.
        limit: seconds after which no step starts and the tests are interrupted. The tables share the time that is left,
            by their rows; those with compiled sides get what the others leave.

    Returns:
        The steps that failed.
    """
    end = monotonic() + limit
    failed = []
    for position, step in enumerate(steps):
        began = monotonic()
        if began >= end:
            print(f"not begun within the limit: {step}", flush=True)
            continue
        print(f"+ {step}", flush=True)
        if step.module == TESTS:
            code = run_tests(step, log, end - began)
        else:
            left = sum(one.rows for one in steps[position:] if one.compiled == step.compiled)
            code = run_step(step, (end - began) * step.rows / max(left, 1))
        if code != 0:
            failed.append(step)
        print(f"  {monotonic() - began:.0f} s", flush=True)
    return failed


def main(argv: list[str]) -> int:
    """Run the plan.

    Args:
        argv: command-line arguments.

    Returns:
        The exit code: 1 where a command failed.
    """
    parser = program("gpu", __doc__, out=True)
    parser.prog = "benchmarks/gpu"

    add_names_option(parser, "--only", PARTS, "parts", default=",".join(PARTS))
    add_names_option(parser, "--shapes", SHAPES, "inputs of the layer", default=",".join(MEASURED))
    compiled = "those of them at which compiled sides run, or none"
    add_names_option(parser, "--compiled", SHAPES, compiled, default=",".join(COMPILED), or_none=True)
    add_names_option(parser, "--norms", MODES, "norms of the layer", default=",".join(NORMS))
    add_names_option(parser, "--dtypes", DTYPES, "types of the layer and of the detector", default=",".join(DTYPES))
    parser.add_argument("--rounds", type=positive, default=7, metavar="N", help="measurements of each side (7)")
    parser.add_argument("--limit", type=minutes, default=inf, metavar="MINUTES", help="begin no row after them (none)")
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
    if not torch.cuda.is_available():
        raise UserError("PyTorch sees no CUDA device here; --dry-run prints what would be run")
    modules = {step.module for step in steps} - {TESTS}
    start_server([PAIR, *([COMPILERS] if PREPARE in modules else []), *(modules & {DETECTOR})])
    for module in modules:
        # While the server imports the same modules.
        import_module(module)
    failed = run_all(steps, log=given.out.absolute() / TESTS_LOG, limit=given.limit)
    for step in failed:
        print(f"failed: {step}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(run(main))
