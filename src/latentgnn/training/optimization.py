"""The optimizer and its parameter groups."""

from collections.abc import Collection
from typing import Any

import torch
from torch import nn

from latentgnn.blocks import blocks_of
from latentgnn.training.config import OptimizerConfig


def parameter_groups(model: nn.Module, config: OptimizerConfig, trained: Collection[str] = ()) -> list[dict[str, Any]]:
    """Return the trainable parameters of a model, each in one group: host or blocks, weights or norms.

    ``weights`` have two or more dimensions; ``norms`` are all others (biases, norms, gammas) and have their own weight
    decay. The blocks have their own rate. If the host starts from trained weights and the factors differ, its trained
    parameters have another rate than its untrained ones. Frozen parameters are in no group, and no group is empty.

    Args:
        model: the model.
        config: rates and weight decays.
        trained: names of the parameters that began with trained weights.
    """
    # A parameter that has two names may be listed under either.
    began_trained = {id(value) for name, value in model.named_parameters(remove_duplicate=False) if name in trained}
    apart = bool(began_trained) and config.trained_factor != config.new_factor
    in_blocks = {id(parameter) for block in blocks_of(model).values() for parameter in block.parameters()}
    norm_decay = config.weight_decay if config.norm_weight_decay is None else config.norm_weight_decay
    groups: dict[str, dict[str, Any]] = {}
    for parameter in model.parameters():
        if not parameter.requires_grad:
            continue
        if id(parameter) in in_blocks:
            owner, factor = "blocks", config.block_factor
        elif id(parameter) in began_trained:
            owner, factor = "trained" if apart else "host", config.trained_factor
        else:
            owner, factor = "host", config.new_factor if began_trained else 1.0
        kind, decay = ("weights", config.weight_decay) if parameter.ndim >= 2 else ("norms", norm_decay)
        rate = config.learning_rate * factor
        name = f"{owner}/{kind}"
        group = groups.setdefault(name, {"name": name, "params": [], "lr": rate, "weight_decay": decay})
        group["params"].append(parameter)
    return list(groups.values())


def build_optimizer(model: nn.Module, config: OptimizerConfig, trained: Collection[str] = ()) -> torch.optim.Optimizer:
    """Build the optimizer over `parameter_groups`; each group stores its rate before the schedule as ``base_rate``."""
    groups = parameter_groups(model, config, trained)
    for group in groups:
        group["base_rate"] = group["lr"]
    if config.name == "adamw":
        return torch.optim.AdamW(groups, lr=config.learning_rate)
    return torch.optim.SGD(groups, lr=config.learning_rate, momentum=config.momentum)
