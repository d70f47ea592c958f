"""What `test_killed_runs` runs: trainings of the toy task, each killed inside the writing of a file."""

import os
import sys
from pathlib import Path

from killing import kill_in
from training_toy import ToyTask, config, new_run

from latentgnn.training.loop import fit

# Of each run: its name; the file in whose writing it is killed, for which time; and where in it.
KILLS = {
    "begun": ("last.ckpt", 2, "created"),
    "half written": ("last.ckpt", 2, "half"),
    "complete": ("last.ckpt", 2, "complete"),
    "linked": ("last.ckpt", 2, "linked"),
    "previous": ("last.ckpt", 2, "previous"),
    "renamed": ("last.ckpt", 2, "renamed"),
    "first": ("last.ckpt", 1, "half"),
    "the last step": ("last.ckpt", 5, "half"),
    "best": ("best.ckpt", 1, "half"),
    "best renamed": ("best.ckpt", 1, "renamed"),
    "validations": ("validations.json", 1, "half"),
    "course": ("metrics.csv", 2, "half"),
    "metrics": ("metrics.json", 1, "complete"),
}


if __name__ == "__main__":
    for run_name, kill in KILLS.items():
        child = os.fork()
        if not child:
            kill_in(*kill)
            fit(ToyTask(), config(), new_run(Path(sys.argv[1]) / run_name))
            os._exit(0)
        _, status = os.waitpid(child, 0)
        print(f"{run_name}: {os.WTERMSIG(status) if os.WIFSIGNALED(status) else 'not killed'}", flush=True)
