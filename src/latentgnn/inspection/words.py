"""Explains a block's figures in words, with advice."""

from collections.abc import Iterator
from dataclasses import dataclass

from latentgnn.inspection.statistics import BlockStatistics

SAME_ROWS = 0.01
"""Rows that differ by less are in practice the same for every node."""
SMALL_CHANGE = 1e-3
"""A block that changes its input, or the network's output, by less has in practice no effect."""
LARGE_CHANGE = 1.0
"""A block that changes its input by more dominates it."""
MANY_DEAD = 0.25
"""Fraction of dead latents above which fewer latents are advised."""


@dataclass(frozen=True, kw_only=True)
class Finding:
    """A finding about a block.

    Args:
        name: a word for programs: ``alive``, ``gamma_zero``, ``small_change``, ``no_effect``, ``large_change``,
            ``no_context``, ``query_independent``, ``rank_one``, ``dead_latents``, ``duplicate_latents``.
        meaning: the meaning in words.
        advice: what to try; empty if nothing needs to be done.
    """

    name: str
    meaning: str
    advice: str

    def __str__(self) -> str:
        """The meaning, to be appended to the block's name and a colon, followed by the advice as a sentence."""
        return f"{self.meaning}.{f' {self.advice[0].upper()}{self.advice[1:]}.' if self.advice else ''}"


def findings(block: BlockStatistics, output_change: float | None = None) -> tuple[Finding, ...]:
    """Return what the figures of a block mean, most important first.

    Args:
        block: its statistics.
        output_change: how much the network's output changes without the block, if known.
    """
    if block.gamma == 0:
        return (
            Finding(
                name="gamma_zero",
                meaning="gamma is 0: the block passes its input on unchanged, as every block does before training",
                advice="train it; if it was trained, see that gamma is among the optimizer's parameters and not "
                "frozen, or start with gamma_init=0.1",
            ),
        )
    found = tuple(_faults(block, output_change))
    return found or (
        Finding(
            name="alive",
            meaning=f"alive: it changes its input by {block.change.mean:.1%}, and its nodes take in different contexts",
            advice="",
        ),
    )


def _faults(block: BlockStatistics, output_change: float | None) -> Iterator[Finding]:
    if block.effective_rank == 0:
        yield Finding(
            name="no_context",
            meaning="all assignments are zero at all nodes: no context flows",
            advice="lower the learning rate, and start the block anew (reset_parameters)",
        )
        return
    if block.change.mean < SMALL_CHANGE:
        yield Finding(
            name="small_change",
            meaning=f"it changes its input by only {block.change.mean:.2%}: next to nothing",
            advice="train longer, or give the block a higher learning rate and gamma no weight decay; if it stays so, "
            "leave it out",
        )
    elif block.change.mean > LARGE_CHANGE:
        yield Finding(
            name="large_change",
            meaning=f"what it adds is {block.change.mean:.1f} times as large as its input",
            advice='lower its learning rate; if inputs are larger than in training, take node_scale="mean"',
        )
    if output_change is not None and output_change < SMALL_CHANGE <= block.change.mean:
        yield Finding(
            name="no_effect",
            meaning=f"without it, the network's output changes by only {output_change:.2%}, on this batch",
            advice="compare the score with and without it on held-out data; if it is the same, leave it out",
        )
    if block.row_difference < SAME_ROWS:
        yield Finding(
            name="query_independent",
            meaning="every node takes in the same context (query-independent), as global pooling would give it",
            advice="try it at another stage, or with several kernels or groups; if it helps all the same, a block of "
            "global pooling is cheaper",
        )
    elif block.effective_rank < 1.5:
        yield Finding(
            name="rank_one",
            meaning=f"its affinity has an effective rank of {block.effective_rank:.1f} of {block.latents} latents",
            advice="fewer latents will do",
        )
    if block.dead >= max(1, MANY_DEAD * block.latents):
        yield Finding(
            name="dead_latents",
            meaning=f"{block.dead} of {block.latents} latents are dead: they gather nothing, or no node reads them",
            advice="fewer latents will do; if most are dead, lower the learning rate",
        )
    if block.duplicates >= max(1, MANY_DEAD * block.latents):
        yield Finding(
            name="duplicate_latents",
            meaning=f"{block.duplicates} of {block.latents} latents do what another one does",
            advice="fewer latents will do",
        )
