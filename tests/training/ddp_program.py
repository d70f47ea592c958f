"""What `test_distributed` runs: a short training on two processes; Lightning starts the second itself."""

import os
import signal
import sys

from torch import nn
from training_toy import ToyTask, config, linear_model

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
    if mode == "unused" and call == 5 and run.writes:
        os.kill(os.getpid(), signal.SIGTERM)
    return float("nan") if mode == "nan" and call == 5 and not run.writes else None


run = RunFolder.create(folder, task="toy")
run.write_config({})
task = ToyTask(noise=False, model=Unused if mode == "unused" else linear_model)
task.on_losses = fail
settings = config(steps=6, accumulate=1, devices=2, clip_norm=None)
metrics = fit(task, settings, run)
print(f"process {'first' if run.writes else 'other'} got {metrics} from {len(task.scored)} scores", flush=True)
