"""How a model is trained: steps, batches, optimizer, schedule, hardware. The same for every task."""

import math
from dataclasses import dataclass, field
from typing import Literal

from latentgnn.configuration.settings import expect
from latentgnn.errors import UserError

# Upper limits far beyond any use. Larger values would not make a run fail but seem to hang, for example while it starts
# a million processes.
_MANY, _PROCESSES = 2**31 - 1, 4096


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """The optimizer and its parameter groups.

    Args:
        name: ``sgd`` (with momentum) or ``adamw``.
        learning_rate: rate after warm-up, for a whole batch of ``TrainingConfig.batch_size``; it is not rescaled for
            other batch sizes or numbers of processes.
        reference_batch: the batch size that a recipe's ``learning_rate`` is meant for; a run with another one warns.
            ``null`` disables the warning.
        momentum: momentum of ``sgd``.
        weight_decay: weight decay of parameters with two or more dimensions.
        norm_weight_decay: weight decay of biases, norms and gammas; ``null`` takes ``weight_decay``.
        block_factor: learning rate of the LatentGNN blocks, as a multiple of ``learning_rate``.
        trained_factor: learning rate of parameters that start from trained weights, as a multiple of ``learning_rate``.
        new_factor: learning rate, as a multiple of ``learning_rate``, of parameters that start untrained in a run that
            starts from trained weights, such as the last layers of a detector for other categories.
    """

    name: Literal["sgd", "adamw"] = "sgd"
    learning_rate: float = 0.02
    reference_batch: int | None = None
    momentum: float = 0.9
    weight_decay: float = 1e-4
    norm_weight_decay: float | None = None
    block_factor: float = 1.0
    trained_factor: float = 1.0
    new_factor: float = 1.0

    def __post_init__(self) -> None:
        norms = self.norm_weight_decay
        expect(
            self,
            {
                "learning_rate": (0 <= self.learning_rate < math.inf, "0 or more"),
                "reference_batch": (
                    self.reference_batch is None or 1 <= self.reference_batch <= _MANY,
                    f"1 to {_MANY:,}, or null",
                ),
                "momentum": (0 <= self.momentum <= 1, "from 0 to 1"),
                "weight_decay": (0 <= self.weight_decay < math.inf, "0 or more"),
                "norm_weight_decay": (norms is None or 0 <= norms < math.inf, "0 or more, or null"),
                "block_factor": (0 <= self.block_factor < math.inf, "0 or more"),
                "trained_factor": (0 <= self.trained_factor < math.inf, "0 or more"),
                "new_factor": (0 <= self.new_factor < math.inf, "0 or more"),
            },
        )


