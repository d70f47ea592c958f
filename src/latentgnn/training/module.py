"""What the Lightning Trainer runs: a task's losses, with seeds, rates and checks that depend on the step alone."""

import math
from collections.abc import Mapping
from typing import Any

import lightning.pytorch as lightning
import torch
import torch.distributed
from torch import Tensor

from latentgnn.errors import UserError
from latentgnn.training.config import TrainingConfig
from latentgnn.training.optimization import blocks_of, build_optimizer
from latentgnn.training.randomness import seed_generators
from latentgnn.training.schedule import rate_factor
from latentgnn.training.task import TrainingTask


class NonFiniteLoss(UserError):
    """A loss is infinite or not a number; the step that it belongs to was not taken."""


class TrainingModule(lightning.LightningModule):
    """A task as the Trainer sees it.

    Lightning counts batches since the start of the process; ``first_step`` is what a resumed run had done before, and
    all that depends on the place in the run depends on ``step``.

    Args:
        task: the model, its data and its losses.
        config: the run.
        first_step: optimizer steps done before.
        record: what a checkpoint says besides weights and optimizer, as plain data.
    """

    def __init__(self, task: TrainingTask, config: TrainingConfig, *, first_step: int, record: dict[str, Any]) -> None:
        super().__init__()
        self.task = task
        self.config = config
        self.record = record
        self.step = first_step
        self.model = task.model
        if config.channels_last:
            # Weights alone suffice: a convolution with channels-last weights takes its input so and gives it on so.
            self.model.to(memory_format=torch.channels_last)
        self.blocks = blocks_of(task.model)
        self._sums: dict[str, Tensor] = {}
        self._count = 0

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return build_optimizer(self.model, self.config.optimizer)

    @property
    def rate(self) -> float:
        """The learning rate of the current step, before any group's factor."""
        return self.config.optimizer.learning_rate * rate_factor(
            self.config.schedule, self.step, steps=self.config.steps
        )

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        micro_batch = batch_idx % self.config.accumulate
        seed_generators(self.config.seed, self.step, micro_batch, self.global_rank)
        if micro_batch == 0:
            # Set, not stepped: the rate has no history that a checkpoint would have to hold.
            factor = rate_factor(self.config.schedule, self.step, steps=self.config.steps)
            for group in self.trainer.optimizers[0].param_groups:
                group["lr"] = group["base_rate"] * factor

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        losses = self.task.losses(batch)
        values = torch.stack([loss.detach().float() for loss in losses.values()])
        self._check_finite(dict(zip(losses, values.tolist(), strict=True)), batch)
        for name, value in zip(losses, values, strict=True):
            self._sums[name] = self._sums[name] + value if name in self._sums else value
        self._count += 1
        return torch.stack(list(losses.values())).sum()

    def _check_finite(self, losses: Mapping[str, float], batch: Any) -> None:
        """Stop all processes together, before the backward pass, if one of them has a loss that is not finite."""
        bad = [f"{name} = {value}" for name, value in losses.items() if not math.isfinite(value)]
        if not self.trainer.strategy.reduce_boolean_decision(bool(bad), all=False):
            return
        mine = f"{', '.join(bad)} for samples {self.task.sample_ids(batch)}" if bad else None
        messages = [mine]
        if self.trainer.world_size > 1:
            messages = [None] * self.trainer.world_size
            torch.distributed.all_gather_object(messages, mine)
        raise NonFiniteLoss(
            f"the loss is not finite in step {self.step + 1}: {'; '.join(text for text in messages if text)}. "
            "That step was not taken and the last checkpoint is as it was. Look at those samples, or lower the "
            "learning rate, lengthen the warm-up or clip the gradient (clip_norm)"
        )

    def take_losses(self) -> dict[str, float]:
        """The mean of each loss since the last call, over all processes, with their sum as ``loss`` first."""
        means = torch.stack(list(self._sums.values())) / self._count
        means = self.trainer.strategy.reduce(means, reduce_op="mean")
        parts = dict(zip(self._sums, means.tolist(), strict=True))
        self._sums = {}
        self._count = 0
        return {"loss": sum(parts.values()), **{f"loss/{name}": value for name, value in parts.items()}}

    def gammas(self) -> dict[str, float]:
        """The gamma of every block that has one, by the block's name."""
        return {
            f"gamma/{name}": float(block.gamma.detach())
            for name, block in self.blocks.items()
            if isinstance(block.gamma, Tensor)
        }

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        # Lightning's own counters are left out: a resumed run counts from its first step on.
        for key in ("loops", "epoch", "global_step"):
            checkpoint.pop(key, None)
        checkpoint["latentgnn"] = {"step": self.step, **self.record}
