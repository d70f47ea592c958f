"""See what blocks do: what each node takes from where, what the latents stand for, and whether a block is alive.

`capture` records, `Seen` answers.
"""

from latentgnn.inspection.recording import SeenBlock, SeenKernel, SeenSample
from latentgnn.inspection.seen import Node, Seen, capture
from latentgnn.inspection.statistics import BlockStatistics, GraphStatistics, RunningStatistics, Spread

__all__ = [
    "BlockStatistics",
    "GraphStatistics",
    "Node",
    "RunningStatistics",
    "Seen",
    "SeenBlock",
    "SeenKernel",
    "SeenSample",
    "Spread",
    "capture",
]
