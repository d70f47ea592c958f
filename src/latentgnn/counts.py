"""Operations and numbers of a single node, which costs and choices by size are made of.

A multiply-add counts as two operations.
"""

from latentgnn.config import LatentGNNConfig


def operations_of_a_node(config: LatentGNNConfig) -> int:
    """Reduction, assignment, gather, scatter and expansion; without what is done once for a sample."""
    ways, kernels, reduced = 1 if config.symmetric else 2, len(config.latents), config.reduced_channels
    return 2 * reduced * (config.channels * (ways + kernels) + (ways + 2) * sum(config.latents))


def computed_numbers(config: LatentGNNConfig) -> int:
    """Numbers a node that are computed on the way: values, assignments, features."""
    ways, latents = 1 if config.symmetric else 2, config.num_groups * sum(config.latents)
    return ways * (config.reduced_channels + latents) + len(config.latents) * config.reduced_channels


def plain_numbers(config: LatentGNNConfig) -> int:
    """Numbers a node that the plain path holds: what each norm, ReLU and unit length is applied to or gives, and x."""
    ways, latents = 1 if config.symmetric else 2, config.num_groups * sum(config.latents)
    features = len(config.latents) * config.reduced_channels
    inside = 2 * ways * config.reduced_channels + (2 * ways + 1) * latents + features * (1 + 2 * config.graph_conv)
    return inside + config.channels * (2 + config.residual)


def normalized_numbers(config: LatentGNNConfig) -> int:
    """Numbers a node that norms before the output's are applied to."""
    ways, latents = 1 if config.symmetric else 2, config.num_groups * sum(config.latents)
    convolved = len(config.latents) * config.reduced_channels if config.graph_conv else 0
    return ways * (config.reduced_channels + latents) + convolved
