"""Rows and columns of one kernel's affinity Q^T A P, and which node, kernel and groups are meant.

Axes: N nodes of a sample, G groups, D latents.
"""

from collections.abc import Sequence

import numpy as np
from torch import Tensor

from latentgnn.inspection.recording import SeenKernel, SeenSample

Node = int | Sequence[int]
"""A node of a sample: its index in the flattened map, or its index in each dimension, (row, column) for an image."""


def row(kernel: SeenKernel, groups: slice, node: int) -> Tensor:
    """Return rows of the affinity, (groups, N): P^T A^T q_n, with P's scale applied to the latents."""
    take_G1D = kernel.scatter[groups, :, node].to(kernel.scale.dtype)[:, None] @ kernel.affinity[groups]
    weight_G1D = take_G1D * kernel.scale[groups].mT
    return (weight_G1D @ kernel.raw_gather[groups].to(weight_G1D.dtype))[:, 0]


def column(kernel: SeenKernel, groups: slice, node: int) -> Tensor:
    """Return columns of the affinity, (groups, N): Q^T A p_n."""
    give_GD1 = (kernel.raw_gather[groups, :, node].to(kernel.scale.dtype)[..., None]) * kernel.scale[groups]
    weight_G1D = (kernel.affinity[groups] @ give_GD1).mT
    return (weight_G1D @ kernel.scatter[groups].to(weight_G1D.dtype))[:, 0]


def chosen(what: str, number: int | None, count: int) -> slice:
    """Return a slice for one kernel or group, or for all; a slice, so that tensors are not copied.

    Raises:
        IndexError: if there is none with this number.
    """
    if number is None:
        return slice(0, count)
    if not 0 <= number < count:
        known = f"{count} {what}s, 0 to {count - 1}" if count > 1 else f"one {what}, 0"
        raise IndexError(f"the block has {known}; got {what}={number}")
    return slice(number, number + 1)


def place_of(index: int, shape: Sequence[int]) -> tuple[int, ...]:
    """Return a node's index in each dimension."""
    return tuple(int(at) for at in np.unravel_index(index, tuple(shape)))


def shown(place: Sequence[int]) -> str:
    """Format a node's position for a title."""
    return str(place[0]) if len(place) == 1 else str(tuple(place))


def index_of(node: Node, sample: SeenSample) -> int:
    """Return a node's index in the flattened map.

    Raises:
        IndexError: if the sample has no such node.
        TypeError: if the node is not given by integers.
    """
    place = tuple(np.atleast_1d(np.asarray(node)).tolist())  # NumPy's and PyTorch's integers too
    if not all(type(at) is int for at in place):
        raise TypeError(f"a node is given by whole numbers, of the block's map and not of the image; got {node!r}")
    shape = (sample.nodes,) if len(place) == 1 else sample.shape
    if len(place) != len(shape) or not all(0 <= at < size for at, size in zip(place, shape, strict=True)):
        raise IndexError(
            f"the sample's nodes have the shape {sample.shape}: a node is a number from 0 to {sample.nodes - 1}, or "
            f"its place in each dimension of this shape, which is the block's and not the image's; got {node!r}"
        )
    return int(np.ravel_multi_index(place, shape))
