"""The data sent to the page: a JSON header, and arrays that it refers to.

The browser gets the factors of every block's affinity Q^T A P once, and computes each node's row itself: D x N
products, about a millisecond. So nothing is requested while the pointer moves.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from latentgnn.inspection import Seen

_ALIGNED = 8
_TYPES = {"float32": np.float32, "int32": np.int32, "uint8": np.uint8}


class Explorer(Protocol):
    """A trained model of any task, with inputs to look at."""

    @property
    def about(self) -> dict[str, Any]:
        """Return what the page says about the model: ``task`` and whatever it needs to show results."""

    @property
    def suffixes(self) -> Sequence[str]:
        """Suffixes, in lower case, of files that may be dropped on the page."""

    @property
    def names(self) -> Sequence[str]:
        """Names of the inputs."""

    def input(self, number: int, /) -> Any:
        """Return one of the inputs."""

    def read(self, path: Path, /) -> Any:
        """Read a file that was dropped on the page.

        Raises:
            UserError: if it cannot be read, or is too large.
        """

    def view(self, sample: Any, /) -> bytes:
        """Return everything that the page shows of an input: see `Parts.pack`."""

    def without(self, sample: Any, block: str | None, /) -> bytes:
        """Return the model's results on an input without a block, or with ``None`` without all blocks."""


class Parts:
    """Arrays one after another, and the position of each.

    Example:
        >>> parts = Parts()
        >>> parts.add(np.zeros(3), "float32"), parts.add(np.ones(1), "uint8")
        ({'at': 0, 'count': 3, 'type': 'float32'}, {'at': 16, 'count': 1, 'type': 'uint8'})
    """

    def __init__(self) -> None:
        self._pieces: list[bytes] = []
        self._size = 0

    def add(self, values: Tensor | NDArray[Any] | bytes, kind: str) -> dict[str, Any]:
        """Append an array, and return its description for the header.

        Args:
            values: an array of any shape, stored row by row.
            kind: ``float32``, ``int32`` or ``uint8``.
        """
        if isinstance(values, bytes):
            values = np.frombuffer(values, np.uint8)
        if isinstance(values, Tensor):
            values = values.detach().float().cpu().numpy()
        piece = np.ascontiguousarray(values, dtype=np.dtype(_TYPES[kind]).newbyteorder("<")).tobytes()
        place = {"at": self._size, "count": int(values.size), "type": kind}
        # A browser can view bytes as an array of numbers only if their offset is a multiple of a number's size.
        piece += b"\0" * (-len(piece) % _ALIGNED)
        self._pieces.append(piece)
        self._size += len(piece)
        return place

    def pack(self, header: dict[str, Any]) -> bytes:
        """The length of the header in bytes (uint32), the header, and the arrays, counted from its end."""
        text = json.dumps(header).encode()
        text += b" " * (-(len(text) + 4) % _ALIGNED)
        return b"".join([len(text).to_bytes(4, "little"), text, *self._pieces])


def block_view(seen: Seen, name: str, parts: Parts) -> dict[str, Any]:
    """Return a block on the first sample: its figures, and the factors Q, A and P of each kernel and group."""
    statistics, sample = seen.statistics(name, sample=0), seen.sample(name)
    graphs = []
    for graph in statistics.graphs:
        kernel = sample.kernels[graph.kernel]
        graphs.append(
            {
                "kernel": graph.kernel,
                "group": graph.group,
                "latents": kernel.affinity.shape[-1],
                "gather": parts.add(kernel.gather[graph.group], "float32"),
                "scatter": parts.add(kernel.scatter[graph.group], "float32"),
                "affinity": parts.add(kernel.affinity[graph.group], "float32"),
                "gather_usage": list(graph.gather_usage),
                "scatter_usage": list(graph.scatter_usage),
            }
        )
    return {
        "name": name,
        "shape": list(sample.shape),
        "kernels": len(sample.kernels),
        "groups": len(sample.values),
        "gamma": statistics.gamma,
        "change": statistics.change.mean,
        "row_difference": statistics.row_difference,
        "rank": statistics.effective_rank,
        "dead": statistics.dead,
        "latents": statistics.latents,
        "graphs": graphs,
    }


def finite(values: Tensor) -> list[Any]:
    """Convert numbers for JSON, in which all numbers are finite."""
    return torch.nan_to_num(values.float()).cpu().tolist()
