"""One case of `benchmarks.streaming`, in its own process, whose memory is measured.

python -m benchmarks.streaming_case streaming 100000 --folder FOLDER
"""

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch

from benchmarks.memory import process_bytes
from benchmarks.options import positive, program, run
from latentgnn import FrozenBatchNorm, PackedLatentGNN
from latentgnn.arrays import apply_to_file

CHANNELS, LATENTS, REDUCTION = 32, 64, 4
MODES = ("streaming", "memory")
_ROWS = 1 << 18


def make_layer() -> PackedLatentGNN:
    """The layer of all cases: float32, frozen norms."""
    torch.manual_seed(0)
    return PackedLatentGNN(
        CHANNELS, num_latents=LATENTS, reduction=REDUCTION, norm=FrozenBatchNorm, node_scale="mean", gamma_init=0.5
    ).eval()


def make_array(path: Path, nodes: int) -> None:
    """Write a float16 array of nodes by channels, whose parts all differ.

    Args:
        path: a new ``.npy`` file.
        nodes: its rows.
    """
    part = np.random.default_rng(0).standard_normal((_ROWS, CHANNELS), dtype=np.float32)
    array = np.lib.format.open_memmap(path, mode="w+", dtype=np.float16, shape=(nodes, CHANNELS))
    offset = array.offset
    del array
    with path.open("r+b") as file:
        file.seek(offset)
        for index, first in enumerate(range(0, nodes, _ROWS)):
            rows = part[: nodes - first] * np.float32(1 + index / 1000)
            file.write(rows.astype(np.float16).data.cast("B"))


def stream(source: Path, target: Path) -> dict[str, float]:
    """Seconds of both sweeps, from disk to disk, and of all.

    Args:
        source: the array.
        target: a new file.
    """
    begun, ends = time.perf_counter(), {}

    def progress(sweep: str, nodes: int) -> None:
        ends[sweep] = time.perf_counter()

    apply_to_file(make_layer(), source, target, progress=progress)
    all_seconds = time.perf_counter() - begun
    return {"gather": ends["gather"] - begun, "scatter": ends["scatter"] - ends["gather"], "all": all_seconds}


def in_memory(source: Path, layer: PackedLatentGNN) -> Callable[[], dict[str, float]]:
    """Seconds from a float16 array in memory to one of the output in memory.

    Args:
        source: the array, which is read here.
        layer: from `make_layer`.
    """
    array = torch.from_numpy(np.load(source))

    def run() -> dict[str, float]:
        begun = time.perf_counter()
        with torch.no_grad():
            layer(array.float()[None]).half()
        return {"all": time.perf_counter() - begun}

    return run


def measure(mode: str, nodes: int, folder: Path, rounds: int) -> dict[str, Any]:
    """Time of a case, and resident memory in MiB.

    Args:
        mode: of `MODES`.
        nodes: N.
        folder: for the arrays; existing ones are used.
        rounds: measurements, after one on fewer nodes that does not count.
    """
    source, target = folder / f"{nodes}.npy", folder / "out.npy"
    for count in (min(nodes, 3 * _ROWS), nodes):
        if not (path := folder / f"{count}.npy").exists():
            make_array(path, count)
    # Warm up.
    small = folder / f"{min(nodes, 3 * _ROWS)}.npy"
    if mode == "streaming":
        stream(small, target)
        target.unlink()
    else:
        in_memory(small, make_layer())()
    before, seconds = process_bytes("VmRSS"), []
    run = in_memory(source, make_layer()) if mode == "memory" else lambda: stream(source, target)
    for _ in range(rounds):
        seconds.append(run())
        target.unlink(missing_ok=True)
    each = {part: 1e9 * median(one[part] for one in seconds) / nodes for part in seconds[0]}
    memory = {"resident": process_bytes("VmHWM") / 2**20, "before": before / 2**20}
    return {"mode": mode, "nodes": nodes, "nanoseconds": each, **memory}


def main(argv: list[str]) -> None:
    """Measure a case, and print it as JSON.

    Args:
        argv: command-line arguments.
    """
    parser = program("streaming_case", __doc__)
    parser.add_argument("mode", choices=MODES)
    parser.add_argument("nodes", type=positive)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--rounds", type=positive, default=3)
    parser.add_argument("--threads", type=positive)
    given = parser.parse_args(argv)
    if given.threads is not None:
        torch.set_num_threads(given.threads)
    print(json.dumps(measure(given.mode, given.nodes, given.folder, given.rounds)))


if __name__ == "__main__":
    sys.exit(run(main))
