"""Global context at linear cost: the LatentGNN layer (ICML 2019, arXiv 1905.11634) and what surrounds it."""

from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from latentgnn import inspection, norms, paths, reference
    from latentgnn.checkpoints import load_published, published_state_dict
    from latentgnn.config import LatentGNNConfig
    from latentgnn.insertion import insert, remove
    from latentgnn.inspection.reporting import report
    from latentgnn.inspection.seen import capture
    from latentgnn.layer import LatentGNN
    from latentgnn.masks import node_mask
    from latentgnn.norms import FrozenBatchNorm
    from latentgnn.points import PackedLatentGNN
    from latentgnn.sharding import shard_nodes
    from latentgnn.streaming import Chunk, backward_chunk, gather_chunks, scatter_chunk
    from latentgnn.sums import LatentSums
    from latentgnn.tasks.loading import load_run

__all__ = [
    "Chunk",
    "FrozenBatchNorm",
    "LatentGNN",
    "LatentGNNConfig",
    "LatentSums",
    "PackedLatentGNN",
    "backward_chunk",
    "capture",
    "gather_chunks",
    "insert",
    "inspection",
    "load_published",
    "load_run",
    "node_mask",
    "norms",
    "paths",
    "published_state_dict",
    "reference",
    "remove",
    "report",
    "scatter_chunk",
    "shard_nodes",
]

__version__ = version("latentgnn")

_HOMES = {
    "Chunk": "streaming",
    "FrozenBatchNorm": "norms",
    "LatentGNN": "layer",
    "LatentGNNConfig": "config",
    "LatentSums": "sums",
    "PackedLatentGNN": "points",
    "backward_chunk": "streaming",
    "capture": "inspection.seen",
    "gather_chunks": "streaming",
    "insert": "insertion",
    "load_published": "checkpoints",
    "load_run": "tasks.loading",
    "node_mask": "masks",
    "published_state_dict": "checkpoints",
    "remove": "insertion",
    "report": "inspection.reporting",
    "scatter_chunk": "streaming",
    "shard_nodes": "sharding",
}
_MODULES = ("inspection", "norms", "paths", "reference")


def __getattr__(name: str) -> object:
    # Loaded at first use, so that the command line answers --help without importing torch.
    if name in _HOMES:
        return getattr(import_module(f"latentgnn.{_HOMES[name]}"), name)
    if name in _MODULES:
        return import_module(f"latentgnn.{name}")
    raise AttributeError(f"module 'latentgnn' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])
