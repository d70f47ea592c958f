"""How a model is trained: steps, batches, optimizer, schedule, hardware. The same for every task."""

import math
from dataclasses import dataclass, field
from operator import attrgetter
from typing import Literal

from latentgnn.errors import UserError


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """The optimizer and its parameter groups.

    Args:
        name: ``sgd`` (with momentum) or ``adamw``.
        learning_rate: rate after warm-up, for a whole batch of ``TrainingConfig.batch_size``.
        momentum: of ``sgd``.
        weight_decay: of weights of two and more dimensions.
        norm_weight_decay: of biases, norms and gammas; ``null`` takes ``weight_decay``.
        block_factor: the LatentGNN blocks' learning rate, as a multiple of ``learning_rate``.
    """

    name: Literal["sgd", "adamw"] = "sgd"
    learning_rate: float = 0.02
    momentum: float = 0.9
    weight_decay: float = 1e-4
    norm_weight_decay: float | None = None
    block_factor: float = 1.0


@dataclass(frozen=True, kw_only=True)
class ScheduleConfig:
    """The learning rate's course over the steps.

    Args:
        name: ``steps`` (times ``decay`` at each of ``milestones``), ``cosine`` (to zero) or ``constant``.
        warmup_steps: optimizer steps of linear warm-up.
        warmup_factor: the warm-up's first rate, as a fraction.
        milestones: optimizer steps at which ``steps`` multiplies by ``decay``.
        decay: that factor.
    """

    name: Literal["steps", "cosine", "constant"] = "steps"
    warmup_steps: int = 500
    warmup_factor: float = 1.0 / 3.0
    milestones: tuple[int, ...] = ()
    decay: float = 0.1


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """A training run.

    Args:
        steps: optimizer steps in all.
        batch_size: samples an optimizer step, over all devices, machines and accumulated parts.
        accumulate: parts that a device works off one after another in a step, to save memory.
        precision: ``32-true``, ``bf16-mixed`` or ``16-mixed``.
        clip_norm: largest norm of the gradient; ``null`` does not clip.
        channels_last: keep convolution weights and images channels-last, which most hardware prefers.
        accelerator: ``auto``, ``cpu``, ``gpu``, ``mps``.
        devices: devices a machine, or ``auto``.
        machines: number of machines.
        workers: data-loading processes a device.
        seed: of initialisation, order, augmentation and sampling.
        log_every: steps between two log lines.
        validate_every: steps between two validations; ``null`` validates once, at the end.
        checkpoint_every: steps between two checkpoints.
        on_changed_data: ``stop`` where a resumed run meets other data than it was stopped with, or ``accept`` them and
            say what differs.
        monitor: the metric whose highest value makes a checkpoint the best one; ``null`` takes the task's own.
        optimizer: see `OptimizerConfig`.
        schedule: see `ScheduleConfig`.
    """

    steps: int = 90_000
    batch_size: int = 16
    accumulate: int = 1
    precision: Literal["32-true", "bf16-mixed", "16-mixed"] = "32-true"
    clip_norm: float | None = None
    channels_last: bool = False
    accelerator: str = "auto"
    devices: int | Literal["auto"] = "auto"
    machines: int = 1
    workers: int = 2
    seed: int = 0
    log_every: int = 20
    validate_every: int | None = None
    checkpoint_every: int = 1000
    on_changed_data: Literal["stop", "accept"] = "stop"
    monitor: str | None = None
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)


# The least and the largest value of each number. The largest are beyond any use: with more, a run would not fail but
# seem to hang, such as at starting a million processes.
_MANY, _PROCESSES = 2**31 - 1, 4096
_RANGES: dict[str, tuple[float, float]] = {
    "steps": (1, _MANY),
    "batch_size": (1, _MANY),
    "accumulate": (1, _MANY),
    "devices": (1, _PROCESSES),
    "machines": (1, _PROCESSES),
    "workers": (0, _PROCESSES),
    # What torch's generators take.
    "seed": (0, 2**63 - 1),
    "log_every": (1, _MANY),
    "validate_every": (1, _MANY),
    "checkpoint_every": (1, _MANY),
    "optimizer.learning_rate": (0, math.inf),
    "optimizer.momentum": (0, 1),
    "optimizer.weight_decay": (0, math.inf),
    "optimizer.norm_weight_decay": (0, math.inf),
    "optimizer.block_factor": (0, math.inf),
    "schedule.warmup_steps": (0, _MANY),
    "schedule.warmup_factor": (0, math.inf),
    "schedule.decay": (0, math.inf),
}


def check(config: TrainingConfig) -> None:
    """Refuse numbers that make no sense.

    Raises:
        UserError: naming the setting, what it is and what it may be.
    """
    for name, (least, most) in _RANGES.items():
        value = attrgetter(name)(config)
        if value is None or value == "auto":
            continue
        # Written so that what is not a number is refused too.
        if not (least <= value <= most and value < math.inf):
            expected = f"{least} to {most}" if value > most else f"{least} or more"
            raise UserError(f"training.{name} is {value}, expected {expected}")
    # A norm of nothing would stop all learning.
    if config.clip_norm is not None and not 0 < config.clip_norm < math.inf:
        raise UserError(f"training.clip_norm is {config.clip_norm}, expected a number above 0, or null not to clip")
    milestones = list(config.schedule.milestones)
    if milestones != sorted(milestones) or any(milestone < 0 for milestone in milestones):
        raise UserError(f"training.schedule.milestones must ascend, from 0 on, got {milestones}")
    if config.schedule.name == "cosine" and config.schedule.warmup_steps >= config.steps:
        raise UserError(
            f"training.schedule.warmup_steps is {config.schedule.warmup_steps}, "
            f"which leaves nothing of {config.steps} steps for the cosine"
        )
