"""Training from the first step, or from where it was stopped, to the last."""

import gc
import logging
import time
import warnings
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from torch.utils.data import DataLoader

from latentgnn.configuration.settings import plain_data
from latentgnn.errors import UserError
from latentgnn.training.checkpoints import AtomicCheckpointIO, Checkpoint, check_finite, check_weights
from latentgnn.training.config import TrainingConfig
from latentgnn.training.module import TrainingModule
from latentgnn.training.progress import CsvLog, Progress
from latentgnn.training.resuming import check_data, start_of
from latentgnn.training.runs import RunFolder
from latentgnn.training.sampling import BatchStream, share
from latentgnn.training.stopping import StopSignals, TrainingStopped, ignore_stop_signals
from latentgnn.training.task import TrainingTask
from latentgnn.training.validation import validate

# What a resumed run may change of `TrainingConfig`, because no weight depends on it. ``devices`` and ``machines`` are
# compared as the number of processes.
_FREE = {
    "accelerator",
    "checkpoint_every",
    "devices",
    "log_every",
    "machines",
    "monitor",
    "on_changed_data",
    "validate_every",
    "workers",
}

# Warnings of other packages that do not help a user of this loop, each with the reason.
_WARNINGS = (
    # The number of workers is the user's setting, and more is not always better.
    r"The '\w+' does not have many workers",
    # Choosing the CPU on a machine with a GPU is the user's setting.
    r"GPU available but not used",
    # A model may keep parts in evaluation mode on purpose, such as frozen norms.
    r"Found \d+ module\(s\) in eval mode at the start of training",
    # Whether a parameter takes part depends on the batch; most batches use all.
    r"find_unused_parameters=True was specified in DDP constructor, but did not find any unused parameters",
    # Lightning 2.6 makes a node of torch's trees in a way that torch 2.15 deprecates.
    r"`isinstance\(treespec, LeafSpec\)` is deprecated",
)


def fit(
    task: TrainingTask,
    config: TrainingConfig,
    run: RunFolder,
    *,
    resume: bool = False,
    may_change: Collection[str] = (),
) -> dict[str, float]:
    """Train a task's model, and return the metrics of the model after the last step.

    All steps are one Lightning epoch. Seeds, rates and the order of samples are functions of the step, so a run that
    was stopped after any step and resumed has, on a CPU, the weights of an uninterrupted one bit for bit. Only whole
    steps are kept: Ctrl-C or SIGTERM ends the run after the current one.

    Args:
        task: model, data, losses and scores; the model is trained in place.
        config: steps, batches, optimizer, hardware.
        run: where logs, metrics and checkpoints go; its ``config`` is kept in every checkpoint.
        resume: continue after the run's newest checkpoint that is sound; without any, begin at the first step. The
            configuration must be the same but for what has no influence on the weights (logging, validation,
            checkpoints, workers, accelerator). The number of steps must be the same too, because most schedules depend
            on it. The data must be the same, or ``config.on_changed_data`` say that others are accepted.
        may_change: dotted beginnings of names in ``run.config`` that a resumed run may change also, such as
            ``evaluation`` or ``data.root``.

    Raises:
        UserError: the configuration is wrong, or another than that of the run to resume.
        NonFiniteLoss: a loss is infinite or not a number.
        TrainingStopped: the run was asked to stop; what it had done is kept.
    """
    _check(config)
    # Lightning logs each of its stages, and advertisements; this loop has its own messages.
    with _quiet(), StopSignals() as signals:
        start = start_of(run, resume=resume)
        first_step = start.step if start else 0
        trainer = _trainer(config, run, first_step=first_step)
        per_device = _per_device(config, trainer.world_size)
        course = _course(config, run, processes=trainer.world_size)
        if start:
            _check_resumable(task, run, start, course, may_change)
        data = check_data(task, run, start, accept=config.on_changed_data == "accept")
        progress = Progress(run, steps=config.steps)
        finished = run.metrics()
        if finished is not None and first_step == config.steps:
            progress.say(f"this run is finished: all {config.steps} steps are done")
            metrics: dict[str, float] = finished["metrics"]
            return metrics
        if first_step:
            progress.say(f"continuing after step {first_step} of {config.steps}")

        record = {"config": plain_data(run.config), "course": course, "data": data}
        module = TrainingModule(task, config, first_step=first_step, record=record)
        module.train()
        steps = _Steps(
            config,
            run,
            signals,
            progress,
            _validation_loader(task, config, trainer, per_device),
            monitor=config.monitor or task.monitor,
            first_step=first_step,
        )
        trainer.callbacks.append(steps)  # type: ignore[attr-defined]
        try:
            trainer.fit(
                module,
                _training_loader(task, config, trainer, per_device, first_step),
                ckpt_path=start.path if start else None,
                weights_only=True,
            )
        except (KeyboardInterrupt, SystemExit) as error:
            # Lightning turns a KeyboardInterrupt into a SystemExit.
            raise TrainingStopped(f"interrupted in step {module.step + 1}: {_kept(run)}") from error
        finally:
            progress.close()
        if steps.stopped_by is not None:
            message = f"stopped by {steps.stopped_by} after step {module.step} of {config.steps}: {_kept(run)}"
            progress.say(message)
            raise TrainingStopped(message)
        return steps.finish(module.step)


