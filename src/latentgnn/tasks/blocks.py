"""The settings of the LatentGNN blocks in a task's network."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from latentgnn.configuration.settings import expect

if TYPE_CHECKING:
    from torch import nn

MOST_CHANNELS = 65_536
MOST_LATENTS = 16_384
"""Per kernel: the affinity between this many latents takes a gigabyte."""


@dataclass(frozen=True, kw_only=True)
class BlockConfig:
    """Settings of the LatentGNN blocks, the same for every block (see `latentgnn.LatentGNN`).

    Args:
        reduction: factor by which channels are reduced inside a block.
        symmetric: use one assignment for gather and scatter instead of two.
        graph_conv: add a graph convolution after the scatter step.
        num_groups: number of channel groups, each with its own latent graph.
        norm: the norm inside a block.
        node_scale: ``published``, or ``mean`` for an output whose scale does not depend on the number of nodes.
        gamma_init: initial weight of the block in the residual sum; 0 makes the block an identity.
    """

    reduction: int = 8
    symmetric: bool = False
    graph_conv: bool = True
    num_groups: int = 1
    norm: Literal["batch_norm", "frozen_batch_norm", "group_norm", "layer_norm", "none"] = "frozen_batch_norm"
    node_scale: Literal["published", "mean"] = "published"
    gamma_init: float = 0.0

    def __post_init__(self) -> None:
        expect(
            self,
            {
                "reduction": (1 <= self.reduction <= MOST_CHANNELS, f"1 to {MOST_CHANNELS}"),
                "num_groups": (1 <= self.num_groups <= MOST_CHANNELS, f"1 to {MOST_CHANNELS}"),
                "gamma_init": (math.isfinite(self.gamma_init), "a finite number"),
            },
        )


def latents_are_sound(latents: Mapping[Any, int | tuple[int, ...]]) -> bool:
    """Whether every block has kernels, and each kernel has 1 to `MOST_LATENTS` latents."""
    kernels = [(number,) if isinstance(number, int) else number for number in latents.values()]
    return all(number and all(1 <= count <= MOST_LATENTS for count in number) for number in kernels)


def insert_blocks(
    model: "nn.Module",
    latents: Mapping[str, int | tuple[int, ...]],
    config: BlockConfig,
    *,
    example_input: Any = None,
) -> None:
    """Call `latentgnn.insert` with a task's settings.

    Args:
        model: the network.
        latents: number of latents of the block after each submodule, by the submodule's name.
        config: settings that are common to all blocks.
        example_input: see `latentgnn.insert`.

    Raises:
        ValueError: if a setting does not fit the network; likewise TypeError.
    """
    # Imported here: configurations are read before anything needs torch.
    from latentgnn.insertion import insert
    from latentgnn.norms import NORMS

    insert(
        model,
        latents,
        example_input=example_input,
        reduction=config.reduction,
        symmetric=config.symmetric,
        graph_conv=config.graph_conv,
        num_groups=config.num_groups,
        norm=NORMS[config.norm],
        node_scale=config.node_scale,
        gamma_init=config.gamma_init,
    )
