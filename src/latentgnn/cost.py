"""What a layer costs: parameters, operations, bytes moved, bytes held for the backward pass.

Plain arithmetic on a configuration and a shape, for the core (`latentgnn.core`) with norms that are affine maps, and
for batch norm in training what is held more. A multiply-add counts as two operations.

Symbols: S samples, N nodes, C channels, R reduced channels, G groups, K kernels, D_k latents of a kernel in a group.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import prod

from latentgnn.config import LatentGNNConfig
from latentgnn.norms import NormKind


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


# Where everything held, the input included, is at most so much, it is held: computing it again would take longer than
# the memory is worth; the more so norms of a sample and of a node. As measured: docs/results.md.
HOLD_BYTES: Mapping[NormKind, int] = {
    "affine": 22 << 20,
    "batch": 22 << 20,
    "group": 80 << 20,
    "layer": 80 << 20,
    "rms": 80 << 20,
}
# Likewise on a GPU, which computes faster beside its calls. For a map of 256 x 512 x 512, 268 MB, the core took 6.1
# ms a step holding and 7.4 ms computing again with frozen norms, with peaks of 2.1 and 1.8 times the input; 9.6 and
# 10.8 ms with batch norm, 11.8 and 13.1 ms with layer norm. Up to it, the plain path is taken instead of the core:
# 10.8, 13.2 and 11.9 ms a step there with batch, group and layer norm, and at smaller sizes up to half the core's
# time, with about 6 times the input at its peak (benchmarks/results/gpu-2026-11-26-paths.md).
HOLD_BYTES_ON_GPU = 512 << 20
# Numbers of an input from which on the Triton kernels, as one operator, should be faster than what a compiler makes of
# the plain path. Taken from GPU times of each side, in docs/results.md; not measured as a whole.
KERNELS_PAY_COMPILED = 1 << 23
# Forward operations up to which the plain path is faster on a CPU: it has fewer calls. As measured: docs/results.md.
SMALL_OPERATIONS = 1 << 25
# Nodes of a small map, and numbers of an input of such, for which the plain path is faster on a CPU with several
# threads, by the kind of norm. As measured: docs/results.md.
CONVOLVED: Mapping[NormKind, tuple[range, int]] = {
    "affine": (range(32, 401), 1 << 20),
    "batch": (range(128, 401), 5 << 17),
    "group": (range(32, 401), 1 << 20),
    "layer": (range(128, 401), 1 << 18),
    "rms": (range(128, 401), 1 << 18),
}
# Likewise on one thread, where less is gained; and the most numbers that the layer computes inside.
_CONVOLVED_ALONE, _CONVOLVED_INSIDE = (range(128, 401), 3 << 16), 1 << 20
# Of several samples with so many nodes each, it is faster for larger maps too, up to so many numbers: with norms of a
# sample and of a node, and from so many samples on with those that are affine maps, where no backward pass may follow;
# where one may, for inputs of few channels, whose products are small.
_BATCH_NODES, _BATCH_NUMBERS, _BATCH_OF_AFFINE, _BATCH_NUMBERS_RECORDED, _BATCH_CHANNELS = 128, 1 << 22, 4, 1 << 21, 256
# Of a single sample, numbers up to which it is faster where no backward pass may follow.
_SINGLE_NUMBERS = 1 << 19
# Numbers of an input whose channels lie innermost up to which the plain path is faster on a CPU, by the kind of norm,
# where no backward pass may follow. With one, and several threads, that is so for norms of a sample and of a node from
# so many numbers on, or where the reductions leave no fewer channels than there are. As measured: docs/results.md.
IN_ROWS: Mapping[NormKind, int] = {
    "affine": 1 << 22,
    "batch": 1 << 21,
    "group": 1 << 23,
    "layer": 1 << 23,
    "rms": 1 << 23,
}
_IN_ROWS_RECORDED = 1 << 19
# A batch norm's output of so few numbers is computed for its statistics, whatever its sizes.
_SMALL_OUTPUT = 1 << 19


def holds(
    config: LatentGNNConfig, nodes: int, element_size: int, *, norm: NormKind = "affine", on_gpu: bool = False
) -> bool:
    """Whether a layer holds what it computes for the backward pass, and does not compute it again there.

    Args:
        config: of the layer.
        nodes: of all samples together.
        element_size: bytes of a number.
        norm: what kind the norms are.
        on_gpu: where it computes.

    Example:
        >>> config = LatentGNNConfig(channels=1024, num_latents=100)
        >>> holds(config, 8 * 14 * 14, 4), holds(config, 8 * 56 * 56, 4)
        (True, False)
    """
    numbers = config.channels + _computed_numbers(config)
    if norm != "affine":
        numbers += _normalized_numbers(config) + _expanded_numbers(config, nodes, norm)
    return nodes * element_size * numbers <= (HOLD_BYTES_ON_GPU if on_gpu else HOLD_BYTES[norm])


def plain_pays_on_gpu(config: LatentGNNConfig, nodes: int, element_size: int) -> bool:
    """Whether a GPU may take the plain path for its fewer calls, since what that holds is not too much.

    Args:
        config: of the layer.
        nodes: of all samples together.
        element_size: bytes of a number.

    Example:
        >>> config = LatentGNNConfig(channels=512, num_latents=150, graph_conv=True)
        >>> plain_pays_on_gpu(config, 2 * 100 * 168, 4), plain_pays_on_gpu(config, 4 * 100 * 168, 4)
        (True, False)
    """
    return nodes * element_size * _plain_numbers(config) <= HOLD_BYTES_ON_GPU


def kernels_pay_compiled(nodes: int, channels: int) -> bool:
    """Whether the Triton kernels are taken by a layer that is compiled, whose calls a compiler makes cheaper.

    Args:
        nodes: of all samples together.
        channels: C.
    """
    return nodes * channels >= KERNELS_PAY_COMPILED


def is_small(config: LatentGNNConfig, nodes: int) -> bool:
    """Whether an input is so small that the calls of a forward pass take longer than its operations.

    Args:
        config: of the layer.
        nodes: of all samples together.

    Example:
        >>> config = LatentGNNConfig(channels=256, num_latents=64)
        >>> is_small(config, 16 * 16), is_small(config, 32 * 32)
        (True, False)
    """
    return nodes * _operations_of_a_node(config) <= SMALL_OPERATIONS


def convolutions_pay(
    config: LatentGNNConfig,
    samples: int,
    nodes: int,
    *,
    recorded: bool,
    norm: NormKind | None = "affine",
    threads: int = 2,
) -> bool:
    """Whether the plain path is faster for an input whose nodes lie innermost, more of them than channels inside.

    Args:
        config: of the layer.
        samples: S.
        nodes: of each.
        recorded: autograd records, so that a backward pass may follow.
        norm: what kind the norms are.
        threads: that compute.

    Example:
        >>> config = LatentGNNConfig(channels=512, num_latents=100)
        >>> convolutions_pay(config, 1, 14 * 14, recorded=True), convolutions_pay(config, 1, 28 * 28, recorded=True)
        (True, False)
    """
    kind: NormKind | None = "affine" if norm == "group" and samples == 1 else norm
    rows, numbers = samples * nodes, samples * nodes * config.channels
    if kind is None or kind not in CONVOLVED:
        return False
    if samples == 1 and threads > 1 and not recorded:
        return numbers <= _SINGLE_NUMBERS
    if rows < config.reduced_channels:
        return False
    if samples > 1 and threads > 1 and nodes >= _BATCH_NODES:
        several_affine = kind == "affine" and samples >= _BATCH_OF_AFFINE
        if kind in ("group", "layer", "rms") or (several_affine and not recorded):
            return numbers <= _BATCH_NUMBERS
        if several_affine and config.channels <= _BATCH_CHANNELS and numbers <= _BATCH_NUMBERS_RECORDED:
            return True
        if kind == "batch" and numbers <= CONVOLVED[kind][1]:
            return True
    few, most = CONVOLVED[kind] if threads > 1 or kind == "group" else _CONVOLVED_ALONE
    return nodes in few and numbers <= most and rows * _computed_numbers(config) <= _CONVOLVED_INSIDE


def rows_pay(
    config: LatentGNNConfig, nodes: int, *, recorded: bool, norm: NormKind | None = "affine", threads: int = 2
) -> bool:
    """Whether the plain path is faster for an input whose channels lie innermost.

    Args:
        config: of the layer.
        nodes: of all samples together.
        recorded: autograd records, so that a backward pass may follow.
        norm: what kind the norms are.
        threads: that compute.

    Example:
        >>> config = LatentGNNConfig(channels=256, num_latents=64)
        >>> rows_pay(config, 8 * 32 * 32, recorded=False), rows_pay(config, 8 * 32 * 32, recorded=True)
        (True, False)
    """
    numbers = nodes * config.channels
    if norm is None or numbers > IN_ROWS.get(norm, 0):
        return False
    if not recorded:
        return True
    reduced = config.reduced_channels * (1 if config.symmetric else 2)
    return (
        threads > 1 and norm not in ("affine", "batch") and (numbers >= _IN_ROWS_RECORDED or reduced >= config.channels)
    )


def _operations_of_a_node(config: LatentGNNConfig) -> int:
    """Reduction, assignment, gather, scatter and expansion; without what is done once for a sample."""
    ways, kernels, reduced = 1 if config.symmetric else 2, len(config.latents), config.reduced_channels
    return 2 * reduced * (config.channels * (ways + kernels) + (ways + 2) * sum(config.latents))


def _computed_numbers(config: LatentGNNConfig) -> int:
    """Numbers a node that are computed on the way: values, assignments, features."""
    ways, latents = 1 if config.symmetric else 2, config.num_groups * sum(config.latents)
    return ways * (config.reduced_channels + latents) + len(config.latents) * config.reduced_channels


def _plain_numbers(config: LatentGNNConfig) -> int:
    """Numbers a node that the plain path holds: what each norm, ReLU and unit length is applied to or gives, and x."""
    ways, latents = 1 if config.symmetric else 2, config.num_groups * sum(config.latents)
    features = len(config.latents) * config.reduced_channels
    inside = 2 * ways * config.reduced_channels + (2 * ways + 1) * latents + features * (1 + 2 * config.graph_conv)
    return inside + config.channels * (2 + config.residual)


def _normalized_numbers(config: LatentGNNConfig) -> int:
    """Numbers a node that norms before the output's are applied to."""
    ways, latents = 1 if config.symmetric else 2, config.num_groups * sum(config.latents)
    convolved = len(config.latents) * config.reduced_channels if config.graph_conv else 0
    return ways * (config.reduced_channels + latents) + convolved


