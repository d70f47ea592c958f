"""Commands of tasks that assign classes: to the points of a scan or to the pixels of an image."""

from abc import abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from latentgnn.errors import UserError
from latentgnn.files.outputs import Results, quoted, say_end
from latentgnn.progress import counted
from latentgnn.tasks.checks import Report, Split, check_splits
from latentgnn.tasks.class_results import say_class_results, write_class_results
from latentgnn.tasks.class_scores import Predicted, Result, Scores
from latentgnn.tasks.commands import Commands
from latentgnn.tasks.explaining import spread
from latentgnn.tasks.inputs import result_names
from latentgnn.tasks.looking import Config, Model
from latentgnn.training import commands
from latentgnn.training.processes import Processes, sharing
from latentgnn.training.runs import RunFolder, is_first_process
from latentgnn.training.task import TrainingTask


class ClassSource(Protocol):
    """The location of a sample."""

    @property
    def name(self) -> str: ...


class ClassSet(Protocol):
    """A set of samples with classes."""

    config: Any
    skipped: str
    class_names: tuple[str, ...]

    @property
    def sources(self) -> Sequence[ClassSource]: ...

    @property
    def files(self) -> list[Path]:
        """Return the files that are read repeatedly."""

    def __len__(self) -> int: ...


class ClassTask(TrainingTask, Protocol):
    """A training task that keeps the predictions of its last validation, by sample number."""

    scores: Scores | None
    predicted: dict[int, NDArray[np.int64]]
    confusions: dict[int, NDArray[np.int64]]


Set = TypeVar("Set", bound=ClassSet)


