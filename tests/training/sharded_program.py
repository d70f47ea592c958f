"""What `test_sharded_runs` runs as two processes: the same training with copies of the model, and with parts of it."""

import os
import signal
import sys
from pathlib import Path

import torch
from torch import nn
from training_toy import ToyTask, config

from latentgnn.training.loop import fit
from latentgnn.training.runs import RunFolder
from latentgnn.training.stopping import TrainingStopped

STEPS = 6


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout(0.2))

    def forward(self, x):
        return x + self.inner(x)


def model() -> nn.Module:
    frozen = nn.Conv2d(3, 8, 3).requires_grad_(False)
    return nn.Sequential(frozen, nn.Sequential(Residual(), Residual()), nn.Flatten(), nn.Linear(288, 1))


def train(folder: Path, *, stop_after: int | None = None, resume: bool = False, **settings):
    """A run, or a part of it; seven samples to validate on are no whole number of batches."""

    def stop(call: int) -> None:
        if call == stop_after and run.writes:
            os.kill(os.getpid(), signal.SIGTERM)

    run = RunFolder.open(folder) if resume else RunFolder.create(folder, task="toy")
    if not resume:
        run.write_config({"model": {}})
    given = {"steps": STEPS, "accumulate": 1, "batch_size": 4, "clip_norm": 0.5, **settings}
    if given.pop("adamw", False):
        given["optimizer"] = type(config().optimizer)(name="adamw", learning_rate=0.01)
    try:
        fit(ToyTask(model=model, on_losses=stop, noise=False), config(**given), run, resume=resume)
    except TrainingStopped:
        if stop_after is None:
            raise


if __name__ == "__main__":
    torch.set_num_threads(1)
    os.environ |= {"RANK": os.environ["NODE_RANK"], "WORLD_SIZE": "2"}
    torch.distributed.init_process_group("gloo")
    # What Lightning takes for the environment of another launcher.
    for name in ("RANK", "WORLD_SIZE"):
        del os.environ[name]
    root, two = Path(sys.argv[1]), {"machines": 2}
    parts = {**two, "strategy": "fsdp"}
    train(root / "copies", **two)
    train(root / "parts", **parts)
    train(root / "recomputed", **parts, activation_checkpointing=True, accumulate=2, adamw=True)
    train(root / "copies-adamw", **two, accumulate=2, adamw=True)
    torch.distributed.barrier()
    train(root / "parts-then-copies", **parts, stop_after=3)
    torch.distributed.barrier()
    train(root / "parts-then-copies", **two, resume=True)
    train(root / "copies-then-parts", **two, stop_after=3)
    train(root / "to-be-one", **parts, stop_after=3)
    torch.distributed.barrier()
    train(root / "copies-then-parts", **parts, resume=True)
    # Begun by one process with two parts.
    train(root / "from-one", **parts, resume=True)
    torch.distributed.destroy_process_group()
