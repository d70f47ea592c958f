"""Runs compiled sides once, untimed and in parallel, so that the tables' processes find compiled code on disk.

python -m benchmarks.prepare --device cuda --shapes C4,stage4-b8 --processes 16

PyTorch's compiler and Triton keep what they compile, in folders that TORCHINDUCTOR_CACHE_DIR and TRITON_CACHE_DIR name.
"""

import os
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from math import inf
from pathlib import Path
from time import monotonic

from benchmarks.child import COMPILERS, MOST_SECONDS, PAIR, run_forked, start_server
from benchmarks.options import add_names_option, minutes, positive, program, require_device, run
from benchmarks.pair import run_once
from benchmarks.shapes import MODES, SHAPES, Case, cases
from latentgnn.errors import UserError
from latentgnn.files.writing import write_json

DTYPES = ("float32", "bfloat16", "float16")
# For rows of the eager layer, the first is enough.
COMPILED = ("compiled published", "compiled latentgnn")


def job_name(case: Case, side: str) -> str:
    """The name of a side and a case in the list of those that are prepared.

    Example:
        >>> job_name(Case("C4"), "compiled published")
        'C4 batch evaluation contiguous cpu float32, compiled published'
    """
    return f"{case.name} {case.device} {case.dtype}, {side}"


def prepare(
    jobs: Sequence[tuple[Case, str]], *, processes: int, threads: int | None = None, limit: float = inf
) -> dict[str, str]:
    """Run each side once, in a process of its own.

    Args:
        jobs: cases, each with a side.
        processes: at a time.
        threads: of torch, as they will be when the sides are timed.
        limit: seconds after which no job starts and running ones are ended.

    Returns:
        The names of those that were not prepared, with the reason.
    """
    end = monotonic() + limit

    def run(job: tuple[Case, str]) -> str | None:
        case, side = job
        left = end - monotonic()
        try:
            if left <= 0:
                raise UserError("not begun within the limit")
            run_forked(run_once, case, side, threads, seconds=min(left, MOST_SECONDS))
        except UserError as error:
            return str(error)
        return None

    with ThreadPoolExecutor(processes) as pool:
        reasons = zip(jobs, pool.map(run, jobs), strict=True)
        return {job_name(*job): reason for job, reason in reasons if reason is not None}


def main(argv: list[str]) -> int:
    """Prepare the chosen inputs.

    Args:
        argv: command-line arguments.

    Returns:
        The exit code: 1 where something failed.
    """
    parser = program("prepare", __doc__)
    add_names_option(parser, "--shapes", SHAPES)
    add_names_option(parser, "--norms", MODES)
    add_names_option(parser, "--dtypes", DTYPES, default="float32")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"], help="(cpu)")
    parser.add_argument("--threads", type=positive, metavar="N", help="number of torch threads (torch's default)")
    parser.add_argument("--processes", type=positive, default=os.cpu_count() or 1, metavar="N", help="(one a core)")
    parser.add_argument("--limit", type=minutes, default=inf, metavar="MINUTES", help="end all after them (none)")
    parser.add_argument("--record", type=Path, metavar="FILE", help="list there what was prepared, as JSON (nowhere)")
    given = parser.parse_args(argv)
    require_device(given.device)

    # Input by input: if time runs out, the first inputs are complete.
    jobs = [
        (case, side)
        for shape in given.shapes
        for dtype in given.dtypes
        for case in cases([shape], given.norms, list(MODES["batch"]), ["contiguous"], device=given.device, dtype=dtype)
        for side in COMPILED
    ]
    start = monotonic()
    start_server([PAIR, COMPILERS])
    failures = prepare(jobs, processes=given.processes, threads=given.threads, limit=given.limit)
    print(f"prepared {len(jobs) - len(failures)} of {len(jobs)} sides in {monotonic() - start:.0f} s", flush=True)
    if given.record is not None:
        write_json(given.record, [name for name in (job_name(*job) for job in jobs) if name not in failures])
    for name, reason in failures.items():
        print(f"{name}: {reason}", file=sys.stderr, flush=True)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(run(main))
