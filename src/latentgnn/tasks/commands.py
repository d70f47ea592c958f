"""What the commands do for any task; each task's ``commands.py`` says what is its own, and gives it as ``COMMANDS``."""

import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import Field, dataclass
from pathlib import Path
from typing import Any, ClassVar, Generic, NamedTuple, Protocol, TypeVar

from rich.progress import track
from torch import Tensor, nn

from latentgnn.configuration.settings import plain_data
from latentgnn.errors import UserError
from latentgnn.inspection import Report
from latentgnn.outputs import say_end
from latentgnn.tasks.explaining import PAGE, Explained, chosen_blocks
from latentgnn.tasks.explaining import diagnose as diagnose_blocks
from latentgnn.tasks.explaining import explain as explain_inputs
from latentgnn.tasks.explore.views import Explorer
from latentgnn.tasks.exporting import Exporting, Format, Program
from latentgnn.tasks.exporting import export as exported
from latentgnn.tasks.loading import Trained
from latentgnn.tasks.saving import shared_record
from latentgnn.tasks.weights import Start
from latentgnn.training import commands
from latentgnn.training.card import Subject, model_card
from latentgnn.training.checkpoints import Checkpoint, read_checkpoint
from latentgnn.training.config import TrainingConfig
from latentgnn.training.runs import RunFolder, run_of

MOST_EXPLORED = 200
"""Inputs of a validation set that the page of ``explore`` offers."""


class RunConfig(Protocol):
    """What is asked of the configuration of any task, a dataclass."""

    __dataclass_fields__: ClassVar[dict[str, Field[Any]]]

    @property
    def training(self) -> TrainingConfig: ...


class Figures(Protocol):
    """What an evaluation gives."""

    def table(self) -> str: ...

    def to_json(self) -> dict[str, Any]: ...


Config = TypeVar("Config", bound=RunConfig)
Data = TypeVar("Data")
Model = TypeVar("Model", bound=Trained)
Found = TypeVar("Found")


class Inputs(NamedTuple):
    """Inputs that are looked at: their names, and what reads one by its number."""

    names: Sequence[str]
    read: Callable[[int], Any]


@dataclass(frozen=True, kw_only=True)
class Shared:
    """What the export of a model needs to know of its task.

    Args:
        subject: for the model's card.
        program: makes what can be a program without Python.
        run: some outputs of a model for an input that is always the same.
    """

    subject: Subject
    program: Callable[[], Program]
    run: Callable[[nn.Module], list[Tensor]]


