"""Choices that depend only on sizes, dtypes and threads: what is held, which path, where a norm's scale is applied.

Nothing is timed at run time, so a resumed run takes the same path and ends with the same bits. The thresholds are
measured: docs/results.md.

Symbols: S samples, N nodes, C channels, R reduced channels.
"""

from collections.abc import Mapping

from latentgnn.config import LatentGNNConfig
from latentgnn.counts import computed_numbers, normalized_numbers, operations_of_a_node, plain_numbers
from latentgnn.norms import NormKind

# Up to this many bytes, input included, everything is held, because recomputing costs more time than the memory is
# worth. The limit is higher for norms over a sample or a node. Measured: docs/results.md.
HOLD_BYTES: Mapping[NormKind, int] = {
    "affine": 24 << 20,
    "batch": 24 << 20,
    "group": 80 << 20,
    "layer": 80 << 20,
    "rms": 80 << 20,
}
# The limit on a GPU, where calls cost more than arithmetic. For a map of 256 x 512 x 512, 268 MB, the core took 6.1
# ms a step holding and 7.4 ms computing again with frozen norms, with peaks of 2.1 and 1.8 times the input; 9.6 and
# 10.8 ms with batch norm, 11.8 and 13.1 ms with layer norm. Up to this limit the plain path replaces the core:
# 10.8, 13.2 and 11.9 ms a step there with batch, group and layer norm, and at smaller sizes up to half the core's
# time, with about 6 times the input at its peak (benchmarks/results/gpu-2026-11-26-paths.md).
HOLD_BYTES_ON_GPU = 512 << 20
# In a compiled layer, inputs of at least this many elements use the Triton kernels; smaller ones use the compiled plain
# path. Derived from separate GPU times in docs/results.md, not measured directly.
KERNELS_PAY_COMPILED = 1 << 23
# Up to this many forward operations, the plain path is faster on a CPU: it makes fewer calls (docs/results.md).
SMALL_OPERATIONS = 1 << 25
# For which maps the plain path is faster on a CPU with several threads, by kind of norm: the range of nodes in a
# sample, and the most elements of the input (docs/results.md).
CHANNELS_FIRST: Mapping[NormKind, tuple[range, int]] = {
    "affine": (range(32, 401), 1 << 20),
    "batch": (range(128, 401), 5 << 17),
    "group": (range(32, 401), 1 << 20),
    "layer": (range(128, 401), 1 << 18),
    "rms": (range(128, 401), 1 << 18),
}
# The same on one thread, where less is gained; and the most elements that the layer may compute inside.
_ON_ONE_THREAD, _INSIDE_CHANNELS_FIRST = (range(128, 401), 3 << 16), 1 << 20
# Batches of larger maps: from this many nodes in a sample, and up to this many input elements, the plain path is faster
# for norms over a sample or a node, and for affine norms without a backward pass. Beyond, its time can double with the
# state of the process's memory; the core's cannot.
_BATCH_NODES, _BATCH_NUMBERS = 128, 15 << 17
# With affine norms, only from this many samples on; and if a backward pass may follow, only up to this many channels
# and up to `_INSIDE_CHANNELS_FIRST` elements inside.
_AFFINE_SAMPLES, _AFFINE_CHANNELS = 4, 256
# Without a backward pass, the plain path is faster for a single sample of up to this many elements.
_SINGLE_NUMBERS = 1 << 19
# The most elements, over all nodes, that the plain path may compute inside; unlike the core, it has no blocks.
_INSIDE = 1 << 22
# Channels-last inputs: without a backward pass, the plain path is faster on a CPU up to this many elements, by kind of
# norm. With one, it is faster only with several threads and norms over a sample or a node, from
# `_CHANNELS_LAST_RECORDED` elements on or if the reductions do not reduce the channels (docs/results.md).
CHANNELS_LAST: Mapping[NormKind, int] = {
    "affine": 1 << 22,
    "batch": 1 << 21,
    "group": 1 << 23,
    "layer": 1 << 23,
    "rms": 1 << 23,
}
_CHANNELS_LAST_RECORDED = 1 << 19
# Up to this many elements, batch norm's statistics are taken from the output itself, without moments.
_SMALL_OUTPUT = 1 << 19


