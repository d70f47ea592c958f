"""The core's gather and scatter as separate calls; between them, the caller may add sums over other nodes.

These have no backward pass; the plain path's have.

Axes: B batch, N nodes, C channels, S samples, G groups, D latents of all kernels in a group, r channels of a group.
"""

from collections.abc import Sequence

from torch import Tensor

from latentgnn.core.folding import Folding, Mixing
from latentgnn.core.gather import gather_assignments, values
from latentgnn.core.gather_nodes import Gathered, gather_nodes
from latentgnn.core.inputs import Input, in_products
from latentgnn.core.layouts import empty_like_layout
from latentgnn.core.parameters import Matrices, Vectors
from latentgnn.core.plan import Plan
from latentgnn.core.records import Record
from latentgnn.core.scatter_nodes import scatter_nodes


def gather(
    x_BNC: Tensor, mask_BN: Tensor | None, offsets: Sequence[int] | None, tensors: Sequence[Tensor | None], plan: Plan
) -> tuple[Tensor, Tensor]:
    """The latents' sums over these nodes, (S, G, D, r), and their weights, (S, G, D).

    Args:
        x_BNC: input.
        mask_BN: nodes that take part.
        offsets: boundaries of the samples in a single row of packed nodes; ``None`` if each row is a sample.
        tensors: as `Parts.of` takes them.
        plan: the layer's plan.
    """
    matrices, vectors = _of_way(0, x_BNC, tensors, plan)
    given = Input.of(x_BNC, mask_BN, offsets, matrices, plan)
    total = Gathered.nothing(given, matrices, plan)
    for block in given.todo:
        alone = Input(x_BNC, mask_BN, [block])
        found = gather_nodes(alone, matrices, vectors, plan, holds=False, memory_BNC=None)
        total.add(block, found.sums, found.weights)
    return total.sums, total.weights


def scatter(
    x_BNC: Tensor,
    mask_BN: Tensor | None,
    offsets: Sequence[int] | None,
    sums_SGDr: Tensor,
    weights_SGD: Tensor,
    tensors: Sequence[Tensor | None],
    plan: Plan,
) -> Tensor:
    """The output for these nodes, (B, N, C), from the sums over all nodes of their samples.

    Args:
        x_BNC: input.
        mask_BN: nodes that take part; the others are returned unchanged.
        offsets: as `gather` has them.
        sums_SGDr: over all nodes.
        weights_SGD: likewise.
        tensors: as `Parts.of` takes them.
        plan: the layer's plan.
    """
    matrices, vectors = _of_way(1, x_BNC, tensors, plan)
    mixing = Mixing.of(sums_SGDr, weights_SGD, matrices.convs, plan, records=False)
    out_BNC = empty_like_layout(x_BNC, x_BNC.shape[-1])
    for block in Input.of(x_BNC, mask_BN, offsets, matrices, plan).todo:
        valid_sT1, record = block.valid(mask_BN), Record()
        values(block, in_products(x_BNC, block, valid_sT1, matrices, plan), matrices, vectors, plan, record)
        if plan.symmetric:
            gather_assignments(block, valid_sT1, matrices, vectors, plan, record)
        alone = Input(x_BNC, mask_BN, [block])
        scatter_nodes(alone, [record], mixing.multiplied, matrices, vectors, plan, keep=False, out_BNC=out_BNC)
    return out_BNC


def _of_way(way: int, x_BNC: Tensor, tensors: Sequence[Tensor | None], plan: Plan) -> tuple[Matrices, Vectors | None]:
    folding = Folding.without_record(tensors, plan)
    vectors = None if folding.vectors is None else folding.vectors.of_way(way, plan)
    return folding.matrices.of_way(way, plan).for_nodes(x_BNC.shape[0] * x_BNC.shape[1], plan), vectors
