"""The layer against the published arithmetic, in one run: time, and bytes held for the backward pass.

    python benchmarks/layer.py [--batch 2] [--rounds 7] [--threads 2]

Both sides take turns (A B A B) and the medians of the rounds' ratios are reported, because the speed of a shared
machine drifts. Each output is checked against the other's before it is timed. The result is printed as a table and
written, with hardware and versions, to benchmarks/results/.
"""

import argparse
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from latentgnn import FrozenBatchNorm, LatentGNN, reference
from latentgnn.files import write_json, write_text

# The paper's detection settings at 800 x 1333: channels, height, width and latents at C3, C4 and C5.
SHAPES = {"C3": (512, 100, 168, 150), "C4": (1024, 50, 84, 100), "C5": (2048, 25, 42, 50)}
NORMS = {"frozen": FrozenBatchNorm, "training": nn.BatchNorm1d}
REDUCTION = 8

Forward = Callable[[Tensor], Tensor]


def seconds(call: Callable[[], object]) -> float:
    """Wall-clock time of one call."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def product_rate(size: int = 2048) -> float:
    """Operations a second of a large square product."""
    a = torch.randn(size, size)
    a @ a
    return 2 * size**3 / min(seconds(lambda: a @ a) for _ in range(5))


def operations(channels: int, nodes: int, latents: int, *, graph_conv: bool) -> int:
    """Operations of a forward pass that remain after the algebra of the layer."""
    reduced = channels // REDUCTION
    if graph_conv:
        return nodes * (6 * channels * reduced + 8 * reduced * latents)
    return nodes * (4 * channels * reduced + 6 * reduced * latents + 2 * channels * latents)


def held_bytes(forward: Forward, x: Tensor, layer: nn.Module) -> int:
    """Bytes of all memory that the backward pass keeps alive, without parameters and buffers."""
    own = {t.untyped_storage().data_ptr() for t in [*layer.parameters(), *layer.buffers()]}
    held: dict[int, int] = {}

    def pack(saved: Tensor) -> Tensor:
        storage = saved.untyped_storage()
        if storage.data_ptr() not in own:
            held[storage.data_ptr()] = storage.nbytes()
        # Returned and thereby kept: a freed address would be given to another tensor and counted once.
        return saved

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda saved: saved):
        output = forward(x)
    del output
    return sum(held.values())


def step(forward: Forward, x: Tensor, layer: nn.Module, grad_output: Tensor) -> None:
    """A forward and a backward pass to the input and all parameters."""
    layer.zero_grad()
    x.grad = None
    forward(x).backward(grad_output)


def compare(name: str, *, graph_conv: bool, norm: str, batch: int, rounds: int, rate: float) -> dict[str, Any]:
    """One line of the table."""
    channels, height, width, latents = SHAPES[name]
    torch.manual_seed(0)
    layer = LatentGNN(
        channels, num_latents=latents, reduction=REDUCTION, graph_conv=graph_conv, norm=NORMS[norm], gamma_init=0.5
    )
    x = torch.randn(batch, channels, height, width, requires_grad=True)
    grad_output = torch.randn_like(x)
    ours: Forward = layer

    def theirs(x: Tensor) -> Tensor:
        return reference.forward(layer, x)

    with torch.no_grad():
        expected = theirs(x)
        error = float((ours(x) - expected).abs().max() / expected.abs().max())
    if error > 1e-4:
        raise SystemExit(f"{name}: the outputs differ by {error:.1e}; there is nothing to time")

    times: dict[str, list[float]] = {"ours": [], "theirs": [], "ours_step": [], "theirs_step": []}
    for _ in range(rounds):
        for key, forward in (("ours", ours), ("theirs", theirs)):
            with torch.no_grad():
                times[key].append(seconds(lambda forward=forward: forward(x)))  # type: ignore[misc]
        for key, forward in (("ours_step", ours), ("theirs_step", theirs)):
            times[key].append(seconds(lambda forward=forward: step(forward, x, layer, grad_output)))  # type: ignore[misc]

    def ratios(above: str, below: str) -> list[float]:
        return [a / b for a, b in zip(times[above], times[below], strict=True)]

    def spread(values: list[float]) -> dict[str, float]:
        return {"median": statistics.median(values), "min": min(values), "max": max(values)}

    floor = batch * operations(channels, height * width, latents, graph_conv=graph_conv) / rate
    size = x.numel() * x.element_size()
    return {
        "shape": [batch, *SHAPES[name][:3]],
        "stage": name,
        "latents": latents,
        "graph_conv": graph_conv,
        "norm": norm,
        "error": error,
        "forward_seconds": statistics.median(times["ours"]),
        "forward_speedup": spread(ratios("theirs", "ours")),
        "forward_over_floor": statistics.median(times["ours"]) / floor,
        "reference_over_floor": statistics.median(times["theirs"]) / floor,
        "step_seconds": statistics.median(times["ours_step"]),
        "step_speedup": spread(ratios("theirs_step", "ours_step")),
        "held": held_bytes(ours, x, layer) / size,
        "reference_held": held_bytes(theirs, x, layer) / size,
    }


def processor() -> str:
    """The name of the processor."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def table(rows: list[dict[str, Any]]) -> str:
    """The rows in Markdown."""
    lines = [
        "| stage | graph conv | norm | forward | against reference (spread) | over floor | step | against reference "
        "(spread) | held / input | reference held |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        forward, both = row["forward_speedup"], row["step_speedup"]
        lines.append(
            f"| {row['stage']} | {'yes' if row['graph_conv'] else 'no'} | {row['norm']} "
            f"| {1e3 * row['forward_seconds']:.0f} ms "
            f"| {forward['median']:.2f}x ({forward['min']:.2f} to {forward['max']:.2f}) "
            f"| {row['forward_over_floor']:.1f} (reference {row['reference_over_floor']:.1f}) "
            f"| {1e3 * row['step_seconds']:.0f} ms "
            f"| {both['median']:.2f}x ({both['min']:.2f} to {both['max']:.2f}) "
            f"| {row['held']:.2f} | {row['reference_held']:.2f} |"
        )
    return "\n".join(lines)


def main() -> None:
    """Run the comparison and write its result file."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0], allow_abbrev=False)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)

    rate = product_rate()
    rows = []
    for name in SHAPES:
        for graph_conv in (True, False):
            for norm in NORMS:
                row = compare(
                    name,
                    graph_conv=graph_conv,
                    norm=norm,
                    batch=arguments.batch,
                    rounds=arguments.rounds,
                    rate=rate,
                )
                rows.append(row)
                print(table([row]).splitlines()[-1], flush=True)
    text = table(rows)
    print(f"\n{text}")
    now = datetime.now(UTC)
    result = {
        "command": f"python benchmarks/layer.py {' '.join(sys.argv[1:])}".strip(),
        "date": now.isoformat(timespec="seconds"),
        "processor": processor(),
        "threads": arguments.threads,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "square_product_gflops": rate / 1e9,
        "rows": rows,
    }
    stem = arguments.out / f"layer-{now:%Y-%m-%d}-cpu"
    write_json(stem.with_suffix(".json"), result)
    head = json.dumps({key: value for key, value in result.items() if key != "rows"}, indent=2)
    write_text(stem.with_suffix(".md"), f"# The layer against the reference\n\n```json\n{head}\n```\n\n{text}\n")
    print(f"\nwritten to {stem.with_suffix('.md')} and .json")


if __name__ == "__main__":
    main()