class Commands(ABC, Generic[Config, Data, Model]):
    """The commands of a task: those that are here take from it what differs.

    Attributes:
        kind: what an input is called, in the singular.
        places: settings that say where something lies on this machine; a model that is exported has them not.
        may_change: settings that a resumed run may change: where the same data lie now, and how results are shown.
    """

    kind: str
    places: Sequence[str]
    may_change: Sequence[str]

    # What a task says of training: see `latentgnn.training.commands.Job`.

    @abstractmethod
    def load(self, config: Config, folder: Path, resume: bool) -> Data:
        """The sets of a run, read and checked."""

    @abstractmethod
    def fit(self, config: Config, run: RunFolder, data: Data, resume: bool) -> dict[str, float]:
        """Train in a run's folder; the figures."""

    @abstractmethod
    def titles(self, names: Iterable[str]) -> dict[str, str]:
        """The figures that are shown first, among all figures' names, and what they are called."""

    # What it says of its trained models, and of what they are looked at on.

    @abstractmethod
    def load_trained(self, config: Config, checkpoint: Checkpoint) -> Model:
        """The model of a checkpoint, on the CPU."""

    @abstractmethod
    def shared(self, trained: Model) -> Shared:
        """What the export of a model needs to know."""

    @abstractmethod
    def expand(self, inputs: Sequence[str]) -> list[Path]:
        """The files that files, folders and globs name."""

    @abstractmethod
    def read(self, trained: Model, path: Path) -> Any:
        """An input from its file."""

    @abstractmethod
    def validation(self, trained: Model, source: Path, most: int, stack: ExitStack) -> Inputs:
        """Inputs spread over the validation set; what is made for them is there as long as the stack.

        Raises:
            UserError: there is no such set, or it is of other classes than the model's.
        """

    @abstractmethod
    def network_input(self, trained: Model, sample: Any) -> Any:
        """What the model takes of an input."""

    @abstractmethod
    def look(
        self, trained: Model, path: Path, *, blocks: Sequence[str], places: Sequence[tuple[float, float]]
    ) -> Iterator[Explained]:
        """Pictures of what each block does on an input."""

    @abstractmethod
    def explorer(self, trained: Model, title: str, inputs: Inputs) -> Explorer:
        """What answers the page of ``explore``."""

    # Commands that are each task's own.

    @abstractmethod
    def evaluate(
        self, config: Config, source: Path | None, *, results: Path | None, out: Path, overwrite: bool = False
    ) -> Figures:
        """Score a trained model on the validation set, or, where a task has such, a file of results.

        Args:
            config: the model's, with what is to be different.
            source: a run's folder or a checkpoint.
            results: a file of results to score instead of a model's.
            out: folder, new or empty.
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
            config: the model's.
            source: a run's folder or a checkpoint.
            inputs: files, folders and globs.
            out: folder, new or empty.
            overwrite: replace the results of an earlier command in ``out``.
            score_threshold: detections below it are left out; ``None`` takes the task's own.
            pictures: draw the results.
        """

    @abstractmethod
    def check_data(
        self, config: Config, *, recipe: str, out: Path | None = None, overwrite: bool = False
    ) -> dict[str, Any]:
        """Check the sets, and print what they hold and what is wrong.

        Args:
            config: says where they are.
            recipe: that it comes from.
            out: folder, new or empty, for pictures of samples; ``None`` writes nothing.
            overwrite: replace the results of an earlier command in ``out``.

        Returns:
            As plain data, with ``faultless``: whether nothing is wrong.
        """

    # Commands that are the same for all.

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
        """Write a trained model in a format that others read; see `latentgnn.tasks.exporting.export`.

        Args:
            config: the model's.
            source: a run's folder, a checkpoint or a saved model.
            to: the format.
            out: folder, new or empty.
            overwrite: replace the results of an earlier command in ``out``.
        """
        checkpoint = commands.trained_weights(source)
        trained = self.load_trained(config, checkpoint)
        record = shared_record(config, self.places, step=checkpoint.step)
        shared = self.shared(trained)
        exporting = Exporting(
            model=trained.model,
            record=record,
            program=shared.program,
            rebuild=lambda file: self.load_trained(config, read_checkpoint(file)).model,
            run=shared.run,
            card=lambda lines, usage: model_card(
                shared.subject, record, run_of(source), titles=self.titles, export=lines, usage=usage
            ),
        )
        exported(exporting, to, out, overwrite=overwrite)
        say_end(out)

    def explain(
        self,
        config: Config,
        source: Path,
        inputs: Sequence[str],
        *,
        out: Path,
        overwrite: bool,
        places: Sequence[tuple[float, float]],
        block: str | None,
        command: str,
    ) -> None:
        """Show what each block does on inputs; see `latentgnn.tasks.explaining.explain`.

        Args:
            config: the model's.
            source: a run's folder, a checkpoint or a saved model.
            inputs: files, folders and globs.
            out: folder, new or empty.
            overwrite: replace the results of an earlier command in ``out``.
            places: of nodes that are shown: column and row of a pixel, or x and y in a scan's coordinates.
            block: a block, or a part of its name; ``None`` for all.
            command: that is run.
        """
        paths = self.expand(inputs)
        trained = self.trained(config, source)
        blocks = chosen_blocks(trained.model, block, source)
        explain_inputs(
            paths,
            lambda path: self.look(trained, path, blocks=blocks, places=places),
            kind=self.kind,
            out=out,
            overwrite=overwrite,
            source=source,
            config=plain_data(config),
            command=command,
        )
        say_end(out / PAGE)

    def diagnose(self, config: Config, source: Path, *, samples: int) -> Report:
        """Say of each block whether it does something on the validation set.

        Args:
            config: the model's.
            source: a run's folder, a checkpoint or a saved model.
            samples: so many inputs, spread over the set.
        """
        trained = self.trained(config, source)
        chosen_blocks(trained.model, None, source)
        with ExitStack() as stack:
            names, read = self.validation(trained, source, samples, stack)
            inputs = (self.network_input(trained, read(number)) for number in range(len(names)))
            return diagnose_blocks(trained.model, inputs, total=len(names))

    def explore(
        self, config: Config, source: Path, inputs: Sequence[str], *, serve: Callable[[Explorer], None]
    ) -> None:
        """Let a page show what each block does.

        Args:
            config: the model's.
            source: a run's folder, a checkpoint or a saved model.
            inputs: files, folders and globs; none takes inputs of the validation set.
            serve: answers the page until it is ended.
        """
        trained = self.trained(config, source)
        chosen_blocks(trained.model, None, source)
        paths = self.expand(inputs) if inputs else []
        offered = Inputs([path.name for path in paths], lambda number: self.read(trained, paths[number]))
        with ExitStack() as stack:
            if not inputs:
                try:
                    offered = self.validation(trained, source, MOST_EXPLORED, stack)
                except UserError as error:
                    # As of a model from elsewhere: no fault, for a file can be dropped.
                    named = f"name {self.kind}s after the run, or drop them on the page"
                    print(f"note: no validation set ({error}); {named}")
            serve(self.explorer(trained, source.resolve().name, offered))

    # What they have in common.

    def trained(self, config: Config, source: Path) -> Model:
        """The model of a run or checkpoint, on its device."""
        trained = self.load_trained(config, commands.trained_weights(source))
        trained.model.to(commands.device_of(config.training.accelerator))
        return trained

    @property
    def _job(self) -> commands.Job[Data]:
        return commands.Job(load=self.load, train=self.fit, titles=self.titles)


def begun_trained(run: RunFolder, start: Callable[[], Start], *, goes_on: bool) -> frozenset[str]:
    """Let a model start from other weights; the names of the parameters that began trained.

    Args:
        run: whose folder says what it started from.
        start: loads the weights.
        goes_on: it is resumed, with weights of its own.
    """
    if goes_on and (kept := run.trained_at_start()) is not None:
        return kept
    started = start()
    if run.writes:
        print("\n".join(started.lines))
    run.write_start(started.lines, started.trained)
    return started.trained


def evaluated(results: Iterable[Found], total: int) -> Iterable[Found]:
    """What an evaluation finds, with a bar in a terminal."""
    return track(results, "evaluate", total=total, transient=True, disable=not sys.stdout.isatty())


def with_blocks(title: str, blocks: Sequence[str] | dict[Any, Any]) -> str:
    """The title of a model's card, with the blocks that the model has."""
    return f"{title} with LatentGNN blocks at {', '.join(blocks)}" if blocks else title
