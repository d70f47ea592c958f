"""The structure of a layer, without its parameters, and how to compute it.

Axes: G groups, D_k latents of a kernel in a group.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, pairwise
from typing import Any

import torch

from latentgnn.core.batch_norm import TrainingBatchNorm
from latentgnn.core.statistics import GroupNorm, NodeNorm, Norm
from latentgnn.functional import NodeScale
from latentgnn.norms import NormKind


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The structure of a layer, and how to compute it.

    Args:
        groups: G.
        latents: D_k of each kernel, in each group.
        symmetric: gather and scatter share reduction and assignment.
        graph_conv: scatter ends in a graph convolution.
        residual: the input is added to the output.
        node_scale: what the latents' sums are divided by.
        norm: kind of the norms: ``affine`` for an affine map, otherwise where their statistics come from.
        eps: of each projection's norm, in the order of `Parts`.
        norm_groups: of each projection's group norm, likewise; empty for other norms.
        compute: dtype of products over nodes.
        holds: what the blocks compute is held for the backward pass, not recomputed.
        group: name of the process group that shares the nodes; empty if this process holds all of them.
        ranks: how many these are.
    """

    groups: int
    latents: tuple[int, ...]
    symmetric: bool
    graph_conv: bool
    residual: bool
    node_scale: NodeScale
    norm: NormKind
    eps: tuple[float, ...]
    norm_groups: tuple[int, ...] = ()
    compute: torch.dtype
    holds: bool
    group: str = ""
    ranks: int = 1

    @property
    def takes_statistics(self) -> bool:
        """Whether the norms take statistics from their inputs."""
        return self.norm != "affine"

    @property
    def in_rows(self) -> bool:
        """Whether the norms are over each node's channels, which then must be contiguous inside."""
        return self.norm in ("layer", "rms")

    def norm_of(self, place: int, parts: int = 1) -> Norm:
        """The norm after the projection at an index in the order of `Parts`; only for norms that take statistics.

        Args:
            place: of the projection.
            parts: how many projections of equal size were joined to one.
        """
        if self.norm == "batch":
            return TrainingBatchNorm(self.eps[place])
        if self.norm == "group":
            return GroupNorm(self.eps[place], self.norm_groups[place] * parts)
        return NodeNorm(self.eps[place], parts, centres=self.norm == "layer")

    def assign_norm(self, way: int) -> Norm:
        """The norm after the assignments of gather (0) or scatter (1)."""
        return self.norm_of(self.ways + way * len(self.latents))

    @property
    def conv_norm(self) -> Norm:
        """The norm after the graph convolutions."""
        return self.norm_of(-1 - len(self.latents))

    @property
    def ways(self) -> int:
        """The number of reductions, and of assignments: 1 if gather and scatter share them, otherwise 2."""
        return 1 if self.symmetric else 2

    @cached_property
    def kernels(self) -> list[slice]:
        """Each kernel's latents among all."""
        return [slice(*ends) for ends in pairwise(accumulate(self.latents, initial=0))]

    def arguments(self) -> tuple[Any, ...]:
        """The fields as an operator takes them: `SCHEMA` in a signature."""
        return (
            *(self.groups, list(self.latents), self.symmetric, self.graph_conv, self.residual, self.node_scale),
            *(list(self.eps), self.compute, self.group, self.ranks),
        )

    @staticmethod
    def of(groups: int, latents: Sequence[int], *rest: Any) -> "Plan":
        """Undo `arguments`; operators hold nothing and only have affine norms."""
        symmetric, graph_conv, residual, node_scale, eps, compute, group, ranks = rest
        return Plan(
            groups=groups,
            latents=tuple(latents),
            symmetric=symmetric,
            graph_conv=graph_conv,
            residual=residual,
            node_scale=node_scale,
            norm="affine",
            eps=tuple(eps),
            compute=compute,
            holds=False,
            group=group,
            ranks=ranks,
        )


SCHEMA = (
    "int groups, int[] latents, bool symmetric, bool graph_conv, bool residual, str node_scale, float[] eps, "
    "ScalarType compute, str group, int ranks"
)
