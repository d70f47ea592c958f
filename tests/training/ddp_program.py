"""What `test_distributed` runs: a short training on two processes; Fabric starts the second itself."""

import os
import signal
import sys
import time
from pathlib import Path

from torch import nn
from training_toy import ToyTask, config, linear_model

import latentgnn.training.lifeline
from latentgnn.errors import UserError
from latentgnn.training.loop import fit
from latentgnn.training.runs import RunFolder

folder, mode = sys.argv[1:]


class Unused(nn.Module):
    """A layer and, in some batches only, a second one."""

    def __init__(self) -> None:
        super().__init__()
        self.always = nn.Linear(192, 1)
        self.sometimes = nn.Linear(192, 1)

    def forward(self, images):
        flat = images.flatten(1)
        out = self.always(flat)
        return out + self.sometimes(flat) if flat[0, 0] > 0 else out


def fail(call):
    """In the fifth step, by the mode."""
    if call != 5:
        return None
    if mode == "unused" and run.writes:
        os.kill(os.getpid(), signal.SIGTERM)
    if (mode == "kill first" and run.writes) or (mode in ("kill other", "busy") and not run.writes):
        os.kill(os.getpid(), signal.SIGKILL)
    if mode == "busy":
        # Where no operation of several processes fails.
        latentgnn.training.lifeline._GRACE = 1
        time.sleep(600)
    return float("nan") if mode == "nan" and not run.writes else None


resume = (Path(folder) / "config.yaml").exists()
run = RunFolder.open(folder) if resume else RunFolder.create(folder, task="toy")
run.write_config({})
task = ToyTask(noise=False, model=Unused if mode == "unused" else linear_model)
task.on_losses = fail
settings = config(steps=6, accumulate=1, devices=2, clip_norm=None)
try:
    metrics = fit(task, settings, run, resume=resume)
except UserError as error:
    sys.exit(f"latentgnn: {error}")
print(f"process {'first' if run.writes else 'other'} got {metrics} from {len(task.scored)} scores", flush=True)
