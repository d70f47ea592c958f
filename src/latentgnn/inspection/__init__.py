"""See what blocks do: what each node takes from where, what the latents stand for, and whether a block is alive.

`capture` records, `Seen` answers.
"""

from latentgnn.inspection.recording import SeenBlock, SeenKernel, SeenSample
from latentgnn.inspection.seen import Node, Seen, capture

__all__ = ["Node", "Seen", "SeenBlock", "SeenKernel", "SeenSample", "capture"]
