"""Validation between training steps, on all processes."""

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed
from lightning.fabric import Fabric
from torch.utils.data import DataLoader

from latentgnn.modules import evaluating
from latentgnn.training.large_models import whole
from latentgnn.training.loading import batches
from latentgnn.training.task import TrainingTask


def validate(
    fabric: Fabric,
    task: TrainingTask,
    loader: DataLoader[Any],
    *,
    after_batch: Callable[[int], None],
    stopped: Callable[[], bool],
) -> dict[str, float] | None:
    """Return the task's metrics for the current model; the same in every process.

    Args:
        fabric: moves batches, sets the precision and knows the processes.
        task: the model and its scores.
        loader: this process's share of the validation set.
        after_batch: called with the number of batches done.
        stopped: called after each batch; returns whether to abort.

    Returns:
        The metrics, or ``None`` if ``stopped`` returned true.
    """
    results: list[Any] = []
    if fabric.world_size > 1:
        # Each process has seen other batches; a checkpoint stores the first one's running statistics.
        for buffer in task.model.buffers():
            torch.distributed.broadcast(buffer, src=0)
    # Parameters are gathered because processes have unequal shares of the set.
    with evaluating(task.model), whole(task.model), torch.no_grad(), fabric.autocast(), batches(loader) as loaded:
        for number, batch in enumerate(loaded, start=1):
            results.extend(task.predict(fabric.to_device(batch)))
            after_batch(number)
            if stopped():
                return None
    if fabric.world_size > 1:
        shares: list[list[Any]] = [[] for _ in range(fabric.world_size)]
        torch.distributed.all_gather_object(shares, results)
        results = [result for share in shares for result in share]
    # One process computes the scores, which saves work and memory; the others wait for the metrics.
    metrics: dict[str, float] = {}
    if fabric.is_global_zero:
        metrics = {name: float(value) for name, value in task.score(results).items()}
    return fabric.broadcast(metrics)
