"""The training loop, from the first step or from where a run was stopped, to the last."""

from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

from lightning.fabric import Fabric
from lightning.fabric.loggers.logger import Logger
from torch.utils.data import DataLoader

from latentgnn.configuration.settings import plain_data
from latentgnn.errors import UserError
from latentgnn.training.checkpoints import Checkpoint
from latentgnn.training.config import TrainingConfig
from latentgnn.training.course import batch_told, changed_parts, check_resumable, course_of
from latentgnn.training.devices import launch, make_fabric, quiet
from latentgnn.training.faults import faults_told
from latentgnn.training.large_models import sharding_strategy
from latentgnn.training.lifeline import Lifeline
from latentgnn.training.loading import batches, make_loader
from latentgnn.training.loggers import Pictures, finish, make_loggers
from latentgnn.training.progress import Progress
from latentgnn.training.records import Records, Titles, Written, all_names
from latentgnn.training.resuming import check_data, start_of
from latentgnn.training.runs import RunFolder
from latentgnn.training.sampling import BatchStream, share
from latentgnn.training.steps import OptimizerSteps
from latentgnn.training.stopping import StopSignals, TrainingStopped
from latentgnn.training.task import TrainingTask


def fit(
    task: TrainingTask,
    config: TrainingConfig,
    run: RunFolder,
    *,
    resume: bool = False,
    may_change: Collection[str] = (),
    of_today: Callable[[dict[str, Any]], dict[str, Any]] | None = None,
    write_results: Callable[[], None] = lambda: None,
    pictures: Pictures = lambda: (),
    titles: Titles = all_names,
) -> dict[str, float]:
    """Train a task's model, and return the metrics of the model after the last step.

    Seeds, rates and the order of samples are functions of the step. So a run that was stopped after any step and
    resumed has, on a CPU, the same weights as an uninterrupted one, bit for bit. Only whole steps are saved: Ctrl-C and
    the signals of `latentgnn.training.stopping` end the run after the current step.

    Args:
        task: model, data, losses and scores; the model is trained in place.
        config: steps, batches, optimizer, hardware.
        run: the folder for logs, metrics and checkpoints; its ``config`` is saved in every checkpoint.
        resume: continue from the run's newest intact checkpoint; if there is none, start at the first step. The
            configuration must be the same except for settings without influence on the weights (logging, validation,
            checkpoints, workers, accelerator). The number of steps must be the same too, because most schedules depend
            on it. The data must be the same, unless ``config.on_changed_data`` accepts others.
        may_change: prefixes of dotted names in ``run.config`` that a resumed run may change as well, such as
            ``evaluation`` or ``data.root``.
        of_today: see `latentgnn.training.course.check_resumable`; without it, a run of another version is resumed only
            if that version has the same settings.
        write_results: writes what the task keeps of the last validation, in the process that writes; called before the
            run counts as finished, so that a run that is killed before then validates once more when it is resumed.
        pictures: names and PNG files of the last validation, for loggers that show pictures; each is made when it is
            taken.
        titles: selects and names the figures that are shown after a validation.

    Raises:
        UserError: if the configuration is wrong or differs from that of the run to resume, a sample cannot be loaded,
            there is not enough memory, or another process of the run is gone.
        NonFiniteLoss: if a loss is infinite or NaN.
        TrainingStopped: if the run was asked to stop; its work so far is saved.
    """
    progress = Progress(run, steps=config.steps)
    with quiet():
        checkpoint = start_of(run, resume=resume)
        loggers = make_loggers(config, run, first_step=checkpoint.step if checkpoint else 0)
        sharded = partial(sharding_strategy, task.model, task.units()) if config.strategy == "fsdp" else None
        fabric = make_fabric(config, loggers, several=sharded)
        per_device = _per_device(config, fabric.world_size)
        course = course_of(config, run, processes=fabric.world_size)
        if checkpoint is not None:
            check_resumable(checkpoint, task, run, course, may_change, of_today)
        data = check_data(task, run, checkpoint, accept=config.on_changed_data == "accept")
        record = {"config": plain_data(run.config), "course": course, "data": data}
        if checkpoint is not None:
            finished = run.metrics()
            if finished is not None and checkpoint.step == config.steps:
                progress.say(f"this run is finished: all {config.steps} steps are done")
                metrics: dict[str, float] = finished["metrics"]
                return metrics
            progress.say(f"continuing after step {checkpoint.step} of {config.steps}")
            if (change := changed_parts(checkpoint, course)) is not None:
                progress.say(change)
        for line in batch_told(config, processes=fabric.world_size):
            progress.say(line)
        if fabric.world_size > 1:
            progress.say(f"waiting for all {fabric.world_size} processes")
        disconnect = launch(fabric, config)
        with _connected(fabric, run, progress) as lifeline:
            written = Written(results=write_results, pictures=pictures, titles=titles)
            metrics = _train(fabric, task, config, run, record, checkpoint, progress, per_device, written)
            lifeline.done()
        disconnect()
    return metrics


