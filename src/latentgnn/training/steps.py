"""One optimizer step: seeds, batches, losses, backward, clipping; it depends only on the position in the run."""

import math
import time
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any, cast

import torch
import torch.distributed
from lightning.fabric import Fabric
from torch import Tensor, nn

from latentgnn.blocks import blocks_of
from latentgnn.errors import UserError
from latentgnn.training.checkpoints import Checkpoint, check_finite
from latentgnn.training.config import TrainingConfig
from latentgnn.training.large_models import gathered, recompute, share_out
from latentgnn.training.optimization import build_optimizer
from latentgnn.training.randomness import seed_generators
from latentgnn.training.sampling import place_in_step
from latentgnn.training.schedule import rate_factor
from latentgnn.training.task import TrainingTask

Losses = dict[str, Tensor]


class NonFiniteLoss(UserError):
    """A loss is infinite or NaN; its step was not taken."""


class OptimizerSteps:
    """Takes a run's optimizer steps, starting from the first one or from a checkpoint.

    Args:
        fabric: a launched Fabric.
        task: the model, which is trained in place, and its losses.
        config: the run's configuration.
        checkpoint: the checkpoint to resume from.

    Attributes:
        done: total number of optimizer steps done.
        seconds: time that this process's steps took.
        rate: the learning rate of the last step, before any group's factor.
    """

    def __init__(
        self, fabric: Fabric, task: TrainingTask, config: TrainingConfig, checkpoint: Checkpoint | None
    ) -> None:
        self.done = 0
        self.seconds = 0.0
        self.rate = 0.0
        self._fabric, self._task, self._config = fabric, task, config
        self._sums: dict[str, Tensor] = {}
        self._count = 0
        self._blocks = blocks_of(task.model)
        task.model.train()
        if config.channels_last:
            # Setting the weights is enough: a convolution with channels-last weights converts its input and output to
            # it.
            task.model.to(memory_format=torch.channels_last)
        if checkpoint is not None:
            checkpoint.load_into(task.model)
        if config.activation_checkpointing:
            recompute(task.units())
        self._forward = fabric.setup_module(_Forward(task.model))
        # After the set-up, which may replace the parameters.
        self._optimizer = cast(
            torch.optim.Optimizer,
            fabric.setup_optimizers(build_optimizer(task.model, config.optimizer, task.trained)),
        )
        if checkpoint is not None:
            self.done = checkpoint.step
            checkpoint.load_optimizer_into(self._optimizer)
            share_out(self._optimizer)
            fabric.strategy.precision.load_state_dict(checkpoint.precision)

    def take(self, batches: Iterator[Any]) -> None:
        """Take the next step.

        Args:
            batches: iterator over this process's micro-batches.

        Raises:
            NonFiniteLoss: in all processes, if one of them has such a loss.
            UserError: if a sample could not be loaded.
        """
        since = time.perf_counter()
        self._set_rate()
        self._optimizer.zero_grad()
        for part in range(self._config.accumulate):
            batch = self._fabric.to_device(next(batches))
            place = place_in_step(part, world=self._fabric.world_size, rank=self._fabric.global_rank)
            # The last word, now always 0, was the rank before runs could be resumed with another number of processes.
            seed_generators(self._config.seed, self.done, place, 0)
            with self._fabric.no_backward_sync(self._forward, enabled=part < self._config.accumulate - 1):
                losses: Losses = self._forward(partial(self._task.losses, batch))
                self._check_and_note(losses, batch)
                self._fabric.backward(torch.stack(list(losses.values())).sum() / self._config.accumulate)
        if self._config.clip_norm is not None:
            # Scaled 16-bit gradients overflow occasionally; the scaler skips such a step.
            self._fabric.clip_gradients(
                self._forward, self._optimizer, max_norm=self._config.clip_norm, error_if_nonfinite=False
            )
        self._optimizer.step()
        self.done += 1
        self.seconds += time.perf_counter() - since

    def state(self) -> dict[str, Any]:
        """Return what a checkpoint stores of model and optimizer, unsharded; all processes must call it.

        Raises:
            UserError: if weights or optimizer state are infinite or NaN.
        """
        state = gathered({"state_dict": self._task.model.state_dict(), "optimizer": self._optimizer.state_dict()})
        # In every process, not only in the one that writes: so all of them end together.
        check_finite(state, step=self.done)
        if precision := self._fabric.strategy.precision.state_dict():
            state["precision"] = precision
        return state

    def take_losses(self) -> dict[str, float]:
        """Return the mean of each loss since the last call, over all processes, with their sum as ``loss`` first."""
        means = self._fabric.all_reduce(torch.stack(list(self._sums.values())) / self._count, reduce_op="mean")
        assert isinstance(means, Tensor)
        parts = dict(zip(self._sums, means.tolist(), strict=True))
        self._sums = {}
        self._count = 0
        return {"loss": sum(parts.values()), **{f"loss/{name}": value for name, value in parts.items()}}

    def gammas(self) -> dict[str, float]:
        """Return the gamma of every block that has one, by block name."""
        return {
            f"gamma/{name}": float(gathered(block.gamma.detach()))
            for name, block in self._blocks.items()
            if isinstance(block.gamma, Tensor)
        }

    def _set_rate(self) -> None:
        # Set, not stepped: the rate has no history that a checkpoint would have to store.
        factor = rate_factor(self._config.schedule, self.done, steps=self._config.steps)
        self.rate = self._config.optimizer.learning_rate * factor
        for group in self._optimizer.param_groups:
            group["lr"] = group["base_rate"] * factor

    def _check_and_note(self, losses: Losses, batch: Any) -> None:
        values = torch.stack([loss.detach().float() for loss in losses.values()])
        self._check_finite(dict(zip(losses, values.tolist(), strict=True)), batch)
        for name, value in zip(losses, values, strict=True):
            self._sums[name] = self._sums[name] + value if name in self._sums else value
        self._count += 1

    def _check_finite(self, losses: Mapping[str, float], batch: Any) -> None:
        """Raise an error in all processes, before the backward pass, if one of them has a loss that is not finite."""
        bad = [f"{name} = {value}" for name, value in losses.items() if not math.isfinite(value)]
        if not self._fabric.strategy.reduce_boolean_decision(bool(bad), all=False):
            return
        mine = f"{', '.join(bad)} for samples {self._task.sample_ids(batch)}" if bad else None
        messages = [mine]
        if self._fabric.world_size > 1:
            messages = [None] * self._fabric.world_size
            torch.distributed.all_gather_object(messages, mine)
        raise NonFiniteLoss(
            f"the loss is not finite in step {self.done + 1}: {'; '.join(text for text in messages if text)}. "
            "That step was not taken and the last checkpoint is as it was. Look at those samples, or lower the "
            "learning rate, lengthen the warm-up or clip the gradient (clip_norm)"
        )


class _Forward(nn.Module):
    """Runs a function of the model as a forward pass, as mixed precision and distributed training require.

    The function holds its batch, because Fabric would convert a batch that it sees, including boxes and labels, to 16
    bits.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, function: Callable[[], Losses]) -> Losses:
        return function()
