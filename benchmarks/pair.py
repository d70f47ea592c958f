"""Two sides at one input, alone in a process: prints their times, ratios, memory and floor as one line of JSON.

python -m benchmarks.pair --shape C4 --norm batch --mode training --sides latentgnn,published
"""

import json
import statistics
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.floors import Rates, floor_seconds
from benchmarks.measure import (
    LEAST_SECONDS,
    device_seconds,
    held_bytes,
    peak_bytes,
    ratio,
    step_of,
    synchronize,
    take_turns,
)
from benchmarks.options import add_case_options, add_run_options, mode_of, program, require_device, run
from benchmarks.peer_checks import check, check_context, full_precision
from benchmarks.peers import (
    LAYER,
    SIDES,
    Refused,
    Side,
    make_input,
    make_layer,
    make_side,
)
from benchmarks.shapes import Case
from latentgnn import LatentGNN
from latentgnn.cost import floor_operations


def compare(
    case: Case,
    sides: tuple[str, str],
    *,
    rounds: int,
    least_seconds: float = LEAST_SECONDS,
    rates: Rates | None = None,
) -> dict[str, Any]:
    """Measure two sides.

    Args:
        case: the input, norm, mode and layout.
        sides: two names of `benchmarks.peers.SIDES`; ratios are of the second's time over the first's.
        rounds: measurements per side.
        least_seconds: the least duration of a measurement; smaller in tests.
        rates: what the floor is measured with; ``None`` for those of the case's device and type; smaller in tests.

    Returns:
        The ratios of a forward pass and of a step (forward and backward), the floor, and of each side its seconds, on a
        GPU also those that the GPU is busy, its forward time over the floor, and its held and peak bytes over the
        input's; or ``refused`` with the reason.

    Raises:
        UserError: a side's output is wrong.
    """
    layer = make_layer(case)
    x = make_input(case)
    try:
        built = {name: make_side(name, layer, case) for name in sides}
    except Refused as reason:
        return {"refused": str(reason)}
    _check(case, built, layer, x)

    device, dtype = torch.device(case.device), getattr(torch, case.dtype)
    rates = Rates(device, dtype) if rates is None else rates
    shape = case.input
    operations = floor_operations(shape.config, (shape.batch, shape.channels, *shape.spatial))
    size = x.numel() * x.element_size()
    products: list[dict[str, float]] = []
    bandwidths: list[float] = []

    def measure_rates() -> None:
        products.append(rates.products())
        bandwidths.append(rates.bandwidth())

    modules = [side.module for side in built.values()]
    with torch.no_grad():
        forwards = take_turns(
            [partial(module, x) for module in modules],
            rounds=rounds,
            device=device,
            least_seconds=least_seconds,
            between=measure_rates,
        )
    x.requires_grad_()
    grad = torch.randn_like(x)

    def step(module: nn.Module) -> Callable[[], None]:
        return step_of(partial(module, x), [x, *module.parameters()], grad)

    steps = take_turns([step(module) for module in modules], rounds=rounds, device=device, least_seconds=least_seconds)
    floors = [
        floor_seconds(operations, size, rate, bandwidth) for rate, bandwidth in zip(products, bandwidths, strict=True)
    ]
    result: dict[str, Any] = {
        "forward_ratio": ratio(forwards[1], forwards[0])._asdict(),
        "step_ratio": ratio(steps[1], steps[0])._asdict(),
        "floor_seconds": statistics.median(floors),
        "floor_operations": operations,
        "products_per_second": {name: statistics.median(rate[name] for rate in products) for name in products[0]},
        "bandwidth": statistics.median(bandwidths),
        "sides": {},
    }
    # Like the input of the forward passes above; for an input that needs a gradient, a compiler makes another graph.
    plain = x.detach()
    for index, (name, module) in enumerate(zip(sides, modules, strict=True)):
        with torch.no_grad():
            peak = peak_bytes(partial(module, plain), plain)
        result["sides"][name] = {
            "forward_seconds": statistics.median(forwards[index]),
            "step_seconds": statistics.median(steps[index]),
            "over_floor": ratio(forwards[index], floors)._asdict(),
            "held": held_bytes(module, x, module) / size,
            "peak": peak / size,
        }
        if device.type == "cuda":
            with torch.no_grad():
                forward = device_seconds(partial(module, plain))
            busy = {"forward_device_seconds": forward, "step_device_seconds": device_seconds(step(module))}
            result["sides"][name] |= busy
    return result


def compare_alone(case: Case, sides: tuple[str, str], rounds: int, threads: int | None) -> dict[str, Any]:
    """What `compare` gives, for a process that does nothing else.

    Args:
        case: as `compare` takes it.
        sides: as `compare` takes them.
        rounds: measurements per side.
        threads: number of torch threads; ``None`` for torch's default.

    Raises:
        UserError: a side's output is wrong.
    """
    if threads is not None:
        torch.set_num_threads(threads)
    return compare(case, sides, rounds=rounds)


def run_once(case: Case, side: str, threads: int | None) -> None:
    """Run a compiled side once in every way that `compare` does, so that its kernels are compiled and cached on disk.

    Args:
        case: as `compare` takes it.
        side: a name of `benchmarks.peers.SIDES`.
        threads: number of torch threads; ``None`` for torch's default.
    """
    if threads is not None:
        torch.set_num_threads(threads)
    try:
        module = make_side(side, make_layer(case), case).module
    except Refused:
        return
    x = make_input(case)
    with torch.no_grad():
        module(x)
    x.requires_grad_()
    step_of(partial(module, x), [x, *module.parameters()], torch.randn_like(x))()
    held_bytes(module, x, module)
    synchronize(x.device)


def _check(case: Case, sides: dict[str, Side], layer: LatentGNN, x: Tensor) -> None:
    with torch.no_grad():
        with full_precision():
            expected = make_side(LAYER, layer, case).module(x)
        for name, side in sides.items():
            check(name, side, x, expected)
            if not side.exact:
                side.module.eval()
                check_context(name, side.module, x)
                side.module.train(case.mode == "training")


def main(argv: list[str]) -> None:
    """Measure one pair.

    Args:
        argv: command-line arguments.
    """
    parser = program("pair", __doc__)
    add_case_options(parser)
    parser.add_argument("--layout", default="contiguous", choices=["contiguous", "channels-last"], help="(contiguous)")
    parser.add_argument("--sides", default="latentgnn,published", metavar="A,B", help=f"two of {', '.join(SIDES)}")
    add_run_options(parser)
    arguments = parser.parse_args(argv)
    sides = tuple(arguments.sides.split(","))
    if len(sides) != 2 or not set(sides) <= set(SIDES):
        parser.error(f"--sides: expected two of {', '.join(SIDES)}, with a comma between; got {arguments.sides!r}")
    mode = mode_of(parser, arguments)
    case = Case(arguments.shape, arguments.norm, mode, arguments.layout, arguments.device, arguments.dtype)
    if case.layout not in case.input.layouts:
        parser.error(f"--layout: {case.shape} can be {', '.join(case.input.layouts)}; got {case.layout}")
    require_device(case.device)
    print(json.dumps(compare_alone(case, (sides[0], sides[1]), arguments.rounds, arguments.threads)))


if __name__ == "__main__":
    sys.exit(run(main))
