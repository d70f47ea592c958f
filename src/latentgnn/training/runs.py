"""The folder that a run writes: its configuration, its environment, its results."""

import os
import shutil
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from latentgnn.configuration.recipes import load_recipe, to_yaml
from latentgnn.configuration.settings import plain_data
from latentgnn.errors import UserError
from latentgnn.files.writing import append_text, is_temporary, leftovers, write_json, write_text
from latentgnn.hub import CONFIG
from latentgnn.training.environment import environment
from latentgnn.training.locks import LOCK, sole_use
from latentgnn.training.run_files import (
    Damaged,
    check_mapping,
    check_metrics,
    check_start,
    check_validations,
    read_json,
    set_aside,
)

# Processes that Lightning starts for other devices run the same command, and find the first one's folder by this.
_INHERITED = "LATENTGNN_RUN"
# Files that a run writes before its first step: a folder with only these has nothing to lose.
_STARTED = frozenset({"config.yaml", "environment.json", "data.json", "data", "start.json", "split.json"})


class RunFolder:
    """The folder of one run.

    ``config.yaml`` (resolved), ``environment.json``, ``data.json`` (what the sets are), ``start.json`` (what was loaded
    from trained weights), ``log.txt``, ``metrics.csv`` (figures over time), ``validations.json``, ``analysis.json``
    (the last validation in detail), ``metrics.json`` (final figures), ``report.html``, ``tensorboard/``,
    ``checkpoints/`` and ``pictures/``; ``data/`` if a task generates data for the run, ``split.json`` if it draws a
    validation split. Created by ``create`` or ``open``; training into it happens inside ``held``. Only the first
    process of a run writes into it; in the others the ``write_`` methods do nothing.

    A damaged file does not stop a run that can do without it: it is renamed, a line says so, and the run continues as
    if the file had never existed.

    Args:
        path: the folder.
        config: the resolved configuration, as plain data.
    """

    def __init__(self, path: Path, config: Mapping[str, Any] | None = None) -> None:
        self.path = path
        self.config: dict[str, Any] = dict(config or {})
        self.writes = is_first_process()
        self._is_new = False

    @classmethod
    def create(cls, path: Path | str | None = None, *, task: str) -> "RunFolder":
        """Create the folder of a new run.

        Args:
            path: the folder: new, empty, or of a run that ended before its first step; ``None`` creates
                ``runs/<task>-<date>-<time>``.
            task: the first part of the folder's name.

        Raises:
            UserError: if the folder already contains something else.
        """
        if not is_first_process():
            shared = os.environ.get(_INHERITED) if path is None else path
            if shared is None:
                raise UserError("a run of separately started processes needs a named run folder: give --out")
            return cls(Path(shared))
        if path is None:
            path = _new_folder(task)
            os.environ[_INHERITED] = str(path)
        path = Path(path)
        _refuse_used(path)
        path.mkdir(parents=True, exist_ok=True)
        run = cls(path)
        run._is_new = True
        return run

    @classmethod
    def open(cls, path: Path | str) -> "RunFolder":
        """Open the run in a folder; if its configuration file is damaged or missing, take that of a checkpoint.

        Raises:
            UserError: if there is none.
        """
        path = Path(path)
        if not path.is_dir():
            raise UserError(f"there is no run folder {path}")
        return cls(path, _configuration(path))

    @contextmanager
    def held(self) -> Iterator[None]:
        """Lock out other processes, see `latentgnn.training.locks.sole_use`, and remove what killed ones left behind.

        Raises:
            UserError: if another process trains into the folder, or has done so since it was created for this run.
        """
        if not self.writes:
            # The first process of the run holds the lock for all.
            yield
            return
        with sole_use(self.path):
            if self._is_new:
                _refuse_used(self.path)
            for path in leftovers(self.path):
                if path.is_dir() and not path.is_symlink():
                    shutil.rmtree(path)
                else:
                    path.unlink()
            yield

    def checkpoint(self, name: Literal["last", "previous", "best"]) -> Path:
        """Return the path of the last checkpoint, the one before it, or the best one, whether it exists or not."""
        return self.checkpoints / f"{name}.ckpt"

    @property
    def checkpoints(self) -> Path:
        """The folder of the checkpoints."""
        return self.path / "checkpoints"

    @property
    def has_checkpoint(self) -> bool:
        """Whether there is any checkpoint, intact or not."""
        return self.checkpoints.is_dir() and any(self.checkpoints.glob("*.ckpt"))

    @property
    def pictures(self) -> Path:
        """The folder for sample pictures."""
        return self.path / "pictures"

    @property
    def log(self) -> Path:
        """The file that stores the lines shown to the user."""
        return self.path / "log.txt"

    def write_config(self, config: Mapping[str, Any]) -> None:
        """Store the resolved configuration here and in ``config.yaml``; dataclasses and tuples become plain data."""
        self.config = plain_data(config)
        if self.writes:
            write_text(self.path / "config.yaml", to_yaml(self.config))

    def write_environment(self) -> None:
        """Write versions, hardware, commit and command; those of earlier starts are kept under ``earlier``."""
        if not self.writes:
            return
        record = environment()
        before = self._read("environment.json", check_mapping)
        if before is not None:
            record["earlier"] = [*before.pop("earlier", []), before]
        write_json(self.path / "environment.json", record)

    def write_start(self, lines: Sequence[str], trained: Collection[str]) -> None:
        """Write ``start.json``: what the run started from.

        Args:
            lines: the lines that were printed about it.
            trained: names of the parameters that started from trained weights.
        """
        if self.writes:
            write_json(self.path / "start.json", {"told": list(lines), "trained": sorted(trained)})

    def trained_at_start(self) -> frozenset[str] | None:
        """Return the names that ``write_start`` stored, or ``None`` if there is no such file."""
        content = self._read("start.json", check_start)
        return None if content is None else frozenset(content["trained"])

    def write_data(self, sets: Mapping[str, Any]) -> None:
        """Write ``data.json``: what identifies each data set."""
        if self.writes:
            write_json(self.path / "data.json", sets)

    def write_metrics(self, content: Mapping[str, Any]) -> None:
        """Write ``metrics.json``, which marks a run as finished."""
        if self.writes:
            write_json(self.path / "metrics.json", content)

    def metrics(self) -> dict[str, Any] | None:
        """Return the content of ``metrics.json``, or ``None`` while the run is not finished."""
        return self._read("metrics.json", check_metrics)

    def validations(self) -> list[dict[str, Any]]:
        """Return the validations so far: step, metrics, and whether the best checkpoint was written then.

        If the file is damaged there are none. The best checkpoint is then renamed too, as nothing is known of its
        score, and the checkpoint of the next validation would replace it whether it is better or not.
        """

        def keep_best() -> None:
            best, earlier = self.checkpoint("best"), self.checkpoints / "earlier-best.ckpt"
            if best.exists():
                os.replace(best, earlier)
                self.say(
                    f"the best checkpoint so far is renamed to {earlier}, and the next validation chooses a new one"
                )

        return self._read("validations.json", check_validations, if_damaged=keep_best) or []

    def write_validations(self, validations: list[dict[str, Any]]) -> None:
        """Write ``validations.json``."""
        if self.writes:
            write_json(self.path / "validations.json", validations)

    def say(self, line: str) -> None:
        """Print a line and append it to ``log.txt``."""
        if self.writes:
            self.keep_line(line)
            print(line, flush=True)

    def keep_line(self, line: str) -> None:
        """Append a line with the time to ``log.txt``."""
        if self.writes:
            append_text(self.log, f"{time.strftime('%Y-%m-%d %H:%M:%S')}  {line}\n")

    def do_without(self, error: Damaged, path: Path) -> None:
        """Rename a damaged file and say so; does nothing in processes that do not write."""
        if self.writes:
            self.say(f"{error}; it is kept as {set_aside(path).name}, and the run goes on without it")

    def _read(self, name: str, check: Callable[[Any], None], *, if_damaged: Callable[[], None] = lambda: None) -> Any:
        """The content of a file, or ``None`` if it is missing or damaged; the same in all processes."""
        path = self.path / name
        if not os.path.lexists(path):
            return None
        try:
            return read_json(path, check)
        except Damaged as error:
            if self.writes:
                if_damaged()
            self.do_without(error, path)
            return None


