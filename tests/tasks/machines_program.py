"""One of two machines: connects to the other one, and runs commands one after the other, given as JSON lists.

The commands share one connection, as the processes of a program that calls them would, so that a test needs one start.
"""

import json
import os
import sys

import torch

from latentgnn.cli import main

torch.set_num_threads(1)
os.environ.setdefault("RANK", os.environ["NODE_RANK"])
os.environ.setdefault("WORLD_SIZE", "2")
torch.distributed.init_process_group("gloo")
# What Lightning takes for the environment of another launcher.
for name in ("RANK", "WORLD_SIZE"):
    del os.environ[name]
for argv in json.loads(sys.argv[1]):
    code = main(argv)
    print(f"exit {code}", file=sys.stderr, flush=True)
    torch.distributed.barrier()
torch.distributed.destroy_process_group()
