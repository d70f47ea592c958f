"""What a layer chooses by sizes, types and threads alone: what is held, which path, where a norm's scale stands.

No choice depends on a stopwatch, so that a resumed run takes the same way and ends with the same bits. The thresholds
are measured: docs/results.md.

Symbols: S samples, N nodes, C channels, R reduced channels.
"""

from collections.abc import Mapping

from latentgnn.config import LatentGNNConfig
from latentgnn.counts import computed_numbers, normalized_numbers, operations_of_a_node, plain_numbers
from latentgnn.norms import NormKind

# Where everything held, the input included, is at most so much, it is held: computing it again would take longer than
# the memory is worth; the more so for norms of a sample and of a node. As measured: docs/results.md.
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
IN_COLUMNS: Mapping[NormKind, tuple[range, int]] = {
    "affine": (range(32, 401), 1 << 20),
    "batch": (range(128, 401), 5 << 17),
    "group": (range(32, 401), 1 << 20),
    "layer": (range(128, 401), 1 << 18),
    "rms": (range(128, 401), 1 << 18),
}
# Likewise on one thread, where less is gained; and the most numbers that the layer computes inside.
_ON_ONE_THREAD, _INSIDE_COLUMNS = (range(128, 401), 3 << 16), 1 << 20
# Batches of larger maps: nodes of a sample from which on, and numbers of the input up to which, the plain path is
# faster with norms of a sample and of a node; and with affine norms where no backward pass may follow. For larger ones
# it may be faster or take twice as long, by what memory the process has; the core does not.
_BATCH_NODES, _BATCH_NUMBERS = 128, 15 << 17
# With affine norms it takes so many samples; and where a backward pass may follow no more channels than these, and no
# more inside than a map of few nodes may have.
_AFFINE_SAMPLES, _AFFINE_CHANNELS = 4, 256
# Of a single sample, numbers up to which it is faster where no backward pass may follow.
_SINGLE_NUMBERS = 1 << 19
# What the plain path may compute inside at once where the core works in blocks: numbers of all nodes.
_INSIDE = 1 << 22
# Numbers of an input whose channels lie innermost up to which the plain path is faster on a CPU, by the kind of norm,
# where no backward pass may follow. Where one may, and with several threads, that is so for norms of a sample and of a
# node from so many numbers on, or where the reductions leave no fewer channels than there are. As measured:
# docs/results.md.
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
    numbers = config.channels + computed_numbers(config)
    if norm != "affine":
        numbers += normalized_numbers(config) + expanded_numbers(config, nodes, norm)
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
    return nodes * element_size * plain_numbers(config) <= HOLD_BYTES_ON_GPU


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
    return nodes * operations_of_a_node(config) <= SMALL_OPERATIONS


def columns_pay(
    config: LatentGNNConfig,
    samples: int,
    nodes: int,
    *,
    recorded: bool,
    norm: NormKind | None = "affine",
    threads: int = 2,
) -> bool:
    """Whether the plain path is faster for an input whose nodes lie innermost.

    Args:
        config: of the layer.
        samples: S.
        nodes: of each.
        recorded: autograd records, so that a backward pass may follow.
        norm: what kind the norms are.
        threads: that compute.

    Example:
        >>> config = LatentGNNConfig(channels=512, num_latents=100)
        >>> columns_pay(config, 1, 14 * 14, recorded=True), columns_pay(config, 1, 28 * 28, recorded=True)
        (True, False)
    """
    kind: NormKind | None = "affine" if norm == "group" and samples == 1 else norm
    rows, numbers = samples * nodes, samples * nodes * config.channels
    inside = rows * computed_numbers(config)
    if kind is None or kind not in IN_COLUMNS or inside > _INSIDE:
        return False
    if samples == 1 and threads > 1 and not recorded:
        return numbers <= _SINGLE_NUMBERS
    if rows < config.reduced_channels:
        return False
    if samples > 1 and threads > 1 and nodes >= _BATCH_NODES:
        several_affine = kind == "affine" and samples >= _AFFINE_SAMPLES
        if kind in ("group", "layer", "rms") or (several_affine and not recorded):
            return numbers <= _BATCH_NUMBERS
        if several_affine and config.channels <= _AFFINE_CHANNELS and inside <= _INSIDE_COLUMNS:
            return numbers <= _BATCH_NUMBERS
        if kind == "batch" and numbers <= IN_COLUMNS[kind][1]:
            return True
    few, most = IN_COLUMNS[kind] if threads > 1 or kind == "group" else _ON_ONE_THREAD
    return nodes in few and numbers <= most and inside <= _INSIDE_COLUMNS


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
    if norm is None or numbers > IN_ROWS.get(norm, 0) or nodes * computed_numbers(config) > _INSIDE:
        return False
    if not recorded:
        return True
    reduced = config.reduced_channels * (1 if config.symmetric else 2)
    return (
        threads > 1 and norm not in ("affine", "batch") and (numbers >= _IN_ROWS_RECORDED or reduced >= config.channels)
    )


def expanded_numbers(config: LatentGNNConfig, nodes: int, norm: NormKind) -> int:
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