def recorded_config(source: Path) -> Mapping[str, Any]:
    """Return the configuration in a run's folder, a checkpoint or a saved model.

    Raises:
        UserError: if there is none.
    """
    if source.is_dir() and not (source / CONFIG).is_file():
        return RunFolder.open(source).config
    if not source.exists():
        raise UserError(f"there is no run folder or checkpoint at {source}")
    # These import torch, which the command line delays until a command needs it.
    from latentgnn.saved import is_saved, read_record
    from latentgnn.training.checkpoints import read_checkpoint
    from latentgnn.training.saved_runs import config_of

    if source.is_dir() or is_saved(source):
        return config_of(read_record(source), source)
    return read_checkpoint(source).config


def run_of(source: Path) -> RunFolder | None:
    """Return the run of a run folder or of a checkpoint in one; ``None`` if there is none."""
    folders = [source, *source.resolve().parents[:2]]
    return next((RunFolder.open(folder) for folder in folders if (folder / "config.yaml").is_file()), None)


def is_first_process() -> bool:
    """Whether this is the only or first process of a run, according to the environment set by launchers."""
    # torchrun sets RANK, Slurm SLURM_PROCID, and Lightning's own launcher NODE_RANK and LOCAL_RANK.
    for name in ("RANK", "SLURM_PROCID"):
        if name in os.environ:
            return os.environ[name] == "0"
    return os.environ.get("NODE_RANK", "0") == "0" and os.environ.get("LOCAL_RANK", "0") == "0"