class _Steps(Callback):
    """What happens after each optimizer step: figures, checkpoints, validation, and the stop."""

    def __init__(
        self,
        config: TrainingConfig,
        run: RunFolder,
        signals: StopSignals,
        progress: Progress,
        validation: DataLoader[Any],
        *,
        monitor: str,
        first_step: int,
    ) -> None:
        self.config = config
        self.run = run
        self.signals = signals
        self.progress = progress
        self.validation = validation
        self.monitor = monitor
        self.first_step = first_step
        self.stopped_by: str | None = None
        self.validations = [record for record in run.validations() if record["step"] <= first_step]
        # Training time alone, without validation and checkpoints.
        self._seconds = 0.0
        self._seconds_logged = 0.0
        self._step_logged = first_step
        self._since = 0.0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        module = _ours(pl_module)
        self.signals.install()
        self.progress.start(module.step)
        # A run stopped in the middle of a validation has the step but not its metrics.
        if module.step and self._validation_is_due(module.step):
            self._validate(trainer, module)
        if module.step == self.config.steps or self.stopped_by:
            trainer.should_stop = True
        self._since = time.perf_counter()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if (batch_idx + 1) % self.config.accumulate:
            return
        module = _ours(pl_module)
        rate = module.rate
        module.step += 1
        step = module.step
        self._seconds += time.perf_counter() - self._since
        last = step == self.config.steps
        stop = trainer.strategy.reduce_boolean_decision(self.signals.name is not None, all=False)

        self.progress.advance(step)
        if step % self.config.log_every == 0 or last or stop:
            self._log(trainer, module, rate)
        due = self._validation_is_due(step)
        # Before a validation too: it may fail, in the user's own code or for lack of memory.
        if step % self.config.checkpoint_every == 0 or last or stop or due:
            self._save(trainer, module, "last")
        if stop:
            self.stopped_by = self.signals.name or "another process"
        elif due:
            self._validate(trainer, module)
        if self.stopped_by:
            trainer.should_stop = True
        self._since = time.perf_counter()

    def finish(self, step: int) -> dict[str, float]:
        """Write and return the metrics of the end."""
        metrics: dict[str, float] = self.validations[-1]["metrics"] if self.validations else {}
        best = self._best()
        self.run.write_metrics(
            {
                "step": step,
                "metrics": metrics,
                "best": {"step": best["step"], "monitor": self.monitor, "metrics": best["metrics"]} if best else None,
            }
        )
        return metrics

    def _validation_is_due(self, step: int) -> bool:
        if not len(self.validation.dataset):  # type: ignore[arg-type]
            return False
        if any(record["step"] == step for record in self.validations):
            return False
        interval = self.config.validate_every
        return step == self.config.steps or (interval is not None and step % interval == 0)

    def _validate(self, trainer: Trainer, module: TrainingModule) -> None:
        alone = trainer.world_size == 1
        batches = len(self.validation)
        metrics = validate(
            trainer,
            module,
            self.validation,
            after_batch=lambda batch: self.progress.validating(batch, batches),
            # Several processes have unequal shares, and could not agree in the middle of them.
            stopped=lambda: alone and self.signals.name is not None,
        )
        if metrics is None:
            self.stopped_by = self.signals.name
            return
        if self.monitor not in metrics:
            raise UserError(
                f"the metric to choose the best checkpoint by, {self.monitor!r}, is none of the task's: "
                f"{', '.join(metrics)}. The run can be resumed with another `monitor`"
            )
        best = self._best()
        is_best = best is None or _order(metrics, self.monitor) > _order(best["metrics"], self.monitor)
        if is_best:
            self._save(trainer, module, "best")
        self.validations.append({"step": module.step, "best": is_best, "metrics": metrics})
        self.run.write_validations(self.validations)
        for logger in trainer.loggers:
            logger.log_metrics(metrics, step=module.step)
        shown = ", ".join(f"{name} {value:.4f}" for name, value in metrics.items())
        self.progress.say(f"step {module.step}/{self.config.steps}  validation: {shown}{'  (best)' if is_best else ''}")
        if trainer.strategy.reduce_boolean_decision(self.signals.name is not None, all=False):
            self.stopped_by = self.signals.name or "another process"

    def _best(self) -> dict[str, Any] | None:
        """The validation whose model the best checkpoint holds."""
        return next((record for record in reversed(self.validations) if record["best"]), None)

    def _save(self, trainer: Trainer, module: TrainingModule, name: Any) -> None:
        # In every process, not only in the one that writes: all end together.
        check_finite({"latentgnn": {"step": module.step}, "state_dict": module.model.state_dict()})
        trainer.save_checkpoint(self.run.checkpoint(name), weights_only=False)

    def _log(self, trainer: Trainer, module: TrainingModule, rate: float) -> None:
        seconds = self._seconds - self._seconds_logged
        samples = (module.step - self._step_logged) * self.config.batch_size
        self._seconds_logged, self._step_logged = self._seconds, module.step
        metrics = {
            **module.take_losses(),
            "rate": rate,
            "samples_per_second": samples / seconds,
            **module.gammas(),
        }
        for logger in trainer.loggers:
            logger.log_metrics(metrics, step=module.step)
        left = self._seconds / (module.step - self.first_step) * (self.config.steps - module.step)
        self.progress.figures(module.step, metrics, seconds_left=left)


