"""Inspect blocks: what each node takes from where, what the latents stand for, and whether a block has an effect.

`capture` records one forward pass as `Seen`, which answers questions about it; `summarize` covers a data set; `report`
shows in a table and in words whether blocks have an effect and what they cost.
"""

from latentgnn.inspection.lines import Node
from latentgnn.inspection.recording import SeenBlock, SeenKernel, SeenSample
from latentgnn.inspection.reporting import BlockReport, Report, report
from latentgnn.inspection.seen import Seen, capture
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
