"""The GPU kernels of one side, with the time of each, in a forward pass and in a step.

python -m benchmarks.gpu_time --shape C3 --norm frozen --dtype float32 [--side "compiled published"]

Prints two tables, the mean of three runs after a warm-up, and writes nothing.
"""

import re
import sys
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, Protocol

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.measure import step_of
from benchmarks.options import add_case_options, mode_of, program, require_device, run
from benchmarks.peers import LAYER, SIDES, Refused, make_input, make_layer, make_side
from benchmarks.report import markdown_table
from benchmarks.shapes import Case
from latentgnn.errors import UserError

RUNS = 3
_LONGEST = 60


class Event(Protocol):
    """An event of the profiler: a kernel, a copy or a fill, or by its `device_type` something on the CPU."""

    name: str
    device_type: Any
    device_time: float


def shortened(name: str) -> str:
    """A kernel's name without return type, arguments and namespaces, cut to one line.

    Args:
        name: as the profiler has it.

    Example:
        >>> shortened("void at::native::(anonymous namespace)::copy_kernel<4, at::native::Add<float> >(int, float*)")
        'copy_kernel<4, Add<float> >'
        >>> shortened("_gather_kernel")
        '_gather_kernel'
        >>> shortened("Memcpy DtoD (Device -> Device)")
        'Memcpy DtoD'
    """
    name = re.sub(r"\(anonymous namespace\)::", "", name.removeprefix("void "))
    name = re.sub(r"\b(?:[A-Za-z_]\w*::)+", "", name)
    name = name.split("(")[0].strip() or name
    return name if len(name) <= _LONGEST else name[: _LONGEST - 3] + "..."


def table(events: Iterable[Event], runs: int) -> str:
    """What ran on the GPU, longest first, with calls and time per run, and their sums.

    Args:
        events: of the profiler, of all runs; their times are in microseconds.
        runs: the number of runs; fewer in tests.
    """
    taken: dict[str, list[float]] = {}
    for event in events:
        if event.device_type.name == "CUDA":
            taken.setdefault(shortened(event.name), []).append(event.device_time)
    sums = {name: (len(times) / runs, sum(times) / runs) for name, times in taken.items()}
    ordered = sorted(sums.items(), key=lambda item: -item[1][1])
    rows = [[name, f"{count:g}", f"{time:.1f}"] for name, (count, time) in ordered]
    total = [f"{sum(count for count, _ in sums.values()):g}", f"{sum(time for _, time in sums.values()):.1f}"]
    return markdown_table(["kernel", "calls", "microseconds"], [*rows, ["together", *total]])


def profiled(call: Callable[[], object]) -> str:
    """The table of a call, the mean of `RUNS`.

    Args:
        call: what is profiled, after one untimed call.
    """
    call()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA], acc_events=True) as profiler:
        for _ in range(RUNS):
            call()
        torch.cuda.synchronize()
    return table(profiler.events() or [], RUNS)


def main(argv: list[str]) -> None:
    """Print the kernels of one side.

    Args:
        argv: command-line arguments.
    """
    parser = program("gpu_time", __doc__)
    add_case_options(parser)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"], help="(float32)")
    parser.add_argument("--side", default=LAYER, choices=SIDES, metavar="NAME", help=f"{', '.join(SIDES)} ({LAYER})")
    given = parser.parse_args(argv)
    case = Case(given.shape, given.norm, mode_of(parser, given), "contiguous", "cuda", given.dtype)
    require_device(case.device)
    try:
        module = make_side(given.side, make_layer(case), case).module
    except Refused as error:
        raise UserError(f"{given.side}: {error}") from error
    x = make_input(case)
    with torch.no_grad():
        forward = profiled(partial(module, x))
    x.requires_grad_()
    step = profiled(step_of(partial(module, x), [x, *module.parameters()], torch.randn_like(x)))
    for what, made in (("forward pass", forward), ("step", step)):
        print(f"{given.side}, {case.name} {case.dtype}, {what}, a mean of {RUNS} runs:\n\n{made}\n")


if __name__ == "__main__":
    sys.exit(run(main))