def _ours(module: LightningModule) -> TrainingModule:
    assert isinstance(module, TrainingModule)
    return module


def _order(metrics: Mapping[str, float], monitor: str) -> float:
    """A metric that can be compared: one that is missing or not a number is below all others."""
    value = metrics.get(monitor, float("-inf"))
    return value if value == value else float("-inf")


def _kept(run: RunFolder) -> str:
    path = run.checkpoint("last")
    return f"{path} is kept, resume the run to continue" if path.exists() else "no step was kept"


def _check(config: TrainingConfig) -> None:
    """Refuse counts that make no sense."""
    least = {
        "steps": 1,
        "batch_size": 1,
        "accumulate": 1,
        "machines": 1,
        "workers": 0,
        "seed": 0,
        "log_every": 1,
        "checkpoint_every": 1,
    }
    if config.validate_every is not None:
        least["validate_every"] = 1
    if config.devices != "auto":
        least["devices"] = 1
    for name, bound in least.items():
        if (value := getattr(config, name)) < bound:
            raise UserError(f"training.{name} is {value}, expected {bound} or more")
    if list(config.schedule.milestones) != sorted(config.schedule.milestones):
        raise UserError(f"training.schedule.milestones must ascend, got {list(config.schedule.milestones)}")
    if config.schedule.name == "cosine" and config.schedule.warmup_steps >= config.steps:
        raise UserError(
            f"training.schedule.warmup_steps is {config.schedule.warmup_steps}, "
            f"which leaves nothing of {config.steps} steps for the cosine"
        )


def _per_device(config: TrainingConfig, processes: int) -> int:
    parts = processes * config.accumulate
    if config.batch_size % parts:
        raise UserError(
            f"training.batch_size {config.batch_size} is no multiple of {parts} = {processes} devices x "
            f"{config.accumulate} accumulated parts: change one of them"
        )
    return config.batch_size // parts


def _course(config: TrainingConfig, run: RunFolder, *, processes: int) -> dict[str, Any]:
    """All settings, and what else the weights depend on, under dotted names."""
    settings = {**plain_data(run.config), "training": plain_data(config)}
    return {**dict(_flat(settings)), "processes": processes}


