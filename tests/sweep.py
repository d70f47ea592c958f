"""Layers and inputs that the tests of the layer go through."""

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.ops import FrozenBatchNorm2d

from latentgnn import FrozenBatchNorm, LatentGNN
from latentgnn.norms import is_frozen

NORMS = {
    "batch": nn.BatchNorm1d,
    "batch2d": nn.BatchNorm2d,
    "frozen": FrozenBatchNorm,
    "torchvision_frozen": FrozenBatchNorm2d,
    "group": lambda channels: nn.GroupNorm(2 if channels % 2 == 0 else 1, channels),
    "layer": nn.LayerNorm,
    "rms": nn.RMSNorm,
    "instance": partial(nn.InstanceNorm1d, affine=True),
    "tracked_instance": partial(nn.InstanceNorm1d, affine=True, track_running_stats=True),
    "none": nn.Identity,
}

CONFIGS: dict[str, dict[str, Any]] = {
    "asymmetric": {"num_latents": 5},
    "two_kernels": {"num_latents": (5, 3)},
    "graph_conv": {"num_latents": 5, "graph_conv": True},
    "graph_conv_two_kernels": {"num_latents": [4, 6], "graph_conv": True},
    "symmetric": {"num_latents": 5, "symmetric": True},
    "symmetric_graph_conv": {"num_latents": (3, 5), "symmetric": True, "graph_conv": True},
    "groups": {"num_latents": 3, "num_groups": 2},
    "groups_graph_conv": {"num_latents": (3, 4), "num_groups": 4, "graph_conv": True},
    "groups_symmetric": {"num_latents": (3, 2), "num_groups": 2, "symmetric": True},
    "mean": {"num_latents": 5, "node_scale": "mean"},
    "mean_symmetric": {"num_latents": (5, 2), "node_scale": "mean", "symmetric": True},
    "no_residual": {"num_latents": 5, "residual": False},
    "no_residual_graph_conv": {"num_latents": 5, "residual": False, "graph_conv": True},
}


def make_layer(
    name: str, norm: str = "batch", *, training: bool = False, channels: int = 32, seed: int = 0
) -> LatentGNN:
    """A float64 layer whose every parameter and statistic is away from its start."""
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    layer = LatentGNN(channels, reduction=4, norm=NORMS[norm], gamma_init=0.7, dtype=torch.float64, **CONFIGS[name])
    for module in layer.modules():
        if is_frozen(module) or isinstance(module, nn.modules.batchnorm._BatchNorm):
            features = module.running_mean.shape  # type: ignore[union-attr]
            module.running_mean.copy_(torch.randn(features, generator=generator) * 0.3)  # type: ignore[union-attr]
            module.running_var.copy_(torch.rand(features, generator=generator) + 0.5)  # type: ignore[union-attr]
        for parameter_name in ("weight", "bias"):
            value = getattr(module, parameter_name, None)
            if isinstance(value, Tensor) and value.dim() == 1:
                noise = torch.randn(value.shape, generator=generator) * 0.3
                value.data.copy_(noise + (1.0 if parameter_name == "weight" else 0.0))
    return layer.train(training)


def make_input(*shape: int, seed: int = 1) -> Tensor:
    """A float64 input with a mean that differs from channel to channel."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(*shape, generator=generator, dtype=torch.float64)
    return x + torch.randn(1, shape[1], *[1] * (len(shape) - 2), generator=generator, dtype=torch.float64)


def relative_error(value: Tensor, expected: Tensor) -> float:
    """Largest difference over the largest expected value, which counts as 1e-3 at least: some gradients are zero."""
    value, expected = value.detach().double(), expected.detach().double()
    return float((value - expected).abs().max() / expected.abs().max().clamp_min(1e-3))