def _new_folder(task: str) -> Path:
    """Create a folder; of two processes that start in the same second, each gets its own."""
    base = f"{task}-{time.strftime('%Y%m%d-%H%M%S')}"
    path, number = Path("runs") / base, 2
    path.parent.mkdir(parents=True, exist_ok=True)
    while True:
        try:
            path.mkdir()
            return path
        except FileExistsError:
            path, number = Path("runs") / f"{base}-{number}", number + 1


def _refuse_used(path: Path) -> None:
    """Refuse a folder that already has files of something else."""
    if path.exists() and not path.is_dir():
        raise UserError(f"the run folder {path} is a file: name another")
    names = {file.name for file in path.iterdir() if not is_temporary(file)} - {LOCK} if path.is_dir() else set()
    if not names or ("config.yaml" in names and names <= _STARTED):
        return
    if "config.yaml" in names:
        raise UserError(f"{path} holds a run already: resume it, or name another folder")
    raise UserError(f"{path} is not empty and holds no run: name a new or an empty folder")


def _configuration(run: Path) -> dict[str, Any]:
    """The content of a run's ``config.yaml``, or else the configuration in its newest intact checkpoint."""
    file = run / "config.yaml"
    try:
        if not file.is_file():
            raise UserError(f"{run} is not a run's folder: it has no config.yaml")
        return load_recipe(file.resolve())
    except UserError as error:
        if not any((run / "checkpoints").glob("*.ckpt")):
            raise
        # Imports torch, which the command line delays until a command needs it.
        from latentgnn.training.checkpoints import newest_checkpoint

        checkpoint = newest_checkpoint(run / "checkpoints")
        if checkpoint is None:
            raise
        if is_first_process():
            print(f"{error}; the configuration is taken from {checkpoint.path}", flush=True)
        return checkpoint.config
