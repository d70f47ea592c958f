"""See what blocks do: what each node takes from where, what the latents stand for, and whether a block is alive.

`capture` records one pass, and `Seen` answers; `summarize` goes over a data set; `report` says in a table and in words
whether blocks do something and what they cost.
"""

from latentgnn.inspection.recording import SeenBlock, SeenKernel, SeenSample
from latentgnn.inspection.reporting import BlockReport, Report, report
from latentgnn.inspection.seen import Node, Seen, capture
from latentgnn.inspection.statistics import BlockStatistics, GraphStatistics, RunningStatistics, Spread
from latentgnn.inspection.summary import summarize
from latentgnn.inspection.words import Finding, findings

__all__ = [
    "BlockReport",
    "BlockStatistics",
    "Finding",
    "GraphStatistics",
    "Node",
    "Report",
    "RunningStatistics",
    "Seen",
    "SeenBlock",
    "SeenKernel",
    "SeenSample",
    "Spread",
    "capture",
    "findings",
    "report",
    "summarize",
]
