"""What processes that share the nodes add up: the latents' sums, and in the backward pass the features' gradients.

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
    """Divide gradients that every process has in full, so that they add up over processes as other gradients do."""
    return [None if grad is None else grad / plan.ranks for grad in grads] if plan.group else list(grads)
