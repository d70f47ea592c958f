"""What activation checkpointing and FSDP2 save of memory, on large backbones, by the project's own training steps.

python -m benchmarks.memory_settings [--model resnet101] [--size 224] [--batch 8] [--steps 1]

A backbone of torchvision's with random weights learns to classify random images, with AdamW. Each side is a fresh
process, or two that are joined by gloo, with one thread each. Memory is a process's peak in the steps after the first
(``VmHWM``), less what it held before the model was made; of two processes, the larger. glibc returns tensors of a
megabyte or more to the system when they are freed (``MALLOC_MMAP_THRESHOLD_``), so that only memory in use is
counted. Prints and writes ``memory-settings-DATE-MODEL.json`` and ``.md``.
"""

import argparse
import json
import socket
import sys
from functools import partial
from itertools import repeat
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.child import run_together
from benchmarks.memory import process_bytes
from benchmarks.options import header, positive, program, result_stem, run, write_results
from benchmarks.report import markdown_table

SIDES = [
    {"processes": processes, "strategy": strategy, "activation_checkpointing": on}
    for processes, strategy in ((1, "ddp"), (2, "ddp"), (2, "fsdp"))
    for on in (False, True)
]


class Classification:
    """The part of a task that training steps use."""

    trained = ()

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def units(self) -> list[nn.Module]:
        from latentgnn.training.large_models import units

        return units(self.model)

    def losses(self, batch: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
        return {"cross_entropy": nn.functional.cross_entropy(self.model(batch[0]), batch[1])}


def measure(model: str, size: int, batch: int, steps: int, side: dict[str, Any]) -> dict[str, float]:
    """One process's part of a side, in megabytes."""
    from torchvision.models import get_model

    from latentgnn.training.config import OptimizerConfig, TrainingConfig
    from latentgnn.training.devices import launch, make_fabric
    from latentgnn.training.large_models import sharding_strategy
    from latentgnn.training.steps import OptimizerSteps

    torch.set_num_threads(1)
    world = side["processes"]
    config = TrainingConfig(
        steps=steps + 1,
        batch_size=batch * world,
        accelerator="cpu",
        devices=1,
        machines=world,
        strategy=side["strategy"],
        activation_checkpointing=side["activation_checkpointing"],
        optimizer=OptimizerConfig(name="adamw", learning_rate=1e-4),
    )
    generator = torch.Generator().manual_seed(0)
    images, labels = torch.rand(batch, 3, size, size, generator=generator), torch.arange(batch)
    before = process_bytes("VmRSS")
    task: Any = Classification(get_model(model, weights=None))
    several = partial(sharding_strategy, task.model, task.units()) if side["strategy"] == "fsdp" else None
    fabric = make_fabric(config, [], several=several)
    disconnect = launch(fabric, config)
    learning = OptimizerSteps(fabric, task, config, None)
    batches = repeat((images, labels))
    learning.take(batches)
    # Reset the system's peak.
    Path("/proc/self/clear_refs").write_text("5")
    for _ in range(steps):
        learning.take(batches)
    disconnect()
    return {"megabytes": (process_bytes("VmHWM") - before) / 1e6}


def measure_alone(side: dict[str, Any], settings: dict[str, Any]) -> dict[str, float]:
    """Measure a side in processes of its own.

    Raises:
        UserError: one of them failed.
    """
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = str(server.getsockname()[1])
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": "1"}
    common["MALLOC_MMAP_THRESHOLD_"] = str(2**20)
    environments = [{**common, "NODE_RANK": str(rank)} for rank in range(side["processes"])]
    child = ["--child", json.dumps({**settings, "side": side})]
    results = run_together("benchmarks.memory_settings", child, environments)
    return {name: max(result[name] for result in results) for name in results[0]}


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as Markdown, beside the plain setting of as many processes."""
    head = ["model", "processes", "strategy", "activation checkpointing", "memory, MB", "of the plain setting's"]
    cells = []
    # The first of each is the plain one.
    plain = {(row["model"], row["processes"]): row for row in reversed(rows)}
    for row in rows:
        beside = plain[row["model"], row["processes"]]
        strategy = row["strategy"] if row["processes"] > 1 else "-"
        again = "yes" if row["activation_checkpointing"] else "no"
        megabytes = [f"{row['megabytes']:.0f}", f"{row['megabytes'] / beside['megabytes']:.2f}"]
        cells.append([row["model"], str(row["processes"]), strategy, again, *megabytes])
    return markdown_table(head, cells)


def main(argv: list[str]) -> None:
    """Measure, and write the result files.

    Args:
        argv: command-line arguments.
    """
    parser = program("memory_settings", __doc__, out=True)
    parser.add_argument("--model", default="resnet101", help="a name of torchvision's")
    parser.add_argument("--size", type=positive, default=224, help="side of the images")
    parser.add_argument("--batch", type=positive, default=8, help="images a process")
    parser.add_argument("--steps", type=positive, default=1, help="steps that are measured")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    if arguments.child is not None:
        print(json.dumps(measure(**json.loads(arguments.child))))
        return
    rows = []
    settings = {name: getattr(arguments, name) for name in ("model", "size", "batch", "steps")}
    for side in SIDES:
        rows.append({**settings, **side, **measure_alone(side, settings)})
        print(rows[-1], flush=True)
    about = header("benchmarks.memory_settings", argv, device="cpu", dtype="float32", threads=1) | settings
    shown = "\n".join(f"- {key}: {value}" for key, value in about.items())
    print(table(rows))
    text = f"# Memory of a training step\n\n{shown}\n\n{table(rows)}\n"
    write_results(result_stem(arguments.out, "memory-settings", about, arguments.model), {**about, "rows": rows}, text)


if __name__ == "__main__":
    sys.exit(run(main))
