"""Operations and elements per node, which `cost` and `by_size` are computed from.

A multiply-add counts as two operations.
"""

from latentgnn.config import LatentGNNConfig


def operations_of_a_node(config: LatentGNNConfig) -> int:
    """Operations per node of reduction, assignment, gather, scatter and expansion, without those once per sample."""
    ways, kernels, reduced = 1 if config.symmetric else 2, len(config.latents), config.reduced_channels
    return 2 * reduced * (config.channels * (ways + kernels) + (ways + 2) * sum(config.latents))


def computed_numbers(config: LatentGNNConfig) -> int:
    """Elements per node that are computed inside: values, assignments, features."""
    ways, latents = 1 if config.symmetric else 2, config.num_groups * sum(config.latents)
    return ways * (config.reduced_channels + latents) + len(config.latents) * config.reduced_channels


def plain_numbers(config: LatentGNNConfig) -> int:
    """Elements per node that the plain path holds: inputs or outputs of each norm, ReLU and unit length, and x."""
    ways, latents = 1 if config.symmetric else 2, config.num_groups * sum(config.latents)
    features = len(config.latents) * config.reduced_channels
    inside = 2 * ways * config.reduced_channels + (2 * ways + 1) * latents + features * (1 + 2 * config.graph_conv)
    return inside + config.channels * (2 + config.residual)


def normalized_numbers(config: LatentGNNConfig) -> int:
    """Elements per node that all norms but the output's are applied to."""
    ways, latents = 1 if config.symmetric else 2, config.num_groups * sum(config.latents)
    convolved = len(config.latents) * config.reduced_channels if config.graph_conv else 0
    return ways * (config.reduced_channels + latents) + convolved
