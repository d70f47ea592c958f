"""Gather and scatter over all blocks of nodes by the kernels, like `core.gather_nodes` and `core.scatter_nodes`."""

from collections.abc import Sequence

from torch import Tensor

from latentgnn.core.expand import expand
from latentgnn.core.gather_nodes import Gathered
from latentgnn.core.inputs import Input, in_products
from latentgnn.core.layouts import empty_like_layout
from latentgnn.core.parameters import Matrices
from latentgnn.core.plan import Plan
from latentgnn.core.records import Record
from latentgnn.kernels.steps import Steps


def gather_nodes(given: Input, steps: Steps, matrices: Matrices, plan: Plan) -> Gathered:
    """The latents' sums over all nodes; W x waits for scatter."""
    gathered = Gathered.nothing(given, matrices, plan)
    for block in given.todo:
        valid_sT1 = block.valid(given.mask_BN)
        sums_SGDr, weights_SGD, u_sTR = steps.gather(
            block, in_products(given.x_BNC, block, valid_sT1, matrices, plan), valid_sT1
        )
        gathered.add(block, sums_SGDr, weights_SGD)
        gathered.waiting.append(Record(raw=u_sTR if len(given.todo) == 1 else u_sTR.clone()))
    return gathered


def scatter_nodes(
    given: Input,
    waiting: list[Record],
    to_features: Sequence[Tensor],
    steps: Steps,
    matrices: Matrices,
    plan: Plan,
) -> Tensor:
    """The output; nothing is held."""
    out_BNC = empty_like_layout(given.x_BNC, given.x_BNC.shape[-1])
    for block in reversed(given.todo):
        valid_sT1, u_sTR, out_sTC = block.valid(given.mask_BN), waiting.pop().raw, block.of(out_BNC)
        assert u_sTR is not None
        record = Record(feature=steps.scatter(block, u_sTR, valid_sT1, to_features, out_sTC))
        expand(block, block.of(given.x_BNC), valid_sT1, matrices, None, plan, record, out_sTC)
    return out_BNC