def _flat(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in tree.items():
        if isinstance(value, dict) and value:
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def _check_resumable(
    task: TrainingTask, run: RunFolder, checkpoint: Checkpoint, course: dict[str, Any], may_change: Collection[str]
) -> None:
    free = (*may_change, *(f"training.{name}" for name in _FREE))
    absent = "(absent)"
    differences = [
        f"{name} was {checkpoint.course.get(name, absent)!r}, is {course.get(name, absent)!r}"
        for name in dict.fromkeys((*course, *checkpoint.course))
        if checkpoint.course.get(name, absent) != course.get(name, absent)
        and not any(name == start or name.startswith(f"{start}.") for start in free)
    ]
    if differences:
        raise UserError(
            f"the run in {run.path} cannot be resumed with another course: {'; '.join(differences)}. "
            "Resume it as it was, or start a new run"
        )
    check_weights(checkpoint.weights, task.model, str(checkpoint.path))


def _trainer(config: TrainingConfig, run: RunFolder, *, first_step: int) -> Trainer:
    def build(strategy: str) -> Trainer:
        plugins: list[Any] = [AtomicCheckpointIO()]
        if SLURMEnvironment.detect():
            # Lightning's own requeueing would save in the middle of a step, to another place.
            plugins.append(SLURMEnvironment(auto_requeue=False))
        return Trainer(
            accelerator=config.accelerator,
            devices=config.devices,
            num_nodes=config.machines,
            strategy=strategy,
            precision=config.precision,
            max_epochs=1,
            accumulate_grad_batches=config.accumulate,
            gradient_clip_val=config.clip_norm,
            default_root_dir=run.path,
            logger=[
                CsvLog(run, first_step=first_step),
                # A resumed run repeats the steps after its first one: their old points are dropped.
                TensorBoardLogger(
                    run.path, name="", version="tensorboard", purge_step=first_step + 1 if first_step else None
                ),
            ],
            log_every_n_steps=1,
            limit_val_batches=0,
            num_sanity_val_steps=0,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            use_distributed_sampler=False,
            plugins=plugins,
        )

    try:
        trainer = build("auto")
        if trainer.world_size > 1:
            # Some heads of a model may get no input in one process's batch and some in another's.
            trainer = build("ddp_find_unused_parameters_true")
    except (MisconfigurationException, ValueError) as error:
        raise UserError(
            f"accelerator {config.accelerator!r}, devices {config.devices!r}, machines {config.machines} and precision "
            f"{config.precision!r} do not fit this machine: {error}"
        ) from error
    return trainer


def _loader_options(task: TrainingTask, config: TrainingConfig, trainer: Trainer) -> dict[str, Any]:
    return {
        "collate_fn": task.collate,
        "num_workers": config.workers,
        "worker_init_fn": _start_worker,
        # Its own generator: a loader without one draws its workers' seeds from the global generator.
        "generator": torch.Generator().manual_seed(config.seed),
        "pin_memory": trainer.strategy.root_device.type == "cuda",
    }


def _start_worker(worker: int) -> None:
    ignore_stop_signals(worker)
    # A garbage collection writes to every object that it looks at, which would copy into each loading process the
    # memory that it shares with the process it was forked from: gigabytes with COCO's annotations.
    gc.freeze()


def _training_loader(
    task: TrainingTask, config: TrainingConfig, trainer: Trainer, per_device: int, first_step: int
) -> DataLoader[Any]:
    stream = BatchStream(
        task.training_set,
        per_device=per_device,
        world=trainer.world_size,
        rank=trainer.global_rank,
        seed=config.seed,
        start=first_step * config.accumulate,
        # With no step left, one batch keeps Lightning from skipping the run, and so a validation that is still due.
        stop=max(config.steps, first_step + 1) * config.accumulate,
    )
    return DataLoader(task.training_set, batch_sampler=stream, **_loader_options(task, config, trainer))  # type: ignore[arg-type]


def _validation_loader(
    task: TrainingTask, config: TrainingConfig, trainer: Trainer, per_device: int
) -> DataLoader[Any]:
    indices = share(len(task.validation_set), world=trainer.world_size, rank=trainer.global_rank)
    return DataLoader(
        task.validation_set,  # type: ignore[arg-type]
        batch_size=per_device,
        sampler=indices,
        **_loader_options(task, config, trainer),
    )


@contextmanager
def _quiet() -> Iterator[None]:
    loggers = [logging.getLogger(name) for name in ("lightning.pytorch", "lightning.fabric")]
    levels = [logger.level for logger in loggers]
    with warnings.catch_warnings():
        for message in _WARNINGS:
            warnings.filterwarnings("ignore", message=message)
        for logger in loggers:
            logger.setLevel(logging.WARNING)
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)