class ClassCommands(Commands[Config, tuple[Set, Set], Model]):
    """Commands of a task that assigns classes.

    Attributes:
        title: name of the task, as used in a sentence.
        unit: what gets a class, in the plural.
        each: all of these units, such as ``every point of a scan``.
        most_titles: maximum number of figures that are all shown first; if there are more, only the means are.
    """

    title: str
    unit: str
    each: str
    most_titles: int

    # Implemented by each task.

    @abstractmethod
    def load_split(self, config: Config, split: Split) -> Set:
        """Load a split without its faulty samples."""

    @abstractmethod
    def check_split(self, config: Config, split: Split) -> Report:
        """Check a split: its faults and its content."""

    @abstractmethod
    def content(self, found: Set, split: Split) -> str:
        """Describe a split and its content in one line."""

    @abstractmethod
    def refuse_others(self, trained: Model, found: Set) -> None:
        """Raise an error if a set has other classes than a model."""

    @abstractmethod
    def task(self, config: Config, run: RunFolder, train: Set, val: Set, *, goes_on: bool) -> ClassTask:
        """Return the training task of a run."""

    @abstractmethod
    def score(self, trained: Model, found: Set, index: int, *, keep: bool) -> Result:
        """Predict a sample and compare with its labels; ``keep`` keeps the prediction."""

    @abstractmethod
    def picture(self, found: Set, index: int, classes: NDArray[np.int64]) -> bytes:
        """Draw a sample, with labels and prediction side by side."""

    @abstractmethod
    def predict_files(
        self, trained: Model, paths: Sequence[Path], processes: Processes, *, out: Path, overwrite: bool, pictures: bool
    ) -> None:
        """Predict files, and write the results."""

    # Common to all tasks.

    def load(self, config: Config, folder: Path, resume: bool) -> tuple[Set, Set]:
        return self._load_split(config, "train"), self._load_split(config, "val")

    def fit(self, config: Config, run: RunFolder, data: tuple[Set, Set], resume: bool) -> dict[str, float]:
        train_set, val_set = data
        # Settings that the data folder gives for itself, above all its classes, are part of the run.
        config = replace(config, data=train_set.config)
        task = self.task(config, run, train_set, val_set, goes_on=resume and run.has_checkpoint)

        def drawn() -> Iterator[tuple[Path, bytes]]:
            return self._pictures(val_set, task.predicted)

        def write_results() -> None:
            if task.scores is not None:
                write_class_results(
                    run,
                    task.scores,
                    [source.name for source in val_set.sources],
                    task.confusions,
                    _places(val_set, task.predicted),
                    drawn(),
                    reads=val_set.files,
                    kind=self.kind,
                )

        metrics = commands.fit_in(
            run,
            task,
            config,
            resume=resume,
            may_change=self.may_change,
            write_results=write_results,
            pictures=drawn,
            titles=self.titles,
        )
        say_class_results(run, task.scores, metrics)
        return metrics

    def titles(self, names: Iterable[str]) -> dict[str, str]:
        listed = list(names)
        shown = [name for name in listed if len(listed) <= self.most_titles or not name.startswith("IoU/")]
        return {name: name.removeprefix("IoU/") for name in shown}

    def evaluate(
        self, config: Config, source: Path | None, *, results: Path | None, out: Path, overwrite: bool = False
    ) -> Scores:
        if results is not None or source is None:
            raise UserError(f"--results scores detections; for {self.title}, give a run's folder or a checkpoint")
        with (
            sharing(config.training) as processes,
            Results(out, ("metrics.json",), overwrite=overwrite, first=processes.is_first) as written,
        ):
            trained = self.trained(config, source)
            val_set = self.matching(trained)
            written.reads(val_set.files)
            scores, predicted = self._score(trained, val_set, processes)
            if processes.is_first:
                # Printed before anything is written, which may fail.
                print(scores.table())
                written.write_json("metrics.json", scores.to_json())
                for name, picture in self._pictures(val_set, predicted):
                    written.write(Path("pictures") / name, picture)
        say_end(out, f"latentgnn predict {quoted(source)} INPUT ...")
        return scores

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
        if score_threshold is not None:
            raise UserError(f"--score-threshold leaves out detections; {self.each} gets a class")
        paths = self.expand(inputs)
        device = commands.device_of(config.training.accelerator)
        with sharing(config.training) as processes, commands.precision_of(config.training, device):
            trained = self.trained(config, source)
            self.predict_files(trained, paths, processes, out=out, overwrite=overwrite, pictures=pictures)
        say_end(out)

    def check_data(
        self, config: Config, *, recipe: str, out: Path | None = None, overwrite: bool = False
    ) -> dict[str, Any]:
        if out is not None:
            raise UserError(
                f"{recipe} is a recipe for {self.title}, of which check-data writes no pictures: leave out --out"
            )
        return check_splits(lambda split: self.check_split(config, split))

    def say(self, predicted: Predicted) -> None:
        """Print the result for a file."""
        print(f"{predicted.source}: {predicted.counts.sum():,} {self.unit}, written to {predicted.path}")

    def _load_split(self, config: Config, split: Split) -> Set:
        found = self.load_split(config, split)
        if is_first_process():
            if found.skipped:
                print(found.skipped)
            print(f"{self.content(found, split)}, {len(found.class_names)} classes")
        return found

    def matching(self, trained: Model) -> Set:
        """Return the validation set, with the classes that a model knows."""
        found = self._load_split(trained.config, "val")
        self.refuse_others(trained, found)
        return found

    def _score(self, trained: Model, found: Set, processes: Processes) -> tuple[Scores, dict[int, NDArray[np.int64]]]:
        """In the first process, the figures, and the predictions for the samples that are drawn, by index."""
        config, count = trained.config, len(found.class_names)
        confusion, predicted = np.zeros((count, count), np.int64), {}
        shown = {*spread(len(found), config.evaluation.sample_pictures)}
        with commands.precision_of(config.training, commands.device_of(config.training.accelerator)):
            mine = (self.score(trained, found, index, keep=index in shown) for index in processes.mine(len(found)))
            for result in counted(processes.in_order(mine, len(found)), "evaluate", total=len(found)):
                confusion += result.confusion
                if result.predicted is not None:
                    predicted[result.number] = result.predicted
        confusion = processes.from_first(lambda: confusion)
        return Scores(class_names=found.class_names, confusion=confusion, unit=self.unit), predicted

    def _pictures(self, found: Set, predicted: Mapping[int, NDArray[np.int64]]) -> Iterator[tuple[Path, bytes]]:
        """Yield names and pictures of samples."""
        places = _places(found, predicted)
        for index, classes in predicted.items():
            yield places[index], self.picture(found, index, classes)


def _places(found: ClassSet, indices: Iterable[int]) -> dict[int, Path]:
    """The paths of samples' pictures, below ``pictures/``."""
    listed = list(indices)
    names = result_names([Path(f"{found.sources[index].name}.png") for index in listed])
    return {index: name.with_name(f"{name.name}.png") for index, name in zip(listed, names, strict=True)}
