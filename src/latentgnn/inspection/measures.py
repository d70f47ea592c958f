"""Exact measures of an affinity M = Q^T A P from D x D sums over nodes, without forming M.

Axes: G groups, D latents, N nodes. All in float64, as rank and differences suffer from cancellation.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from latentgnn.inspection.recording import SeenKernel
from latentgnn.numerics import reciprocal

DEAD = 1e-3
"""A latent is dead if its share of all nodes' scatter assignments is below this fraction of an equal share 1 / D."""
DUPLICATE = 0.99
"""Two latents are duplicates if the cosines of their gather and of their scatter assignments are both above this."""

_NODES = 1 << 15


@dataclass(frozen=True, kw_only=True)
class Sums:
    """Sums of one kernel's assignments over the nodes of one or several samples.

    Args:
        nodes: N.
        gather_gram: P P^T, (G, D, D).
        scatter_gram: Q Q^T, (G, D, D).
        gather_sum: P 1, (G, D).
        scatter_sum: Q 1, (G, D).
    """

    nodes: int
    gather_gram: Tensor
    scatter_gram: Tensor
    gather_sum: Tensor
    scatter_sum: Tensor

    def __add__(self, other: "Sums") -> "Sums":
        return Sums(
            nodes=self.nodes + other.nodes,
            gather_gram=self.gather_gram + other.gather_gram,
            scatter_gram=self.scatter_gram + other.scatter_gram,
            gather_sum=self.gather_sum + other.gather_sum,
            scatter_sum=self.scatter_sum + other.scatter_sum,
        )


def sums(kernel: SeenKernel) -> Sums:
    """Compute the sums in one pass over the nodes of a sample."""
    scale_GD1 = kernel.scale.double()
    groups, latents, nodes = kernel.scatter.shape
    grams = scale_GD1.new_zeros(2, groups, latents, latents)
    totals = scale_GD1.new_zeros(2, groups, latents)
    for p_GDN, q_GDN in _parts(kernel):
        p_GDN = p_GDN * scale_GD1
        grams += torch.stack([p_GDN @ p_GDN.mT, q_GDN @ q_GDN.mT])
        totals += torch.stack([p_GDN.sum(-1), q_GDN.sum(-1)])
    return Sums(nodes=nodes, gather_gram=grams[0], scatter_gram=grams[1], gather_sum=totals[0], scatter_sum=totals[1])


def singular_values(found: Sums, affinity: Tensor) -> Tensor:
    """Return the D largest singular values of M, (G, D), in descending order; all others are zero.

    They are the singular values of (Q Q^T)^1/2 A (P P^T)^1/2, with square roots of the Gram matrices.
    """
    return torch.linalg.svdvals(_root(found.scatter_gram) @ affinity.double() @ _root(found.gather_gram))


def effective_rank(values_GD: Tensor) -> Tensor:
    """Return exp of the entropy of the normalised singular values, (G,): how many directions M has, from 1 to D.

    Source: Roy, Vetterli: "The effective rank: a measure of effective dimensionality", EUSIPCO 2007. 0 where M is 0.
    """
    share_GD = values_GD * reciprocal(values_GD.sum(-1, keepdim=True))
    rank_G = torch.special.entr(share_GD).sum(-1).exp()
    return torch.where(values_GD.sum(-1) > 0, rank_G, 0)


def row_difference(kernel: SeenKernel, found: Sums) -> Tensor:
    """Return how much rows of M differ in direction: 1 - the mean cosine of all pairs of rows, (G,), from 0 to 1.

    0 means that all nodes get the same context (query-independent, as GCNet finds for non-local blocks), up to its
    strength. The cosine of rows m and n is w_m^T S w_n divided by both lengths, with w_n = A^T q_n and S = P P^T. Its
    mean over all pairs is the product of the mean unit row with itself. Rows that are zero are excluded.
    """
    affinity_GDD = kernel.affinity.double()
    total_GD, count_G = torch.zeros_like(found.scatter_sum), found.scatter_sum.new_zeros(len(affinity_GDD))
    for _, q_GDN in _parts(kernel):
        take_GDN = affinity_GDD.mT @ q_GDN
        length_G1N = (take_GDN * (found.gather_gram @ take_GDN)).sum(1, keepdim=True).clamp_min(0).sqrt()
        total_GD += (take_GDN * reciprocal(length_G1N)).sum(-1)
        count_G += (length_G1N > 0).sum((-1, -2))
    cosine_G = (total_GD[:, None] @ found.gather_gram @ total_GD[..., None])[:, 0, 0] / count_G.clamp_min(1).square()
    return torch.where(count_G > 0, (1 - cosine_G).clamp(0, 1), 0)


def usage(found: Sums, affinity: Tensor) -> tuple[Tensor, Tensor]:
    """Return each latent's share of the sum of all N x N weights, as a gathering and as a scattering latent.

    Both are (G, D) and sum to one, or are zero where M is zero.
    """
    affinity_GDD = affinity.double()
    gathers = found.gather_sum * (affinity_GDD.mT @ found.scatter_sum[..., None])[..., 0]
    scatters = found.scatter_sum * (affinity_GDD @ found.gather_sum[..., None])[..., 0]
    return (
        gathers * reciprocal(gathers.sum(-1, keepdim=True)),
        scatters * reciprocal(scatters.sum(-1, keepdim=True)),
    )


def gathers_nothing(found: Sums) -> Tensor:
    """Return which latents have no assignment at any node, (G, D); such a latent only gets the mean of the others."""
    return found.gather_gram.diagonal(dim1=-2, dim2=-1) == 0


def is_not_read(found: Sums) -> Tensor:
    """Return which latents no node reads, (G, D): their share of squared scatter assignments is below `DEAD` / D."""
    squares_GD = found.scatter_gram.diagonal(dim1=-2, dim2=-1)
    return squares_GD <= DEAD / squares_GD.shape[-1] * squares_GD.sum(-1, keepdim=True)


def duplicates(found: Sums) -> Tensor:
    """Return which pairs of latents are alike, (G, D, D), above the diagonal."""
    alike = [_cosines(gram) > DUPLICATE for gram in (found.gather_gram, found.scatter_gram)]
    return (alike[0] & alike[1]).triu(1)


def mean_row_sum(found: Sums, affinity: Tensor) -> Tensor:
    """Return the mean over nodes of the row sums of M, (G,)."""
    taken_G = (found.scatter_sum[:, None] @ affinity.double() @ found.gather_sum[..., None])[:, 0, 0]
    return taken_G / max(found.nodes, 1)


def _parts(kernel: SeenKernel) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield P without its scale, and Q, for some nodes at a time."""
    both = (kernel.raw_gather.split(_NODES, -1), kernel.scatter.split(_NODES, -1))
    for p_GDN, q_GDN in zip(*both, strict=True):
        yield p_GDN.double(), q_GDN.double()


def _root(gram_GDD: Tensor) -> Tensor:
    values_GD, vectors_GDD = torch.linalg.eigh(gram_GDD)
    return vectors_GDD * values_GD.clamp_min(0).sqrt()[:, None] @ vectors_GDD.mT


def _cosines(gram_GDD: Tensor) -> Tensor:
    inverse_GD = reciprocal(gram_GDD.diagonal(dim1=-2, dim2=-1).sqrt())
    return gram_GDD * inverse_GD[..., None] * inverse_GD[:, None]
