"""What `test_faults` runs: a long training with loading processes, to which something happens from outside."""

import multiprocessing
import os
import signal
import sys

from training_toy import ToyTask, config

from latentgnn.errors import UserError
from latentgnn.training.loop import fit
from latentgnn.training.runs import RunFolder

folder, mode = sys.argv[1:]


def happen(call):
    if mode == "kill" and call == 5:
        print(*(child.pid for child in multiprocessing.active_children()), flush=True)
        os.kill(os.getpid(), signal.SIGKILL)
    if mode == "terminal" and call == 5:
        # What a terminal and a batch system do: every process of the run gets the signal.
        os.killpg(0, signal.SIGINT)
        os.killpg(0, signal.SIGTERM)
    if mode == "hang-up" and call == 5:
        print("ready", flush=True)
        signal.sigwait({signal.SIGUSR2})
        os.kill(os.getpid(), signal.SIGHUP)


signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR2})
# Who runs the tests with `nohup` ignores it, and so would a run.
signal.signal(signal.SIGHUP, signal.SIG_DFL)
run = RunFolder.create(folder, task="toy")
run.write_config({})
settings = config(steps=1000, workers=2, log_every=1)
try:
    fit(ToyTask(on_losses=happen), settings, run)
except UserError as error:
    sys.exit(f"latentgnn: {error}")