def _train(
    fabric: Fabric,
    task: TrainingTask,
    config: TrainingConfig,
    run: RunFolder,
    record: dict[str, Any],
    checkpoint: Checkpoint | None,
    progress: Progress,
    per_device: int,
    written: Written,
) -> dict[str, float]:
    """Run the loop."""
    signals = StopSignals()

    def asked_to_stop() -> bool:
        """Whether any process was asked to stop; all of them get the same answer."""
        return fabric.strategy.reduce_boolean_decision(signals.name is not None, all=False)

    validation = _validation_loader(task, config, fabric, per_device)
    steps = OptimizerSteps(fabric, task, config, checkpoint)
    records = Records(
        fabric,
        task,
        config,
        run,
        record,
        steps,
        progress,
        validation=validation,
        stopped=lambda: signals.name is not None,
        written=written,
    )
    try:
        with (
            signals,
            faults_told(lambda: f"in step {steps.done + 1} on {fabric.device}"),
            batches(_training_loader(task, config, fabric, per_device, steps.done)) as stream,
        ):
            progress.start(steps.done)
            stop = False
            # A run that was stopped during a validation has done the step but has no metrics for it.
            if records.validation_is_due():
                records.validate()
                stop = asked_to_stop()
            while steps.done < config.steps and not stop:
                steps.take(stream)
                stop = asked_to_stop()
                step, last = steps.done, steps.done == config.steps
                progress.advance(step)
                if step % config.log_every == 0 or last or stop:
                    records.log()
                # Also before a validation, which may fail: in the user's own code or for lack of memory.
                due = records.validation_is_due()
                if step % config.checkpoint_every == 0 or last or stop or due:
                    records.save("last")
                if due and not stop:
                    records.validate()
                    stop = asked_to_stop()
    except KeyboardInterrupt as error:
        raise TrainingStopped(f"interrupted in step {steps.done + 1}: {_kept(run)}") from error
    if stop:
        by = signals.name or "another process"
        raise TrainingStopped(f"stopped by {by} after step {steps.done} of {config.steps}: {_kept(run)}")
    return records.finish()


@contextmanager
def _connected(fabric: Fabric, run: RunFolder, progress: Progress) -> Iterator[Lifeline]:
    """Wrap the loop, and report its end to the user, the loggers and the other processes."""
    with ExitStack() as stack:
        stack.callback(progress.close)
        for logger in fabric.loggers:
            stack.push(_finisher(logger))
        lifeline = stack.enter_context(Lifeline(fabric, lambda: _kept(run)))
        try:
            with lifeline.told():
                yield lifeline
        except TrainingStopped as error:
            lifeline.done()
            progress.say(str(error))
            raise


def _finisher(logger: Logger) -> Callable[..., None]:
    """Return an exit callback that tells a logger whether the run ended with an error."""
    return lambda kind, error, trace: finish(logger, failed=error is not None)


def _kept(run: RunFolder) -> str:
    path = run.checkpoint("last")
    return f"{path} is kept, resume the run to continue" if path.exists() else "no step was kept"


def _per_device(config: TrainingConfig, processes: int) -> int:
    parts = processes * config.accumulate
    if config.batch_size % parts:
        raise UserError(
            f"training.batch_size {config.batch_size} is no multiple of {parts} = {processes} devices x "
            f"{config.accumulate} accumulated parts: change one of them"
        )
    return config.batch_size // parts


def _training_loader(
    task: TrainingTask, config: TrainingConfig, fabric: Fabric, per_device: int, first_step: int
) -> DataLoader[Any]:
    stream = BatchStream(
        task.training_set,
        per_device=per_device,
        world=fabric.world_size,
        rank=fabric.global_rank,
        seed=config.seed,
        parts=config.accumulate,
        start=first_step,
        stop=config.steps,
    )
    return _loader(task.training_set, task, config, fabric, batch_sampler=stream)


def _validation_loader(task: TrainingTask, config: TrainingConfig, fabric: Fabric, per_device: int) -> DataLoader[Any]:
    indices = share(len(task.validation_set), world=fabric.world_size, rank=fabric.global_rank)
    return _loader(task.validation_set, task, config, fabric, batch_size=per_device, sampler=indices)


def _loader(
    samples: Any, task: TrainingTask, config: TrainingConfig, fabric: Fabric, **options: Any
) -> DataLoader[Any]:
    pinned = fabric.device.type == "cuda"
    return make_loader(samples, task.collate, workers=config.workers, seed=config.seed, pin_memory=pinned, **options)
