"""Commands that look inside a trained model, for any task: ``explain``, ``diagnose``, ``explore``."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import Field
from pathlib import Path
from typing import Any, ClassVar, Generic, NamedTuple, Protocol, TypeVar

from latentgnn.configuration.settings import plain_data
from latentgnn.errors import UserError
from latentgnn.files.outputs import say_end
from latentgnn.inspection import Report
from latentgnn.tasks.explaining import PAGE, Explained, chosen_blocks
from latentgnn.tasks.explaining import diagnose as diagnose_blocks
from latentgnn.tasks.explaining import explain as explain_inputs
from latentgnn.tasks.explore.views import Explorer
from latentgnn.tasks.loading import Trained
from latentgnn.training import commands
from latentgnn.training.checkpoints import Checkpoint
from latentgnn.training.config import TrainingConfig

MOST_EXPLORED = 200
"""Number of validation inputs that the page of ``explore`` offers."""


class RunConfig(Protocol):
    """The part of every task's configuration that is needed here; a dataclass."""

    __dataclass_fields__: ClassVar[dict[str, Field[Any]]]

    @property
    def training(self) -> TrainingConfig: ...


Config = TypeVar("Config", bound=RunConfig)
Model = TypeVar("Model", bound=Trained)


class Inputs(NamedTuple):
    """Inputs to look at.

    Args:
        names: names shown to the user.
        paths: location of each: a file, or the folder of its files.
        read: reads the input at an index.
    """

    names: Sequence[str]
    paths: Sequence[Path]
    read: Callable[[int], Any]


class LookingCommands(ABC, Generic[Config, Model]):
    """The commands that look inside a trained model; a task defines its inputs.

    Attributes:
        kind: name of an input, in the singular.
    """

    kind: str

    # Implemented by each task.

    @abstractmethod
    def load_trained(self, config: Config, checkpoint: Checkpoint) -> Model:
        """Load the model of a checkpoint on the CPU."""

    @abstractmethod
    def expand(self, inputs: Sequence[str]) -> list[Path]:
        """Expand files, folders and globs to files."""

    @abstractmethod
    def read(self, trained: Model, path: Path) -> Any:
        """Read an input from its file."""

    @abstractmethod
    def validation(self, trained: Model, source: Path, most: int, stack: ExitStack) -> Inputs:
        """Return inputs spread over the validation set; data generated for them exist until the stack is closed.

        Raises:
            UserError: if there is no such set, or it has other classes than the model.
        """

    @abstractmethod
    def network_input(self, trained: Model, sample: Any) -> Any:
        """Convert an input to what the model takes."""

    @abstractmethod
    def look(
        self, trained: Model, path: Path, *, blocks: Sequence[str], places: Sequence[tuple[float, float]]
    ) -> Iterator[Explained]:
        """Yield pictures of what each block does on an input."""

    @abstractmethod
    def explorer(self, trained: Model, title: str, inputs: Inputs) -> Explorer:
        """Return the object that answers requests of the ``explore`` page."""

    # The commands.

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
            config: the model's configuration.
            source: a run's folder, a checkpoint or a saved model.
            inputs: files, folders and globs.
            out: output folder, new or empty.
            overwrite: replace the results of an earlier command in ``out``.
            places: positions of the nodes that are shown: column and row of a pixel, or x and y in a scan's
                coordinates.
            block: a block, or a part of its name; ``None`` for all.
            command: the command that is run.
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
        """Report for each block whether it has an effect on the validation set.

        Args:
            config: the model's configuration.
            source: a run's folder, a checkpoint or a saved model.
            samples: number of inputs, spread over the set.
        """
        trained = self.trained(config, source)
        chosen_blocks(trained.model, None, source)
        with ExitStack() as stack:
            found = self.validation(trained, source, samples, stack)
            inputs = (self.network_input(trained, found.read(number)) for number in range(len(found.names)))
            return diagnose_blocks(trained.model, inputs, total=len(found.names))

    def explore(
        self, config: Config, source: Path, inputs: Sequence[str], *, serve: Callable[[Explorer], None]
    ) -> None:
        """Serve a page that shows what each block does.

        Args:
            config: the model's configuration.
            source: a run's folder, a checkpoint or a saved model.
            inputs: files, folders and globs; if empty, inputs of the validation set.
            serve: serves the page until it is stopped.
        """
        trained = self.trained(config, source)
        chosen_blocks(trained.model, None, source)
        paths = self.expand(inputs) if inputs else []
        offered = Inputs([path.name for path in paths], paths, lambda number: self.read(trained, paths[number]))
        with ExitStack() as stack:
            if not inputs:
                try:
                    offered = self.validation(trained, source, MOST_EXPLORED, stack)
                except UserError as error:
                    # For example, the model is from elsewhere. Not an error, because a file can be dropped on the page.
                    named = f"name {self.kind}s after the run, or drop them on the page"
                    print(f"note: no validation set ({error}); {named}")
            serve(self.explorer(trained, source.resolve().name, offered))

    def trained(self, config: Config, source: Path) -> Model:
        """Load the model of a run or checkpoint on its device."""
        trained = self.load_trained(config, commands.trained_weights(source))
        trained.model.to(commands.device_of(config.training.accelerator))
        return trained
