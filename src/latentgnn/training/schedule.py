"""The learning rate schedule, as a pure function of the step."""

import math
from bisect import bisect_right

from latentgnn.training.config import ScheduleConfig


def rate_factor(config: ScheduleConfig, step: int, *, steps: int) -> float:
    """Return the factor on the learning rate in an optimizer step.

    Warm-up is linear, from ``warmup_factor`` in step 0 to 1 in step ``warmup_steps``, as in maskrcnn-benchmark. Cosine
    and polynomial decay run from the end of the warm-up to zero at ``steps``.

    Args:
        config: the schedule.
        step: number of steps done so far.
        steps: total number of steps.

    Example:
        >>> round(rate_factor(ScheduleConfig(warmup_steps=500, warmup_factor=1 / 3), 250, steps=90_000), 4)
        0.6667
    """
    factor = 1.0
    if step < config.warmup_steps:
        factor = config.warmup_factor + (1.0 - config.warmup_factor) * step / config.warmup_steps
    if config.name == "steps":
        return factor * config.decay ** bisect_right(config.milestones, step)
    if config.name == "cosine" and step >= config.warmup_steps:
        return 0.5 * (1.0 + math.cos(math.pi * (step - config.warmup_steps) / (steps - config.warmup_steps)))
    if config.name == "polynomial" and step >= config.warmup_steps:
        return (1.0 - (step - config.warmup_steps) / (steps - config.warmup_steps)) ** config.power
    return factor
