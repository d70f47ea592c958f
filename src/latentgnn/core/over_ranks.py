"""What processes that share the nodes add up: the latents' sums, and on the way back the gradients of the features.

Nothing else passes between them, whatever the number of nodes.
"""

from collections.abc import Sequence

from torch import Tensor

from latentgnn.core.plan import Plan
from latentgnn.ranks import added


def over_ranks(tensors: Sequence[Tensor], plan: Plan) -> list[Tensor]:
    """The sums over all processes; the tensors themselves where this process holds all nodes."""
    return added(tensors, plan.group) if plan.group else list(tensors)


def share_of_rank(grads: Sequence[Tensor | None], plan: Plan) -> list[Tensor | None]:
    """Of gradients that all processes have whole, parts that add up to them, as those of other parameters do."""
    return [None if grad is None else grad / plan.ranks for grad in grads] if plan.group else list(grads)
