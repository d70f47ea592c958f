"""Nodes shared between processes of this machine: bytes, time, efficiency and memory.

python -m benchmarks.sharding                         # all parts
python -m benchmarks.sharding --parts bytes,memory    # some

What a projection to more processes needs is in the JSON: ``layer`` (sizes, operations a node, bytes of all-reduces),
``throughput`` (seconds of a forward pass and of a step, for nodes of all processes together, processes, and threads of
each), ``all_reduce`` (seconds for bytes), ``latency_seconds`` and ``bytes_per_second``.
"""

import json
import re
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.multiprocessing.spawn import start_processes

from benchmarks.child import ROOT
from benchmarks.measure import seconds
from benchmarks.options import (
    add_names_option,
    header,
    positive,
    program,
    result_stem,
    run,
    save_results,
    write_results,
)
from benchmarks.report import header_block, markdown_table
from latentgnn import LatentGNNConfig, PackedLatentGNN, shard_nodes
from latentgnn.cost import cost
from latentgnn.errors import UserError

PARTS = ("bytes", "all_reduce", "throughput", "memory")
CONFIG = LatentGNNConfig(channels=256, num_latents=64, graph_conv=True, norm="frozen_batch_norm", gamma_init=0.5)
# Nodes of all processes together.
COUNTED = (1_000, 10_000, 100_000)
TIMED = (4_096, 65_536, 262_144)
# Processes, and threads of each.
LAYOUTS = ((1, 1), (1, 2), (2, 1))
# Of the image whose step is measured for its memory.
HEIGHT, WIDTH = 1024, 1024
BYTES = tuple(1 << power for power in range(8, 25, 2))


def in_processes(count: int, threads: int, work: Callable[[], Any]) -> list[Any]:
    """The results of a function that runs in several processes with a process group.

    Args:
        count: of processes.
        threads: of torch, in each.
        work: the function; its result must be JSON.
    """
    with tempfile.TemporaryDirectory() as folder:
        start_processes(_started, args=(count, threads, work, folder), nprocs=count)
        return [json.loads((Path(folder) / f"{rank}.json").read_text()) for rank in range(count)]


def _started(rank: int, count: int, threads: int, work: Callable[[], Any], folder: str) -> None:
    torch.set_num_threads(threads)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=count)
    (Path(folder) / f"{rank}.json").write_text(json.dumps(work()))
    dist.destroy_process_group()