def holds(
    config: LatentGNNConfig, nodes: int, element_size: int, *, norm: NormKind = "affine", on_gpu: bool = False
) -> bool:
    """Whether a layer holds what it computes for the backward pass, instead of recomputing it.

    Args:
        config: the layer's options.
        nodes: total over all samples.
        element_size: bytes per element.
        norm: kind of the norms.
        on_gpu: whether the layer runs on a GPU.

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
    """Whether a GPU should take the plain path: it makes fewer calls, and does not hold too much.

    Args:
        config: the layer's options.
        nodes: total over all samples.
        element_size: bytes of a number.

    Example:
        >>> config = LatentGNNConfig(channels=512, num_latents=150, graph_conv=True)
        >>> plain_pays_on_gpu(config, 2 * 100 * 168, 4), plain_pays_on_gpu(config, 4 * 100 * 168, 4)
        (True, False)
    """
    return nodes * element_size * plain_numbers(config) <= HOLD_BYTES_ON_GPU


def kernels_pay_compiled(nodes: int, channels: int) -> bool:
    """Whether a compiled layer should use the Triton kernels; a compiler makes the plain path's calls cheaper.

    Args:
        nodes: total over all samples.
        channels: C.
    """
    return nodes * channels >= KERNELS_PAY_COMPILED


def is_small(config: LatentGNNConfig, nodes: int) -> bool:
    """Whether an input is so small that a forward pass spends more time on calls than on arithmetic.

    Args:
        config: the layer's options.
        nodes: total over all samples.

    Example:
        >>> config = LatentGNNConfig(channels=256, num_latents=64)
        >>> is_small(config, 16 * 16), is_small(config, 32 * 32)
        (True, False)
    """
    return nodes * operations_of_a_node(config) <= SMALL_OPERATIONS


def channels_first_pays(
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
        config: the layer's options.
        samples: S.
        nodes: of each.
        recorded: autograd records, so that a backward pass may follow.
        norm: kind of the norms.
        threads: that compute.

    Example:
        >>> config = LatentGNNConfig(channels=512, num_latents=100)
        >>> [channels_first_pays(config, 1, nodes, recorded=True) for nodes in (14 * 14, 28 * 28)]
        [True, False]
    """
    kind: NormKind | None = "affine" if norm == "group" and samples == 1 else norm
    rows, numbers = samples * nodes, samples * nodes * config.channels
    inside = rows * computed_numbers(config)
    if kind is None or kind not in CHANNELS_FIRST or inside > _INSIDE:
        return False
    if samples == 1 and threads > 1 and not recorded:
        return numbers <= _SINGLE_NUMBERS
    if rows < config.reduced_channels:
        return False
    if samples > 1 and threads > 1 and nodes >= _BATCH_NODES:
        several_affine = kind == "affine" and samples >= _AFFINE_SAMPLES
        if kind in ("group", "layer", "rms") or (several_affine and not recorded):
            return numbers <= _BATCH_NUMBERS
        if several_affine and config.channels <= _AFFINE_CHANNELS and inside <= _INSIDE_CHANNELS_FIRST:
            return numbers <= _BATCH_NUMBERS
        if kind == "batch" and numbers <= CHANNELS_FIRST[kind][1]:
            return True
    few, most = CHANNELS_FIRST[kind] if threads > 1 or kind == "group" else _ON_ONE_THREAD
    return nodes in few and numbers <= most and inside <= _INSIDE_CHANNELS_FIRST


def channels_last_pays(
    config: LatentGNNConfig, nodes: int, *, recorded: bool, norm: NormKind | None = "affine", threads: int = 2
) -> bool:
    """Whether the plain path is faster for an input whose channels lie innermost.

    Args:
        config: the layer's options.
        nodes: total over all samples.
        recorded: autograd records, so that a backward pass may follow.
        norm: kind of the norms.
        threads: that compute.

    Example:
        >>> config = LatentGNNConfig(channels=256, num_latents=64)
        >>> [channels_last_pays(config, 8 * 32 * 32, recorded=recorded) for recorded in (False, True)]
        [True, False]
    """
    numbers = nodes * config.channels
    if norm is None or numbers > CHANNELS_LAST.get(norm, 0) or nodes * computed_numbers(config) > _INSIDE:
        return False
    if not recorded:
        return True
    reduced = config.reduced_channels * (1 if config.symmetric else 2)
    return (
        threads > 1
        and norm not in ("affine", "batch")
        and (numbers >= _CHANNELS_LAST_RECORDED or reduced >= config.channels)
    )


def expanded_numbers(config: LatentGNNConfig, nodes: int, norm: NormKind) -> int:
    """Elements per node that the output's norm needs to hold; 0 if its statistics come from the features' moments."""
    features = len(config.latents) * config.reduced_channels
    return 0 if norm == "batch" and moments_pay(nodes, features, config.channels) else config.channels


def moments_pay(nodes: int, features: int, channels: int) -> bool:
    """Whether it is cheaper to get the output's statistics from the features' moments than from the output.

    Moments take two products with F x F, one over the nodes and one over the channels. Statistics of the output take
    about six passes over C elements per node, each worth about twenty multiply-adds (measured). Moments also make
    about twenty more calls, which does not pay for a small output.
    """
    if nodes * channels <= _SMALL_OUTPUT:
        return False
    return features * features * (nodes + channels) < 60 * nodes * channels


def scaling_pays(nodes: int, *, channels: int, reduced: int, features: int) -> bool:
    """Whether it is cheaper to scale the matrices than their outputs, because they have fewer elements.

    Args:
        nodes: total over all samples.
        channels: C.
        reduced: rows of all reductions together.
        features: columns of the expansion.
    """
    return channels * (reduced + features) <= nodes * (reduced + channels)
