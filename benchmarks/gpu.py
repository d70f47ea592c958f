"""All that needs a GPU, in one command: tests, the layer beside its peers in every form, and a detector's step.

benchmarks/gpu [--dry-run] [--only tests,layer,detector]
"""

import argparse
import os
import shlex
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from benchmarks.child import ROOT
from benchmarks.layer import LAYERS
from benchmarks.options import RESULTS, names_of, positive, require_device
from benchmarks.shapes import MODES, SHAPES
from latentgnn.errors import UserError

PARTS = ("tests", "layer", "detector")
DTYPES = ("float32", "bfloat16")
# The norms of detectors and of training from scratch; all four would take twice as long.
NORMS = ("batch", "frozen")


@dataclass(frozen=True)
class Step:
    """One command of the plan.

    Args:
        arguments: for the Python interpreter.
        triton: whether the Triton kernels are asked for.
    """

    arguments: tuple[str, ...]
    triton: bool = False

    def __str__(self) -> str:
        return f"LATENTGNN_TRITON={int(self.triton)} {shlex.join(['python', *self.arguments])}"


def plan(
    parts: Sequence[str] = PARTS,
    *,
    shapes: Sequence[str] = tuple(SHAPES),
    norms: Sequence[str] = NORMS,
    rounds: int = 7,
    out: Path = RESULTS,
) -> list[Step]:
    """The commands, in order.

    Args:
        parts: some of `PARTS`.
        shapes: names in `benchmarks.shapes.SHAPES`.
        norms: names in `benchmarks.shapes.MODES`.
        rounds: measurements of each side.
        out: where result files go.
    """
    steps = []
    common = ("--device", "cuda", "--rounds", str(rounds), "--out", str(out))
    if "tests" in parts:
        # By file names and test names: both contain what they are about.
        steps.append(Step(("-m", "pytest", "tests", "-k", "cuda or triton")))
    if "layer" in parts:
        inputs = ("--shapes", ",".join(shapes), "--norms", ",".join(norms))
        for dtype in DTYPES:
            for triton in (False, True):
                for first in LAYERS:
                    # In eager mode users replace the literal layer, or it under torch.compile; compiled, the latter.
                    peers = "published,compiled published" if first == LAYERS[0] else "compiled published"
                    sides = ("--first", first, "--peers", peers)
                    command = ("-m", "benchmarks.layer", *common, "--dtype", dtype, *inputs, *sides)
                    steps.append(Step(command, triton))
    if "detector" in parts:
        steps += [
            Step(("-m", "benchmarks.detector", *common, "--dtype", dtype), triton)
            for dtype in DTYPES
            for triton in (False, True)
        ]
    return steps


def run(step: Step) -> int:
    """Run one command from the repository's root, and return its exit code.

    Args:
        step: of the plan.
    """
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    env = {**os.environ, "PYTHONPATH": path, "LATENTGNN_TRITON": str(int(step.triton))}
    return subprocess.run([sys.executable, *step.arguments], cwd=ROOT, env=env, check=False).returncode


def main(argv: Sequence[str] | None = None) -> int:
    """Run the plan to its end, whatever fails on the way.

    Args:
        argv: the arguments; ``None`` takes the process's.

    Returns:
        The exit code: 1 where a command failed.
    """
    parser = argparse.ArgumentParser(prog="benchmarks/gpu", description=__doc__, allow_abbrev=False)
    names = partial(partial, names_of)
    parser.add_argument("--only", type=names(PARTS), default="all", metavar="PART,..", help=f"{', '.join(PARTS)} (all)")
    parser.add_argument("--shapes", type=names(SHAPES), default="all", metavar="NAME,..", help="(all)")
    parser.add_argument(
        "--norms", type=names(MODES), default=",".join(NORMS), metavar="NAME,..", help=f"({','.join(NORMS)})"
    )
    parser.add_argument("--rounds", type=positive, default=7, metavar="N", help="measurements of each side (7)")
    parser.add_argument("--out", type=Path, default=RESULTS, metavar="FOLDER", help="(benchmarks/results)")
    parser.add_argument("--dry-run", action="store_true", help="print the commands and run none")
    given = parser.parse_args(argv)
    steps = plan(given.only, shapes=given.shapes, norms=given.norms, rounds=given.rounds, out=given.out.absolute())
    if given.dry_run:
        print("\n".join(map(str, steps)))
        return 0
    try:
        require_device("cuda")
    except UserError:
        print("error: PyTorch sees no CUDA device here; --dry-run prints what would be run", file=sys.stderr)
        return 1
    failed = []
    for step in steps:
        print(f"+ {step}", flush=True)
        if run(step) != 0:
            failed.append(str(step))
    for command in failed:
        print(f"failed: {command}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