@dataclass(frozen=True, kw_only=True)
class ScheduleConfig:
    """The course of the learning rate over the steps.

    Args:
        name: ``steps`` (multiplied by ``decay`` at each of ``milestones``), ``cosine`` (to zero), ``polynomial`` (to
            zero, as the remaining fraction of steps to the power of ``power``) or ``constant``.
        warmup_steps: number of optimizer steps of linear warm-up.
        warmup_factor: first rate of the warm-up, as a fraction of the full rate.
        milestones: optimizer steps at which ``steps`` multiplies the rate by ``decay``.
        decay: the factor that ``steps`` applies at each milestone.
        power: exponent of ``polynomial``; 0.9 is usual in segmentation.
    """

    name: Literal["steps", "cosine", "polynomial", "constant"] = "steps"
    warmup_steps: int = 500
    warmup_factor: float = 1.0 / 3.0
    milestones: tuple[int, ...] = ()
    decay: float = 0.1
    power: float = 0.9

    def __post_init__(self) -> None:
        milestones = list(self.milestones)
        expect(
            self,
            {
                "warmup_steps": (0 <= self.warmup_steps <= _MANY, f"0 to {_MANY:,}"),
                "warmup_factor": (0 <= self.warmup_factor < math.inf, "0 or more"),
                "milestones": (
                    milestones == sorted(milestones) and all(step >= 0 for step in milestones),
                    "ascending steps from 0 on",
                ),
                "power": (0 < self.power < math.inf, "more than 0"),
                "decay": (0 <= self.decay < math.inf, "0 or more"),
            },
        )


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """A training run.

    Args:
        steps: total number of optimizer steps.
        batch_size: samples per optimizer step, over all devices, machines and accumulated parts.
        accumulate: parts of a batch that a device processes one after another in a step, to save memory.
        precision: ``32-true``, ``bf16-mixed`` or ``16-mixed``.
        clip_norm: largest norm of the gradient; ``null`` does not clip.
        channels_last: keep convolution weights and images channels-last, which most hardware prefers.
        activation_checkpointing: recompute the activations inside the backbone's blocks in the backward pass instead of
            storing them: less memory for one more forward pass through them; gradients are the same.
        strategy: with several processes, what each of them holds: ``ddp`` the whole model, ``fsdp`` a part of the
            parameters, gradients and optimizer state (FSDP2).
        accelerator: ``auto``, ``cpu``, ``gpu``, ``mps``.
        devices: devices per machine, one process each; ``auto`` takes all, or those that torchrun or Slurm started
            processes for.
        machines: number of machines.
        workers: data-loading processes per device.
        seed: seed of initialisation, order, augmentation and sampling.
        log_every: steps between two log lines.
        logger: where figures and pictures go besides ``metrics.csv``: ``tensorboard`` (in the run's folder), ``wandb``
            (Weights & Biases), ``mlflow`` or ``csv`` (nowhere else).
        validate_every: steps between two validations; ``null`` validates once, at the end.
        checkpoint_every: steps between two checkpoints.
        on_changed_data: what a resumed run does if its data have changed: ``stop``, or ``accept`` them and print what
            differs.
        monitor: metric that chooses the best checkpoint (higher is better); ``null`` takes the task's own.
        optimizer: see `OptimizerConfig`.
        schedule: see `ScheduleConfig`.
    """

    steps: int = 90_000
    batch_size: int = 16
    accumulate: int = 1
    precision: Literal["32-true", "bf16-mixed", "16-mixed"] = "32-true"
    clip_norm: float | None = None
    channels_last: bool = False
    activation_checkpointing: bool = False
    strategy: Literal["ddp", "fsdp"] = "ddp"
    accelerator: str = "auto"
    devices: int | Literal["auto"] = "auto"
    machines: int = 1
    workers: int = 2
    seed: int = 0
    log_every: int = 20
    logger: Literal["tensorboard", "wandb", "mlflow", "csv"] = "tensorboard"
    validate_every: int | None = None
    checkpoint_every: int = 1000
    on_changed_data: Literal["stop", "accept"] = "stop"
    monitor: str | None = None
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)

    def __post_init__(self) -> None:
        many, processes = f"1 to {_MANY:,}", f"1 to {_PROCESSES:,}"
        expect(
            self,
            {
                "steps": (1 <= self.steps <= _MANY, many),
                "batch_size": (1 <= self.batch_size <= _MANY, many),
                "accumulate": (1 <= self.accumulate <= _MANY, many),
                # A maximum norm of zero would stop all learning.
                "clip_norm": (
                    self.clip_norm is None or 0 < self.clip_norm < math.inf,
                    "a number above 0, or null not to clip",
                ),
                "devices": (self.devices == "auto" or 1 <= self.devices <= _PROCESSES, f"{processes}, or auto"),
                "machines": (1 <= self.machines <= _PROCESSES, processes),
                "workers": (0 <= self.workers <= _PROCESSES, f"0 to {_PROCESSES:,}"),
                # The range that torch's generators accept.
                "seed": (0 <= self.seed < 2**63, f"0 to {2**63 - 1}"),
                "log_every": (1 <= self.log_every <= _MANY, many),
                "validate_every": (
                    self.validate_every is None or 1 <= self.validate_every <= _MANY,
                    f"{many}, or null",
                ),
                "checkpoint_every": (1 <= self.checkpoint_every <= _MANY, many),
            },
        )
        if self.strategy == "fsdp" and self.channels_last:
            raise UserError(
                "strategy fsdp cannot keep weights channels-last: set channels_last to false, or strategy to ddp"
            )
        if self.strategy == "fsdp" and self.precision == "16-mixed":
            raise UserError(
                "strategy fsdp does not scale losses, as 16-mixed needs it: take precision bf16-mixed, or strategy ddp"
            )
        if self.schedule.name in ("cosine", "polynomial") and self.schedule.warmup_steps >= self.steps:
            raise UserError(
                f"schedule.warmup_steps: expected fewer than all {self.steps} steps, since the "
                f"{self.schedule.name} schedule follows; got {self.schedule.warmup_steps}; with few steps give both, "
                f"as in --training.steps {self.steps} --training.schedule.warmup_steps {self.steps // 10}"
            )
