"""What a layer costs: parameters, operations, bytes moved, bytes held for the backward pass.

Plain arithmetic on a configuration and a shape, for the path that the layer takes with norms that are affine maps
(`latentgnn.tiles`), and for batch norm in training what is held more. A multiply-add counts as two operations.

Symbols: S samples, N nodes, C channels, R reduced channels, G groups, K kernels, D_k latents of a kernel in a group.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import prod

from latentgnn.config import LatentGNNConfig


@dataclass(frozen=True)
class Cost:
    """Of one layer on one input.

    Args:
        parameters: numbers that are learnt.
        forward_operations: of the forward pass.
        backward_operations: of the backward pass, what it computes again included.
        forward_bytes: that a forward pass must move between memory and processor.
        backward_bytes: likewise for a backward pass.
        held_bytes: that stay in memory from the forward pass to the backward pass, the input included.
    """

    parameters: int
    forward_operations: int
    backward_operations: int
    forward_bytes: int
    backward_bytes: int
    held_bytes: int


# Where what is held, the input included, is at most so much, it is held: computing it again would take longer than
# the memory is worth.
HOLD_BYTES = 22 << 20


def held_bytes(config: LatentGNNConfig, nodes: int, element_size: int) -> int:
    """What a layer holds for the backward pass where it holds what it computes, the input included.

    Args:
        config: of the layer.
        nodes: of all samples together.
        element_size: bytes of a number.

    Example:
        >>> held_bytes(LatentGNNConfig(channels=512, num_latents=100), 784, 4) / 2**20
        2.7...
    """
    ways, latents = 1 if config.symmetric else 2, config.num_groups * sum(config.latents)
    each = config.channels + ways * (config.reduced_channels + latents)
    return nodes * element_size * (each + len(config.latents) * config.reduced_channels)


def cost(
    config: LatentGNNConfig, shape: Sequence[int], *, element_size: int = 4, batch_statistics: bool = False
) -> Cost:
    """The cost of a layer.

    Args:
        config: of the layer.
        shape: of the input, (S, C, *spatial).
        element_size: bytes of a number.
        batch_statistics: whether the norms take statistics from the batch, as batch norm does in training.

    Raises:
        ValueError: a shape with fewer than three dimensions or other channels than the configuration's.

    Example:
        >>> config = LatentGNNConfig(channels=512, num_latents=150, graph_conv=True)
        >>> round(cost(config, (2, 512, 100, 168)).forward_operations / 1e9, 1)  # 2 N (6 C R + 8 R D), and a little
        9.3
    """
    if len(shape) < 3 or shape[1] != config.channels or min(shape) < 1:
        raise ValueError(f"expected a shape (S, {config.channels}, *spatial), got {tuple(shape)}")
    samples, nodes = shape[0], prod(shape[2:])
    channels, reduced, groups = config.channels, config.reduced_channels, config.num_groups
    kernels, latents = len(config.latents), sum(config.latents)
    ways = 1 if config.symmetric else 2
    width = reduced + groups  # with the column of ones of each group
    features = kernels * reduced if config.graph_conv else groups * latents

    # For each node; a product's gradient takes two more of its size.
    reduce = 2 * channels * ways * reduced
    assign = gather = 2 * width * latents
    assign_back = 2 * reduced * latents
    squares = 0 if config.symmetric else 2 * groups * latents
    convolve = 2 * reduced * (latents + kernels) if config.graph_conv else 0
    convolve_back = convolve + 2 * reduced * latents if config.graph_conv else 0
    expand = 2 * channels * (features + 1)
    expand_back = expand + 2 * channels * features
    forward = reduce + 2 * assign + gather + squares + convolve + expand
    # Computed again: reduction and convolution, both assignments.
    again = reduce + 2 * assign + convolve
    backward = again + expand_back + convolve_back + (assign + assign_back) + (gather + 2 * assign_back + assign)
    backward += 2 * reduce

    # For each sample.
    squared = sum(2 * reduced * count * count for count in config.latents)
    if config.graph_conv:
        move = sum(2 * count * reduced * (reduced // groups) for count in config.latents)
    else:
        move = sum(2 * count * reduced * channels for count in config.latents)
    small_forward = 2 * squared + move
    small_backward = small_forward + 5 * squared + 2 * move
    size = samples * nodes * channels * element_size
    sums = samples * groups * latents * (reduced // groups + 2) * max(element_size, 4)
    held = size + sums
    if batch_statistics:
        inside = ways * (reduced + groups * latents) + (kernels * reduced if config.graph_conv else 0)
        held = size + samples * nodes * inside * element_size
    return Cost(
        parameters=_parameters(config),
        forward_operations=samples * (nodes * forward + small_forward),
        backward_operations=samples * (nodes * backward + small_backward),
        forward_bytes=3 * size,
        backward_bytes=5 * size,
        held_bytes=held,
    )


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
    """The cost of a dot-product non-local block with half the channels inside and a batch norm behind, for comparison.

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
        "training batch norm": cost(config, shape, batch_statistics=True),
        "non-local": non_local_cost(config.channels, shape),
    }
    rows: dict[str, Callable[[Cost], str]] = {
        "parameters": lambda one: f"{one.parameters:,}",
        "forward operations": lambda one: f"{one.forward_operations / 1e9:,.2f} G",
        "backward operations": lambda one: f"{one.backward_operations / 1e9:,.2f} G",
        "forward bytes moved": lambda one: f"{one.forward_bytes / 2**20:,.0f} MiB",
        "backward bytes moved": lambda one: f"{one.backward_bytes / 2**20:,.0f} MiB",
        "held for backward": lambda one: f"{one.held_bytes / 2**20:,.0f} MiB",
        "held over the input": lambda one: f"{one.held_bytes / (4 * prod(shape)):.2f}",
    }
    # Of the path with batch statistics, what it holds is known here, and not what it computes.
    known = {"training batch norm": ("parameters", "held for backward", "held over the input")}

    def cell(column: str, row: str) -> str:
        return rows[row](columns[column]) if row in known.get(column, rows) else "-"

    lines = [" " * 22 + "".join(f"{column:>22}" for column in columns)]
    lines += [f"{row:22}" + "".join(f"{cell(column, row):>22}" for column in columns) for row in rows]
    return "\n".join(lines)
