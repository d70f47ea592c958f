"""Commands shared by all tasks; each task's ``commands.py`` adds its own part and provides the object ``COMMANDS``."""

from abc import abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

from torch import Tensor, nn

from latentgnn.files.outputs import say_end
from latentgnn.tasks.exporting import Exporting, Format, Program
from latentgnn.tasks.exporting import export as exported
from latentgnn.tasks.looking import Config, LookingCommands, Model
from latentgnn.tasks.saving import shared_record
from latentgnn.training import commands
from latentgnn.training.card import Subject, model_card
from latentgnn.training.checkpoints import read_checkpoint
from latentgnn.training.runs import RunFolder, run_of


class Figures(Protocol):
    """The result of an evaluation."""

    def table(self) -> str: ...

    def to_json(self) -> dict[str, Any]: ...


Data = TypeVar("Data")


@dataclass(frozen=True, kw_only=True)
class Shared:
    """The information about its task that exporting a model needs.

    Args:
        subject: what the model's card describes.
        program: makes the part of the model that can be a program without Python.
        run: returns some outputs of a model for a fixed input.
    """

    subject: Subject
    program: Callable[[], Program]
    run: Callable[[nn.Module], list[Tensor]]


class Commands(LookingCommands[Config, Model], Generic[Config, Data, Model]):
    """The commands of a task; its subclasses provide what differs between tasks.

    Attributes:
        may_change: settings that a resumed run may change: where the same data are now, and how results are shown.
    """

    may_change: Sequence[str]

    # A task's part of training: see `latentgnn.training.commands.Job`.

    @abstractmethod
    def load(self, config: Config, folder: Path, resume: bool) -> Data:
        """Read and check the data sets of a run."""

    @abstractmethod
    def fit(self, config: Config, run: RunFolder, data: Data, resume: bool) -> dict[str, float]:
        """Train in a run's folder and return the figures."""

    @abstractmethod
    def titles(self, names: Iterable[str]) -> dict[str, str]:
        """Choose the figures that are shown first from all figures' names, and return their titles."""

    # A task's part for trained models.

    @abstractmethod
    def shared(self, trained: Model) -> Shared:
        """Return what exporting a model needs; the blocks are added to the title."""

    # Commands that each task implements.

    @abstractmethod
    def evaluate(
        self, config: Config, source: Path | None, *, results: Path | None, out: Path, overwrite: bool = False
    ) -> Figures:
        """Score a trained model or, for tasks that have them, a file of results on the validation set.

        Args:
            config: the model's configuration, with any changes.
            source: a run's folder or a checkpoint.
            results: a file of results to score instead of a model.
            out: output folder, new or empty.
            overwrite: replace the results of an earlier command in ``out``.
        """

    @abstractmethod
    def predict(
        self,
        config: Config,
        source: Path,
        inputs: Sequence[str],
        *,
        out: Path,
        overwrite: bool = False,
        score_threshold: float | None,
        pictures: bool,
    ) -> None:
        """Apply a trained model to files.

        Args:
            config: the model's configuration.
            source: a run's folder or a checkpoint.
            inputs: files, folders and globs.
            out: output folder, new or empty.
            overwrite: replace the results of an earlier command in ``out``.
            score_threshold: omit detections that score less; ``None`` takes the task's own threshold.
            pictures: draw the results.
        """

    @abstractmethod
    def check_data(
        self, config: Config, *, recipe: str, out: Path | None = None, overwrite: bool = False
    ) -> dict[str, Any]:
        """Check the data sets, and print their content and faults.

        Args:
            config: the configuration, which says where the sets are.
            recipe: the recipe that the configuration comes from.
            out: output folder, new or empty, for pictures of samples; ``None`` writes nothing.
            overwrite: replace the results of an earlier command in ``out``.

        Returns:
            The result as plain data, with ``faultless``: true if there are no faults.
        """

    # Commands that are the same for all tasks.

    def train(self, config: Config, out: Path | None, *, name: str, resume: bool = False) -> dict[str, float]:
        """See `latentgnn.training.commands.train`."""
        return commands.train(self._job, config, out, name=name, resume=resume)

    def compare(self, config: Config, out: Path | None, *, name: str, resume: bool = False) -> dict[str, Any]:
        """See `latentgnn.training.commands.compare`."""
        return commands.compare(self._job, config, out, name=name, resume=resume)

    def report(self, run: Path) -> None:
        """See `latentgnn.training.commands.report`."""
        commands.report(self._job, run)

    def export(self, config: Config, source: Path, *, to: Format, out: Path, overwrite: bool = False) -> None:
        """Write a trained model in an exchange format; see `latentgnn.tasks.exporting.export`.

        Args:
            config: the model's configuration.
            source: a run's folder, a checkpoint or a saved model.
            to: the format.
            out: output folder, new or empty.
            overwrite: replace the results of an earlier command in ``out``.
        """
        checkpoint = commands.trained_weights(source)
        trained = self.load_trained(config, checkpoint)
        record = shared_record(config, step=checkpoint.step)
        shared, blocks = self.shared(trained), trained.config.model.blocks
        with_blocks = f" with LatentGNN blocks at {', '.join(blocks)}" if blocks else ""
        subject = replace(shared.subject, title=f"{shared.subject.title}{with_blocks}")
        exporting = Exporting(
            model=trained.model,
            record=record,
            program=shared.program,
            rebuild=lambda file: self.load_trained(config, read_checkpoint(file)).model,
            run=shared.run,
            card=lambda lines, usage: model_card(
                subject, record, run_of(source), titles=self.titles, export=lines, usage=usage
            ),
        )
        exported(exporting, to, out, overwrite=overwrite)
        say_end(out)

    @property
    def _job(self) -> commands.Job[Data]:
        return commands.Job(load=self.load, train=self.fit, titles=self.titles)
