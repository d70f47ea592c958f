"""Forward passes over many points, alone in a process: prints their times as one line of JSON.

python -m benchmarks.points packed alike        packed scenes against the same scenes padded to the largest
python -m benchmarks.points per-node 1000000    time a node
"""

import json
import statistics
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from benchmarks.measure import LEAST_SECONDS, ratio, take_turns
from benchmarks.options import positive, program, run
from latentgnn import FrozenBatchNorm, LatentGNN, PackedLatentGNN
from latentgnn.errors import UserError

# One scene, many alike, and one large among small ones.
SCENES: Mapping[str, Sequence[int]] = {
    "one": [1_000_000],
    "alike": [1000] * 1000,
    "mixed": [100_000, *[1000] * 9],
}
COUNTS = (10_000, 100_000, 1_000_000, 10_000_000)
CHANNELS, LATENTS = 96, 64


def packed_against_padded(
    sizes: Sequence[int],
    *,
    rounds: int,
    channels: int = CHANNELS,
    latents: int = LATENTS,
    least_seconds: float = LEAST_SECONDS,
) -> dict[str, Any]:
    """Scenes one after another against the same scenes padded to the largest, with a mask.

    Args:
        sizes: points of each scene.
        rounds: measurements per side.
        channels: C; smaller in tests.
        latents: D; smaller in tests.
        least_seconds: the least duration of a measurement; smaller in tests.

    Raises:
        UserError: the two do not give the same.
    """
    torch.manual_seed(0)
    layer = PackedLatentGNN(channels, num_latents=latents, norm=FrozenBatchNorm, gamma_init=0.5)
    x = torch.randn(sum(sizes), channels)
    offsets = torch.tensor([0, *sizes]).cumsum(0)
    mask = torch.arange(max(sizes)) < torch.tensor(sizes)[:, None]

    def packed() -> Tensor:
        return layer(x, offsets)

    def padded() -> Tensor:
        dense = x.new_zeros(len(sizes), max(sizes), channels)
        dense[mask] = x
        return layer(dense, mask=mask)[mask]

    with torch.no_grad():
        error = float((packed() - padded()).abs().max())
        if error > 1e-3:
            raise UserError(f"packed and padded differ by {error:.1e}; they were not timed")
        taken = take_turns([packed, padded], rounds=rounds, device=x.device, least_seconds=least_seconds)
    return {
        "scenes": len(sizes),
        "points": sum(sizes),
        "largest": max(sizes),
        "packed_seconds": statistics.median(taken[0]),
        "padded_over_packed": ratio(taken[1], taken[0])._asdict(),
    }


def per_node(count: int, *, rounds: int, channels: int = CHANNELS, latents: int = LATENTS) -> dict[str, float]:
    """The forward pass's time for each node.

    Args:
        count: number of nodes.
        rounds: measurements.
        channels: C; smaller in tests.
        latents: D; smaller in tests.
    """
    torch.manual_seed(0)
    layer = LatentGNN(channels, num_latents=latents, norm=FrozenBatchNorm, gamma_init=0.5)
    x = torch.randn(1, channels, count)
    with torch.no_grad():
        (taken,) = take_turns([lambda: layer(x)], rounds=rounds, device=x.device)
    return {"nodes": count, "nanoseconds": 1e9 * statistics.median(taken) / count}


def main(argv: list[str]) -> None:
    """Measure one set of points.

    Args:
        argv: command-line arguments.
    """
    parser = program("points", __doc__)
    kinds = parser.add_subparsers(dest="kind", required=True)
    packed = kinds.add_parser("packed", allow_abbrev=False)
    packed.add_argument("scenes", choices=list(SCENES))
    nodes = kinds.add_parser("per-node", allow_abbrev=False)
    nodes.add_argument("count", type=positive, metavar="NODES")
    for kind in (packed, nodes):
        kind.add_argument("--rounds", type=positive, default=5, metavar="N", help="(5)")
        kind.add_argument("--threads", type=positive, metavar="N", help="number of torch threads (torch's default)")
    given = parser.parse_args(argv)
    if given.threads is not None:
        torch.set_num_threads(given.threads)
    if given.kind == "packed":
        result: dict[str, Any] = packed_against_padded(SCENES[given.scenes], rounds=given.rounds)
    else:
        result = dict(per_node(given.count, rounds=given.rounds))
    print(json.dumps(result))


if __name__ == "__main__":
    sys.exit(run(main))
