"""Global context at linear cost: the LatentGNN layer (ICML 2019, arXiv 1905.11634) and what surrounds it."""

from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from latentgnn import norms, paths, reference
    from latentgnn.checkpoints import load_published, published_state_dict
    from latentgnn.config import LatentGNNConfig
    from latentgnn.insertion import insert, remove
    from latentgnn.layer import LatentGNN
    from latentgnn.masks import node_mask
    from latentgnn.norms import FrozenBatchNorm
    from latentgnn.points import PackedLatentGNN
    from latentgnn.sharding import shard_nodes
    from latentgnn.tasks.loading import load_run

__all__ = [
    "FrozenBatchNorm",
    "LatentGNN",
    "LatentGNNConfig",
    "PackedLatentGNN",
    "insert",
    "load_published",
    "load_run",
    "node_mask",
    "norms",
    "paths",
    "published_state_dict",
    "reference",
    "remove",
    "shard_nodes",
]

__version__ = version("latentgnn")

_HOMES = {
    "FrozenBatchNorm": "norms",
    "LatentGNN": "layer",
    "LatentGNNConfig": "config",
    "PackedLatentGNN": "points",
    "insert": "insertion",
    "load_published": "checkpoints",
    "load_run": "tasks.loading",
    "node_mask": "masks",
    "published_state_dict": "checkpoints",
    "remove": "insertion",
    "shard_nodes": "sharding",
}
_MODULES = ("norms", "paths", "reference")


def __getattr__(name: str) -> object:
    # Loaded at first use, so that the command line answers --help without importing torch.
    if name in _HOMES:
        return getattr(import_module(f"latentgnn.{_HOMES[name]}"), name)
    if name in _MODULES:
        return import_module(f"latentgnn.{name}")
    raise AttributeError(f"module 'latentgnn' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])
