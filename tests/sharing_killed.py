"""A process of three, by torch's own variables of the environment, of which the second is killed between two steps."""

import os
import signal
import sys

import torch
import torch.distributed as dist

from latentgnn import LatentGNN, shard_nodes


def main() -> None:
    """Steps without end; the second process kills itself before its third."""
    torch.set_num_threads(1)
    torch.manual_seed(0)  # all processes begin with the same weights
    dist.init_process_group("gloo")
    layer = shard_nodes(LatentGNN(16, num_latents=4, gamma_init=1.0), dist.group.WORLD)
    for step in range(1000):
        if dist.get_rank() == 1 and step == 3:
            os.kill(os.getpid(), signal.SIGKILL)
        layer(torch.randn(1, 16, 6)).sum().backward()


if __name__ == "__main__":
    sys.exit(main())