def _step(nodes: int) -> tuple[Callable[[], Any], Callable[[], Any]]:
    """A forward pass and a step on this process's share of the nodes."""
    torch.manual_seed(dist.get_rank())
    layer = PackedLatentGNN.from_config(CONFIG)
    for parameter in layer.parameters():
        dist.broadcast(parameter.data, 0)
    shard_nodes(layer, dist.group.WORLD if dist.get_world_size() > 1 else None)
    x = torch.randn(1, nodes // dist.get_world_size(), CONFIG.channels, requires_grad=True)
    grad = torch.randn_like(x)

    def forward() -> None:
        with torch.no_grad():
            layer(x)

    return forward, lambda: layer(x).backward(grad)


def counted_bytes() -> list[dict[str, Any]]:
    """Bytes of each all-reduce of a forward pass, and of a whole step, for `COUNTED` nodes."""
    from torch.profiler import ProfilerActivity, profile

    rows = []
    for nodes in COUNTED:
        found = []
        for call in _step(nodes):
            call()
            with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as profiler:
                call()
            events = [event for event in profiler.events() or [] if event.name == "gloo:all_reduce"]
            found.append([4 * int(event.input_shapes[0][0]) for event in events])
        rows.append({"nodes": nodes, "forward": found[0], "step": found[1]})
    return rows


def timed_steps(rounds: int) -> list[dict[str, Any]]:
    """Median seconds of a forward pass and of a step of `TIMED` nodes, until the last process has finished.

    Args:
        rounds: measurements.
    """
    rows = []
    for nodes in TIMED:
        forward, step = _step(nodes)
        taken = {"forward_seconds": _seconds_of_all(forward, rounds), "step_seconds": _seconds_of_all(step, rounds)}
        rows.append({"nodes": nodes, **taken})
    return rows


def _seconds_of_all(call: Callable[[], Any], rounds: int, repeats: int = 1) -> float:
    taken = []
    for turn in range(rounds + 2):
        dist.barrier()
        own = torch.tensor(seconds(call, torch.device("cpu"), repeats), dtype=torch.float64)
        dist.all_reduce(own, op=dist.ReduceOp.MAX)
        if turn >= 2:
            taken.append(float(own))
    return statistics.median(taken)


def timed_all_reduces(rounds: int) -> list[dict[str, float]]:
    """Seconds of an all-reduce for a number of bytes.

    Args:
        rounds: measurements per side.
    """
    found = []
    for size in BYTES:
        buffer = torch.ones(size // 4)
        repeats = max(min(200, (1 << 22) // size), 2)
        found.append({"bytes": size, "seconds": _seconds_of_all(partial(dist.all_reduce, buffer), rounds, repeats)})
    return found


def throughput(rounds: int) -> list[dict[str, Any]]:
    """Steps of `LAYOUTS`, with their efficiency over one process of one thread.

    Args:
        rounds: measurements per side.
    """
    rows: list[dict[str, Any]] = []
    for processes, threads in LAYOUTS:
        (measured, *_) = in_processes(processes, threads, partial(timed_steps, rounds))
        rows += [{"processes": processes, "threads": threads, **one} for one in measured]
        for row, alone in zip(rows[-len(TIMED) :], rows, strict=False):
            for what in ("forward", "step"):
                faster = alone[f"{what}_seconds"] / row[f"{what}_seconds"]
                row[f"{what}_efficiency"] = faster / (processes * threads)
    return rows


def memory() -> list[dict[str, Any]]:
    """Memory that a step of ``examples/sharded_strips.py`` adds in each process.

    Raises:
        UserError: the example failed.
    """
    rows = []
    for processes in (1, 2, 4):
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
        command += ["examples/sharded_strips.py", f"--height={HEIGHT}", f"--width={WIDTH}", "--no-check"]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        found = re.findall(r"process \d+ of \d+: (\d+) rows, (\d+) MiB", done.stdout)
        if done.returncode or len(found) != processes:
            raise UserError(f"{' '.join(command[1:])} ended with code {done.returncode}:\n{done.stderr[-2000:]}")
        each = [int(mebibytes) for _, mebibytes in found]
        rows.append({"processes": processes, "height": HEIGHT, "width": WIDTH, "mebibytes": each})
    return rows


def layer_of_measurements() -> dict[str, Any]:
    """Sizes of the layer, operations per node, and the expected bytes of an all-reduce."""
    nodes = 1000
    of_layer = cost(CONFIG, (1, CONFIG.channels, nodes), held=False)
    reduced, latents = CONFIG.reduced_channels, sum(CONFIG.latents)
    return {
        "channels": CONFIG.channels,
        "reduced_channels": reduced,
        "latents": latents,
        "norm": "frozen_batch_norm",
        "forward_operations_per_node": of_layer.forward_operations / nodes,
        "step_operations_per_node": (of_layer.forward_operations + of_layer.backward_operations) / nodes,
        "forward_bytes": 4 * latents * (reduced + 1),
        "backward_bytes": 4 * latents * reduced,
    }


def markdown(report: Mapping[str, Any]) -> str:
    """A report for reading.

    Args:
        report: as written to JSON.
    """
    parts = ["# Nodes shared between processes of one machine", header_block(report, PARTS)]
    if "bytes" in report:
        rows = [[f"{one['nodes']:,}", str(one["forward"]), str(one["step"])] for one in report["bytes"]]
        parts += ["Bytes of each all-reduce:", markdown_table(["nodes", "forward", "step"], rows)]
    if "all_reduce" in report:
        rows = [[f"{one['bytes']:,}", f"{1e6 * one['seconds']:.0f} us"] for one in report["all_reduce"]]
        parts += ["An all-reduce of two processes, by gloo:", markdown_table(["bytes", "time"], rows)]
    if "throughput" in report:
        rows = []
        for one in report["throughput"]:
            cells = [f"{one['nodes']:,}", f"{one['processes']} x {one['threads']}"]
            cells += [
                f"{1e3 * one[f'{what}_seconds']:.1f} ms ({one[f'{what}_efficiency']:.2f})"
                for what in ("forward", "step")
            ]
            rows.append(cells)
        head_row = ["nodes", "processes x threads", "forward (efficiency)", "step (efficiency)"]
        parts += [
            "Efficiency: how many times as fast as one process of one thread, over processes times threads:",
            markdown_table(head_row, rows),
        ]
    if "memory" in report:
        rows = [[str(one["processes"]), ", ".join(map(str, one["mebibytes"]))] for one in report["memory"]]
        parts += [
            "A step of `examples/sharded_strips.py`, what each process takes beyond what it had before:",
            markdown_table(["processes", "MiB"], rows),
        ]
    return "\n\n".join(parts) + "\n"


def main(argv: list[str]) -> None:
    """Measure the chosen parts on the CPU, and write ``sharding-DATE-cpu`` as JSON and Markdown.

    Args:
        argv: command-line arguments.
    """
    parser = program("sharding", __doc__, out=True)
    add_names_option(parser, "--parts", PARTS, ", ".join(PARTS))
    parser.add_argument("--rounds", type=positive, default=7, metavar="N", help="measurements of each (7)")
    given = parser.parse_args(argv)
    report = header("benchmarks.sharding", argv, device="cpu", dtype="float32", threads=1)
    report["layer"] = layer_of_measurements()
    stem = result_stem(given.out, "sharding", report, "cpu")
    for part in given.parts:
        if part == "bytes":
            report[part] = in_processes(2, 1, counted_bytes)[0]
        elif part == "all_reduce":
            report[part] = in_processes(2, 1, partial(timed_all_reduces, given.rounds))[0]
            report["latency_seconds"] = report[part][0]["seconds"]
            report["bytes_per_second"] = report[part][-1]["bytes"] / report[part][-1]["seconds"]
        elif part == "throughput":
            report[part] = throughput(given.rounds)
        else:
            report[part] = memory()
        save_results(stem, report, markdown(report))
    print(markdown(report))
    write_results(stem, report, markdown(report))


if __name__ == "__main__":
    sys.exit(run(main))
