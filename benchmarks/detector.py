"""Times a detector's training step with and without blocks, in one process; prints and writes the result.

python -m benchmarks.detector [--device cuda] [--dtype bfloat16]
"""

import dataclasses
import statistics
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.child import run_forked, start_server
from benchmarks.measure import LEAST_SECONDS, ratio, step_of, take_turns
from benchmarks.options import (
    add_run_options,
    header,
    positive,
    program,
    require_device,
    result_stem,
    run,
    write_results,
)
from latentgnn.tasks.blocks import BlockConfig
from latentgnn.tasks.detection.config import ModelConfig
from latentgnn.tasks.detection.model import build_detector

# The paper's: one block after each of C3, C4 and C5, with graph convolution.
PAPER = ModelConfig(blocks={"C3": 150, "C4": 100, "C5": 50}, block=BlockConfig(graph_conv=True))
CLASSES = 80
# Height and width of the paper's images.
SIZE = (800, 1333)


def measure(
    config: ModelConfig,
    *,
    images: int,
    size: tuple[int, int],
    rounds: int,
    device: torch.device,
    dtype: torch.dtype,
    least_seconds: float = LEAST_SECONDS,
) -> dict[str, Any]:
    """A training step (losses, backward pass) of the same detector with and without its blocks.

    Args:
        config: of the detector with blocks.
        images: in a batch.
        size: of an image.
        rounds: measurements per side.
        device: where.
        dtype: of autocast; float32 for none.
        least_seconds: the least duration of a measurement; smaller in tests.
    """
    height, width = size
    batch = [torch.rand(3, height, width, device=device) for _ in range(images)]
    mask = torch.zeros(1, height, width, dtype=torch.uint8, device=device)
    mask[:, height // 4 : height // 2, width // 4 : width // 2] = 1
    box = torch.tensor([[width // 4, height // 4, width // 2, height // 2]], dtype=torch.float32, device=device)
    target = {"boxes": box, "labels": torch.ones(1, dtype=torch.int64, device=device), "masks": mask}

    def step(model: nn.Module) -> Callable[[], None]:
        def loss() -> Tensor:
            with torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32):
                losses: dict[str, Tensor] = model(batch, [target] * images)
            return torch.stack(list(losses.values())).sum()

        return step_of(loss, model.parameters())

    models = []
    for one in (config, dataclasses.replace(config, blocks={})):
        torch.manual_seed(0)
        models.append(build_detector(one, CLASSES).to(device).train())
    taken = take_turns([step(model) for model in models], rounds=rounds, device=device, least_seconds=least_seconds)
    return {
        "detector": config.detector,
        "backbone": config.backbone,
        "blocks": dict(config.blocks),
        "images": images,
        "size": list(size),
        "step_seconds": statistics.median(taken[0]),
        "step_seconds_without": statistics.median(taken[1]),
        "with_over_without": ratio(taken[0], taken[1])._asdict(),
    }


def measure_alone(images: int, rounds: int, device: str, dtype: str, threads: int | None) -> dict[str, Any]:
    """`measure` with the paper's blocks and images, for a process that does nothing else.

    Args:
        images: in a batch.
        rounds: measurements per side.
        device: ``cpu`` or ``cuda``.
        dtype: a type's name.
        threads: number of torch threads; ``None`` for torch's default.
    """
    if threads is not None:
        torch.set_num_threads(threads)
    return measure(
        PAPER, images=images, size=SIZE, rounds=rounds, device=torch.device(device), dtype=getattr(torch, dtype)
    )


def main(argv: list[str]) -> None:
    """Measure Mask R-CNN R-50 with the paper's blocks, and write ``detector-DATE-DEVICE.json``.

    Args:
        argv: command-line arguments.
    """
    parser = program("detector", __doc__, out=True)
    parser.add_argument("--images", type=positive, default=2, metavar="N", help="in a batch (2)")
    add_run_options(parser)
    given = parser.parse_args(argv)
    require_device(given.device)
    report = header("benchmarks.detector", argv, device=given.device, dtype=given.dtype, threads=given.threads)
    start_server(["benchmarks.detector"])
    report |= run_forked(measure_alone, given.images, given.rounds, given.device, given.dtype, given.threads)
    factor = report["with_over_without"]["median"]
    print(f"a step takes {1e3 * report['step_seconds']:.1f} ms with blocks, {factor:.2f} times as long as without")
    dtype = given.dtype if given.dtype != "float32" else ""
    write_results(result_stem(given.out, "detector", report, given.device, dtype), report)


if __name__ == "__main__":
    sys.exit(run(main))
