"""Files that a run writes while it is training: figures, checkpoints and validations."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from lightning.fabric import Fabric
from torch.utils.data import DataLoader

from latentgnn.errors import UserError
from latentgnn.training.checkpoints import write_checkpoint
from latentgnn.training.config import TrainingConfig
from latentgnn.training.faults import faults_told
from latentgnn.training.loggers import Pictures, log_pictures
from latentgnn.training.progress import Progress
from latentgnn.training.run_files import best_validation
from latentgnn.training.runs import RunFolder
from latentgnn.training.steps import OptimizerSteps
from latentgnn.training.task import TrainingTask
from latentgnn.training.validation import validate

Titles = Callable[[Iterable[str]], Mapping[str, str]]


def all_names(names: Iterable[str]) -> dict[str, str]:
    """Return every figure under its own name."""
    return {name: name for name in names}


@dataclass(frozen=True, kw_only=True)
class Written:
    """How a task writes and shows a run's results.

    Args:
        results: writes what the task keeps of the last validation.
        pictures: names and PNG files of the last validation; each is made when it is taken.
        titles: selects and names the figures that are shown to the user.
    """

    results: Callable[[], None]
    pictures: Pictures
    titles: Titles


class Records:
    """The records of a run, in its folder and on the terminal.

    Args:
        fabric: a launched Fabric, with the loggers.
        task: predicts and scores.
        config: the run's configuration.
        run: the folder.
        record: what every checkpoint stores of the run: ``config``, ``course`` and ``data``.
        steps: the model, and the number of steps done.
        progress: shows the progress.
        validation: this process's share of the validation set.
        stopped: whether this process was asked to stop.
        written: how the task writes and shows results.
    """

    def __init__(
        self,
        fabric: Fabric,
        task: TrainingTask,
        config: TrainingConfig,
        run: RunFolder,
        record: dict[str, Any],
        steps: OptimizerSteps,
        progress: Progress,
        *,
        validation: DataLoader[Any],
        stopped: Callable[[], bool],
        written: Written,
    ) -> None:
        self._fabric, self._task, self._config, self._run, self._record = fabric, task, config, run, record
        self._steps, self._progress, self._validation, self._stopped = steps, progress, validation, stopped
        self._written = written
        self._monitor = config.monitor or task.monitor
        # Not the last one: a run that has it but is not finished has lost the results that the task derives from it.
        known = min(steps.done, config.steps - 1)
        self._validations = [record for record in run.validations() if record["step"] <= known]
        self._first_step = steps.done
        self._logged = (steps.done, 0.0)

    def log(self) -> None:
        """Write the figures since the last call."""
        step, seconds = self._steps.done, self._steps.seconds
        samples = (step - self._logged[0]) * self._config.batch_size
        metrics = {
            **self._steps.take_losses(),
            "rate": self._steps.rate,
            "samples_per_second": samples / (seconds - self._logged[1]),
            **self._steps.gammas(),
        }
        self._logged = (step, seconds)
        self._fabric.log_dict(metrics, step=step)
        left = seconds / (step - self._first_step) * (self._config.steps - step)
        self._progress.figures(step, metrics, seconds_left=left)

    def save(self, name: Literal["last", "best"]) -> None:
        """Write a checkpoint.

        Raises:
            UserError: if weights are infinite or NaN; the previous checkpoint is kept.
        """
        state = self._steps.state()
        if self._fabric.is_global_zero:
            record = {"step": self._steps.done, **self._record}
            write_checkpoint(self._run.checkpoint(name), {"latentgnn": record, **state})

    def validation_is_due(self) -> bool:
        """Whether the model should be validated in its current state and has not been yet."""
        step, interval = self._steps.done, self._config.validate_every
        if not step or not len(self._task.validation_set):
            return False
        if any(record["step"] == step for record in self._validations):
            return False
        return step == self._config.steps or (interval is not None and step % interval == 0)

    def validate(self) -> None:
        """Validate, and save the model if it is the best so far; aborts if the run is asked to stop.

        Raises:
            UserError: if the monitored metric is not one of the task's, or there is not enough memory.
        """
        step, alone = self._steps.done, self._fabric.world_size == 1
        with faults_told(lambda: f"in the validation after step {step} on {self._fabric.device}"):
            metrics = validate(
                self._fabric,
                self._task,
                self._validation,
                after_batch=lambda batch: self._progress.validating(batch, len(self._validation)),
                # Several processes have unequal shares, and could not agree to stop in the middle.
                stopped=lambda: alone and self._stopped(),
            )
        if metrics is None:
            return
        if self._monitor not in metrics:
            raise UserError(
                f"monitor: the task has no metric {self._monitor!r}; it has {', '.join(metrics)}. "
                "Resume with another `monitor`"
            )
        best = best_validation(self._validations)
        is_best = best is None or _order(metrics, self._monitor) > _order(best["metrics"], self._monitor)
        if is_best:
            self.save("best")
        self._validations.append({"step": step, "best": is_best, "metrics": metrics})
        # Recorded last: a run that is killed before this validates again.
        self._fabric.log_dict(metrics, step=step)
        self._run.write_validations(self._validations)
        if self._run.writes:
            log_pictures(self._fabric.loggers, self._written.pictures(), step=step)
        titles = self._written.titles(metrics)
        shown = ", ".join(f"{title} {metrics[name]:.4f}" for name, title in titles.items())
        self._progress.say(f"step {step}/{self._config.steps}  validation: {shown}{'  (best)' if is_best else ''}")

    def finish(self) -> dict[str, float]:
        """Write the task's results and then the final metrics, which mark the run as finished; return the metrics."""
        if self._run.writes:
            self._written.results()
        metrics: dict[str, float] = self._validations[-1]["metrics"] if self._validations else {}
        best = best_validation(self._validations)
        self._run.write_metrics(
            {
                "step": self._steps.done,
                "metrics": metrics,
                "best": {"step": best["step"], "monitor": self._monitor, "metrics": best["metrics"]} if best else None,
            }
        )
        return metrics


def _order(metrics: Mapping[str, float], monitor: str) -> float:
    """A metric as a sort key: one that is missing or NaN is below all others."""
    value = metrics.get(monitor, float("-inf"))
    return value if value == value else float("-inf")
