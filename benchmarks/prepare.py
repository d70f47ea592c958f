"""Sides run once, untimed and several at a time, so that the tables' processes find on disk what must be compiled.

python -m benchmarks.prepare --device cuda --compiled C4,stage4-b8 --processes 16

PyTorch's compiler and Triton keep what they compile, in folders that TORCHINDUCTOR_CACHE_DIR and TRITON_CACHE_DIR name.
"""

import os
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from math import inf
from time import monotonic

from benchmarks.child import COMPILERS, PAIR, run_forked, start_server
from benchmarks.options import minutes, names_of, names_or_none, positive, program, require_device
from benchmarks.pair import run_once
from benchmarks.peers import LAYER, is_compiled
from benchmarks.shapes import MODES, SHAPES, Case, cases
from latentgnn.errors import UserError

DTYPES = ("float32", "bfloat16", "float16")
COMPILED = ("compiled latentgnn", "compiled published")


def prepare(
    jobs: Sequence[tuple[Case, str]], *, processes: int, threads: int | None = None, limit: float = inf
) -> list[str]:
    """Run each side once, in a process of its own.

    Args:
        jobs: cases, each with a side.
        processes: at a time.
        threads: of torch, as they will be when the sides are timed.
        limit: seconds after which none is begun.

    Returns:
        What failed, with the reason: their rows will fail as well, or take as long as compiling does.
    """
    end = monotonic() + limit

    def run(job: tuple[Case, str]) -> str | None:
        case, side = job
        try:
            if monotonic() > end:
                raise UserError("not begun within the limit")
            run_forked(run_once, case, side, threads)
        except UserError as error:
            return f"{case.name} {case.dtype}, {side}: {error}"
        return None

    with ThreadPoolExecutor(processes) as pool:
        return [failure for failure in pool.map(run, jobs) if failure is not None]


def main(argv: Sequence[str] | None = None) -> int:
    """Prepare the chosen inputs.

    Args:
        argv: the arguments; ``None`` takes the process's.

    Returns:
        The exit code: 1 where something failed.
    """
    parser = program("prepare", __doc__)
    names = partial(partial, names_of)
    parser.add_argument("--shapes", type=names(SHAPES), default="all", metavar="NAME,..", help="of the layer (all)")
    parser.add_argument(
        "--compiled",
        type=partial(names_or_none, SHAPES),
        default="all",
        metavar="NAME,..",
        help="of compiled sides, or none (all)",
    )
    parser.add_argument("--norms", type=names(MODES), default="all", metavar="NAME,..", help="(all)")
    parser.add_argument("--dtypes", type=names(DTYPES), default="float32", metavar="NAME,..", help="(float32)")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"], help="(cpu)")
    parser.add_argument("--threads", type=positive, metavar="N", help="of torch (torch's default)")
    parser.add_argument("--processes", type=positive, default=os.cpu_count() or 1, metavar="N", help="(one a core)")
    parser.add_argument("--limit", type=minutes, default=inf, metavar="MINUTES", help="begin none after them (none)")
    given = parser.parse_args(argv)
    try:
        require_device(given.device)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1

    def chosen(shapes: list[str]) -> list[Case]:
        return [
            case
            for dtype in given.dtypes
            for case in cases(
                shapes, given.norms, list(MODES["batch"]), ["contiguous"], device=given.device, dtype=dtype
            )
        ]

    # What takes longest comes first, so that no core has nothing to do at the end.
    jobs = [(case, side) for case in chosen(given.compiled) for side in COMPILED]
    jobs += [(case, LAYER) for case in chosen(given.shapes)]
    start = monotonic()
    start_server([PAIR, COMPILERS] if any(is_compiled(side) for _, side in jobs) else [PAIR])
    failures = prepare(jobs, processes=given.processes, threads=given.threads, limit=given.limit)
    print(f"prepared {len(jobs) - len(failures)} of {len(jobs)} sides in {monotonic() - start:.0f} s", flush=True)
    for failure in failures:
        print(failure, file=sys.stderr, flush=True)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
