"""What a layer costs: parameters, operations, bytes moved, bytes held for the backward pass.

Plain arithmetic on a configuration and a shape, for the core (`latentgnn.core`) with affine norms. For other norms,
only what they hold in addition is counted. A multiply-add counts as two operations.

Symbols: S samples, N nodes, C channels, R reduced channels, G groups, K kernels, D_k latents of a kernel in a group.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import prod

from latentgnn.by_size import expanded_numbers, holds
from latentgnn.config import LatentGNNConfig
from latentgnn.counts import computed_numbers, normalized_numbers, operations_of_a_node
from latentgnn.norms import NormKind


@dataclass(frozen=True)
class Cost:
    """The cost of one layer on one input.

    Args:
        parameters: trainable numbers.
        forward_operations: operations of the forward pass.
        backward_operations: operations of the backward pass, including what it recomputes.
        forward_bytes: bytes that a forward pass must move between memory and processor.
        backward_bytes: the same for a backward pass.
        held_bytes: bytes kept from the forward to the backward pass, including the input.
    """

    parameters: int
    forward_operations: int
    backward_operations: int
    forward_bytes: int
    backward_bytes: int
    held_bytes: int


def cost(
    config: LatentGNNConfig,
    shape: Sequence[int],
    *,
    element_size: int = 4,
    norm: NormKind = "affine",
    held: bool | None = None,
) -> Cost:
    """The cost of a layer.

    Args:
        config: the layer's options.
        shape: of the input, (S, C, *spatial).
        element_size: bytes of a number.
        norm: kind of the norms.
        held: whether what is computed is held for the backward pass; by default, `holds` decides.

    Raises:
        ValueError: a shape with fewer than three dimensions or other channels than the configuration's.

    Example:
        >>> config = LatentGNNConfig(channels=512, num_latents=150, graph_conv=True)
        >>> round(cost(config, (2, 512, 100, 168)).forward_operations / 1e9, 1)  # 2 N (3 C R + 4 R D), and a little
        9.2
    """
    if len(shape) < 3 or shape[1] != config.channels or min(shape) < 1:
        raise ValueError(f"expected a shape (S, {config.channels}, *spatial), got {tuple(shape)}")
    samples, nodes = shape[0], prod(shape[2:])
    channels, reduced, groups = config.channels, config.reduced_channels, config.num_groups
    latents, ways = sum(config.latents), 1 if config.symmetric else 2
    held = holds(config, samples * nodes, element_size, norm=norm) if held is None else held

    # Per node; the gradient of a product takes two more products of its size.
    reduce, assign, features = 2 * channels * ways * reduced, ways * 2 * reduced * latents, 2 * reduced * latents
    forward = operations_of_a_node(config)
    backward = 2 * forward + (0 if held else reduce + assign + features)

    # Per sample.
    squared = sum(2 * reduced * count * count for count in config.latents)
    convolve = sum(2 * count * reduced * (reduced // groups) for count in config.latents) if config.graph_conv else 0
    small_forward = 2 * squared + convolve
    small_backward = (2 if held else 3) * small_forward
    size = samples * nodes * channels * element_size
    sums = samples * groups * latents * (reduced // groups + 1) * max(element_size, 4)
    more = computed_numbers(config) if held else 0
    if norm == "batch" or (held and norm != "affine"):
        more += normalized_numbers(config)
    if held and norm != "affine":
        more += expanded_numbers(config, samples * nodes, norm)
    return Cost(
        parameters=_parameters(config),
        forward_operations=samples * (nodes * forward + small_forward),
        backward_operations=samples * (nodes * backward + small_backward),
        forward_bytes=3 * size,
        backward_bytes=5 * size,
        held_bytes=size + sums + samples * nodes * more * element_size,
    )


def floor_operations(config: LatentGNNConfig, shape: Sequence[int]) -> int:
    """Operations of a forward pass that no reordering of the products saves.

    U, or with graph convolution G, is applied to latents or to nodes, whichever takes fewer operations.

    Args:
        config: of an asymmetric layer with one group.
        shape: of the input, (S, C, *spatial).

    Example:
        >>> config = LatentGNNConfig(channels=8, num_latents=4, graph_conv=True)
        >>> floor_operations(config, (1, 8, 10))  # 10 (6 C R + 8 R D), mixing 4 R D D, G on the latents 2 R R D
        872
    """
    samples, nodes = shape[0], prod(shape[2:])
    channels, reduced = config.channels, config.reduced_channels
    kernels, latents = len(config.latents), sum(config.latents)
    # Two reductions, two assignments and the gather step; then the affinity of latents and its product.
    operations = nodes * (4 * channels * reduced + 6 * reduced * latents)
    operations += sum(4 * reduced * count**2 for count in config.latents)
    expand_nodes = nodes * 2 * channels * kernels * reduced
    scatter_nodes = nodes * 2 * reduced * latents
    if config.graph_conv:
        convolve = min(nodes * 2 * kernels * reduced**2, 2 * reduced**2 * latents)
        operations += scatter_nodes + convolve + expand_nodes
    else:
        operations += min(scatter_nodes + expand_nodes, (nodes + reduced) * 2 * channels * latents)
    return samples * operations


def _parameters(config: LatentGNNConfig) -> int:
    channels, reduced, ways = config.channels, config.reduced_channels, 1 if config.symmetric else 2
    width, kernels = reduced // config.num_groups, len(config.latents)
    shapes = [(channels, reduced)] * ways + [(kernels * reduced, channels)]
    for count in config.latents:
        shapes += [(width, config.num_groups * count)] * ways
        shapes += [(width, reduced)] if config.graph_conv else []
    norms = [config.norm_factory(features) for _, features in shapes]
    learnt = sum(parameter.numel() for norm in norms for parameter in norm.parameters())
    return sum(inputs * outputs for inputs, outputs in shapes) + learnt + int(config.residual)


def non_local_cost(channels: int, shape: Sequence[int], *, element_size: int = 4) -> Cost:
    """For comparison: the cost of a dot-product non-local block with half the channels inside and a batch norm.

    Its affinity of all pairs of nodes is written, read and held.

    Args:
        channels: C.
        shape: of the input, (S, C, *spatial).
        element_size: bytes of a number.

    Example:
        >>> round(non_local_cost(512, (2, 512, 100, 168)).held_bytes / 2**30, 1)  # the affinity alone is 2.1
        2.4
    """
    samples, nodes, inside = shape[0], prod(shape[2:]), channels // 2
    project, relate = 2 * channels * inside * nodes, 2 * nodes * nodes * inside
    forward = samples * (4 * project + 2 * relate)
    size, affinity = samples * nodes * channels * element_size, samples * nodes * nodes * element_size
    return Cost(
        parameters=4 * channels * inside + 2 * channels,
        forward_operations=forward,
        backward_operations=2 * forward,
        forward_bytes=6 * size + 2 * affinity,
        backward_bytes=12 * size + 4 * affinity,
        # The input, three projections, the weighted sum and what the norm sees, and the affinity.
        held_bytes=4 * size + affinity,
    )


def table(config: LatentGNNConfig, shape: Sequence[int]) -> str:
    """The costs of a layer and of a non-local block, side by side."""
    frozen = cost(config, shape)
    columns = {
        "LatentGNN": frozen,
        "training batch norm": cost(config, shape, norm="batch"),
        "non-local": non_local_cost(config.channels, shape),
    }
    rows: dict[str, Callable[[Cost], str]] = {
        "parameters": lambda cost: f"{cost.parameters:,}",
        "forward operations": lambda cost: f"{cost.forward_operations / 1e9:,.2f} G",
        "backward operations": lambda cost: f"{cost.backward_operations / 1e9:,.2f} G",
        "forward bytes moved": lambda cost: f"{cost.forward_bytes / 2**20:,.0f} MiB",
        "backward bytes moved": lambda cost: f"{cost.backward_bytes / 2**20:,.0f} MiB",
        "held for backward": lambda cost: f"{cost.held_bytes / 2**20:,.0f} MiB",
        "held over the input": lambda cost: f"{cost.held_bytes / (4 * prod(shape)):.2f}",
    }
    # For batch statistics only the held bytes are modelled, not the operations.
    known = {"training batch norm": ("parameters", "held for backward", "held over the input")}

    def cell(column: str, row: str) -> str:
        return rows[row](columns[column]) if row in known.get(column, rows) else "-"

    lines = [" " * 22 + "".join(f"{column:>22}" for column in columns)]
    lines += [f"{row:22}" + "".join(f"{cell(column, row):>22}" for column in columns) for row in rows]
    return "\n".join(lines)
