"""The settings of the LatentGNN blocks in a task's network."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from torch import nn


@dataclass(frozen=True, kw_only=True)
class BlockConfig:
    """The LatentGNN blocks' own settings, the same for every block (see `latentgnn.LatentGNN`).

    Args:
        reduction: factor by which channels are reduced inside a block.
        symmetric: one assignment for gather and scatter instead of two.
        graph_conv: a graph convolution after the scatter step.
        num_groups: groups of channels with latent graphs of their own.
        norm: the norm inside a block.
        node_scale: ``published``, or ``mean`` for an output whose size does not depend on the number of nodes.
        gamma_init: where the block's weight in the residual sum starts; 0 makes the block an identity.
    """

    reduction: int = 8
    symmetric: bool = False
    graph_conv: bool = True
    num_groups: int = 1
    norm: Literal["batch_norm", "frozen_batch_norm", "group_norm", "layer_norm", "none"] = "frozen_batch_norm"
    node_scale: Literal["published", "mean"] = "published"
    gamma_init: float = 0.0


def insert_blocks(
    model: "nn.Module",
    latents: Mapping[str, int | tuple[int, ...]],
    config: BlockConfig,
    *,
    example_input: Any = None,
) -> None:
    """`latentgnn.insert` with a task's settings.

    Args:
        model: the network.
        latents: latents of the block after each submodule, by the submodule's name.
        config: what is common to the blocks.
        example_input: see `latentgnn.insert`.

    Raises:
        ValueError: a setting does not fit the network; likewise TypeError.
    """
    # Configurations are read before anything needs torch.
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