def _expanded_numbers(config: LatentGNNConfig, nodes: int, norm: NormKind) -> int:
    """Numbers a node that the output's norm is applied to, unless its statistics come from the features' moments."""
    features = len(config.latents) * config.reduced_channels
    return 0 if norm == "batch" and moments_pay(nodes, features, config.channels) else config.channels


def moments_pay(nodes: int, features: int, channels: int) -> bool:
    """Whether the output's statistics cost less by the features' moments than by the output itself.

    Moments take two products of F x F, one over the nodes and one over the channels; the output's own take about six
    passes over C numbers a node, each worth about twenty multiply-adds, as measured. Moments also take twenty calls
    more, which a small output is not worth.
    """
    if nodes * channels <= _SMALL_OUTPUT:
        return False
    return features * features * (nodes + channels) < 60 * nodes * channels


def scaling_pays(nodes: int, *, channels: int, reduced: int, features: int) -> bool:
    """Whether the norms' scales cost less in the matrices than in what the matrices give: fewer numbers.

    Args:
        nodes: of all samples together.
        channels: C.
        reduced: rows of all reductions.
        features: that the output is expanded from.
    """
    return channels * (reduced + features) <= nodes * (reduced + channels)


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
        config: of the layer.
        shape: of the input, (S, C, *spatial).
        element_size: bytes of a number.
        norm: what kind the norms are.
        held: whether what is computed is held for the backward pass; as `holds` says by default.

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

    # For each node; a product's gradient takes two more of its size.
    reduce, assign, features = 2 * channels * ways * reduced, ways * 2 * reduced * latents, 2 * reduced * latents
    forward = _operations_of_a_node(config)
    backward = 2 * forward + (0 if held else reduce + assign + features)

    # For each sample.
    squared = sum(2 * reduced * count * count for count in config.latents)
    convolve = sum(2 * count * reduced * (reduced // groups) for count in config.latents) if config.graph_conv else 0
    small_forward = 2 * squared + convolve
    small_backward = (2 if held else 3) * small_forward
    size = samples * nodes * channels * element_size
    sums = samples * groups * latents * (reduced // groups + 1) * max(element_size, 4)
    more = _computed_numbers(config) if held else 0
    if norm == "batch" or (held and norm != "affine"):
        more += _normalized_numbers(config)
    if held and norm != "affine":
        more += _expanded_numbers(config, samples * nodes, norm)
    return Cost(
        parameters=_parameters(config),
        forward_operations=samples * (nodes * forward + small_forward),
        backward_operations=samples * (nodes * backward + small_backward),
        forward_bytes=3 * size,
        backward_bytes=5 * size,
        held_bytes=size + sums + samples * nodes * more * element_size,
    )


def floor_operations(config: LatentGNNConfig, shape: Sequence[int]) -> int:
    """Operations of a forward pass that the algebra leaves.

    U, and with graph convolution G, stands on the latents or on the nodes, whichever takes fewer operations.

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
    # Of the path with batch statistics, what it holds is known here, and not what it computes.
    known = {"training batch norm": ("parameters", "held for backward", "held over the input")}

    def cell(column: str, row: str) -> str:
        return rows[row](columns[column]) if row in known.get(column, rows) else "-"

    lines = [" " * 22 + "".join(f"{column:>22}" for column in columns)]
    lines += [f"{row:22}" + "".join(f"{cell(column, row):>22}" for column in columns) for row in rows]
    return "\n".join(lines)
