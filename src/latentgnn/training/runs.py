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
from latentgnn.files import append_text, is_temporary, leftovers, write_json, write_text
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

# Processes that Lightning starts for further devices run the same command, and find the first one's folder by it.
_INHERITED = "LATENTGNN_RUN"
# What a run has in its folder before its first step: a folder with nothing else has nothing to lose.
_STARTED = frozenset({"config.yaml", "environment.json", "data.json", "data", "start.json", "split.json"})


class RunFolder:
    """One folder a run.

    ``config.yaml`` (resolved), ``environment.json``, ``data.json`` (what the sets are), ``start.json`` (what was taken
    over from trained weights), ``log.txt``, ``metrics.csv`` (the course), ``validations.json``, ``analysis.json`` (the
    last validation in detail), ``metrics.json`` (the end), ``report.html``, ``tensorboard/``, ``checkpoints/`` and
    ``pictures/``; ``data/`` where a task makes its data for the run, ``split.json`` where it draws what to validate on.
    Made by ``create`` or ``open``; whoever trains into it does so inside ``held``.
    Only the first process of a run writes into it; elsewhere the ``write_`` methods do nothing.

    A file that is damaged does not stop a run that can do without it: it gets another name, a line says so, and the run
    goes on as if it had never been.

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
        """A new run.

        Args:
            path: the folder, new or empty, or of a run that ended before its first step; ``None`` makes
                ``runs/<task>-<date>-<time>``.
            task: the first part of the folder's name.

        Raises:
            UserError: the folder holds something already.
        """
        if not is_first_process():
            shared = os.environ.get(_INHERITED) if path is None else path
            if shared is None:
                raise UserError("a run of several separately started processes needs a run folder that is named")
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
        """The run in an existing folder; a checkpoint has its configuration too, if the file is damaged or gone.

        Raises:
            UserError: there is none.
        """
        path = Path(path)
        if not path.is_dir():
            raise UserError(f"there is no run folder {path}")
        return cls(path, _configuration(path))

    @contextmanager
    def held(self) -> Iterator[None]:
        """Keep other processes out, see `latentgnn.training.locks.sole_use`, and clear away what killed ones left.

        Raises:
            UserError: another process trains into the folder, or has done so since it was made for this run.
        """
        if not self.writes:
            # The first process of the run holds it for all.
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
        """The file of the last checkpoint, the one before it, or the best, there or not."""
        return self.checkpoints / f"{name}.ckpt"

    @property
    def checkpoints(self) -> Path:
        """The folder of the checkpoints."""
        return self.path / "checkpoints"

    @property
    def has_checkpoint(self) -> bool:
        """Whether there is any, sound or not."""
        return self.checkpoints.is_dir() and any(self.checkpoints.glob("*.ckpt"))

    @property
    def pictures(self) -> Path:
        """The folder for sample pictures."""
        return self.path / "pictures"

    @property
    def log(self) -> Path:
        """The file that takes the lines that a person sees."""
        return self.path / "log.txt"

    def write_config(self, config: Mapping[str, Any]) -> None:
        """Keep the resolved configuration, here and in ``config.yaml``; dataclasses and tuples become plain data."""
        self.config = plain_data(config)
        if self.writes:
            write_text(self.path / "config.yaml", to_yaml(self.config))

    def write_environment(self) -> None:
        """Write versions, hardware, commit and command; those of earlier starts of the same run stay in ``earlier``."""
        if not self.writes:
            return
        record = environment()
        before = self._read("environment.json", check_mapping)
        if before is not None:
            record["earlier"] = [*before.pop("earlier", []), before]
        write_json(self.path / "environment.json", record)

    def write_start(self, lines: Sequence[str], trained: Collection[str]) -> None:
        """Write ``start.json``: what the run began with.

        Args:
            lines: what was told of it.
            trained: names of the parameters that began with trained weights.
        """
        if self.writes:
            write_json(self.path / "start.json", {"told": list(lines), "trained": sorted(trained)})

    def trained_at_start(self) -> frozenset[str] | None:
        """The names that ``write_start`` kept, or ``None`` where it did not."""
        content = self._read("start.json", check_start)
        return None if content is None else frozenset(content["trained"])

    def write_data(self, sets: Mapping[str, Any]) -> None:
        """Write ``data.json``: what identifies each of the sets."""
        if self.writes:
            write_json(self.path / "data.json", sets)

    def write_metrics(self, content: Mapping[str, Any]) -> None:
        """Write ``metrics.json``, which marks a run as finished."""
        if self.writes:
            write_json(self.path / "metrics.json", content)

    def metrics(self) -> dict[str, Any] | None:
        """What ``metrics.json`` holds, or ``None`` while the run is not finished."""
        return self._read("metrics.json", check_metrics)

    def validations(self) -> list[dict[str, Any]]:
        """The validations so far: step, metrics, and whether the best checkpoint was written there.

        Where the file is damaged there are none, and the best checkpoint, of which nothing is known then, gets another
        name too: the next validation's would take its place, better or not.
        """

        def keep_best() -> None:
            best, earlier = self.checkpoint("best"), self.checkpoints / "earlier-best.ckpt"
            if best.exists():
                os.replace(best, earlier)
                self.say(f"the best checkpoint until now is kept as {earlier}, and the best is chosen anew")

        return self._read("validations.json", check_validations, if_damaged=keep_best) or []

    def write_validations(self, validations: list[dict[str, Any]]) -> None:
        """Write ``validations.json``."""
        if self.writes:
            write_json(self.path / "validations.json", validations)

    def say(self, line: str) -> None:
        """A line for the person, and for ``log.txt``."""
        if self.writes:
            self.keep_line(line)
            print(line, flush=True)

    def keep_line(self, line: str) -> None:
        """A line for ``log.txt``, with the time."""
        if self.writes:
            append_text(self.log, f"{time.strftime('%Y-%m-%d %H:%M:%S')}  {line}\n")

    def do_without(self, error: Damaged, path: Path) -> None:
        """Give a damaged file another name, and say so; in processes that do not write, nothing."""
        if self.writes:
            self.say(f"{error}; it is kept as {set_aside(path).name}, and the run goes on without it")

    def _read(self, name: str, check: Callable[[Any], None], *, if_damaged: Callable[[], None] = lambda: None) -> Any:
        """The content of a file, or ``None`` where there is no such file or it is damaged, in all processes alike."""
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
    """The configuration in a run's folder, a checkpoint or a saved model.

    Raises:
        UserError: there is none.
    """
    if source.is_dir() and not (source / CONFIG).is_file():
        return RunFolder.open(source).config
    if not source.exists():
        raise UserError(f"there is no run folder or checkpoint at {source}")
    # These import torch, which the command line does not do before a command needs it.
    from latentgnn.saved import is_saved, read_record
    from latentgnn.training.checkpoints import read_checkpoint
    from latentgnn.training.saved_runs import config_of

    if source.is_dir() or is_saved(source):
        return config_of(read_record(source), source)
    return read_checkpoint(source).config


def run_of(source: Path) -> RunFolder | None:
    """The run whose folder a source is, or in whose folder a checkpoint lies; ``None`` where there is none."""
    folders = [source, *source.resolve().parents[:2]]
    return next((RunFolder.open(folder) for folder in folders if (folder / "config.yaml").is_file()), None)


def is_first_process() -> bool:
    """Whether this is the only or the first process of a run, by what launchers put into the environment."""
    # torchrun sets RANK, Slurm SLURM_PROCID, and Lightning's own launcher NODE_RANK and LOCAL_RANK.
    for name in ("RANK", "SLURM_PROCID"):
        if name in os.environ:
            return os.environ[name] == "0"
    return os.environ.get("NODE_RANK", "0") == "0" and os.environ.get("LOCAL_RANK", "0") == "0"


def _new_folder(task: str) -> Path:
    """A folder that no other process has made: of two that start in the same second, each gets its own."""
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
    """Refuse a folder in which a new run would mix its files with others."""
    if path.exists() and not path.is_dir():
        raise UserError(f"the run folder {path} is a file: name another")
    names = {file.name for file in path.iterdir() if not is_temporary(file)} - {LOCK} if path.is_dir() else set()
    if not names or ("config.yaml" in names and names <= _STARTED):
        return
    if "config.yaml" in names:
        raise UserError(f"{path} holds a run already: resume it, or name another folder")
    raise UserError(f"{path} is not empty and holds no run: name a new or an empty folder")


def _configuration(run: Path) -> dict[str, Any]:
    """What ``config.yaml`` of a run holds, or its newest sound checkpoint where that file is damaged or absent."""
    file = run / "config.yaml"
    try:
        if not file.is_file():
            raise UserError(f"{run} is not a run's folder: it has no config.yaml")
        return load_recipe(file.resolve())
    except UserError as error:
        if not any((run / "checkpoints").glob("*.ckpt")):
            raise
        # Imports torch, which the command line does not do before a command needs it.
        from latentgnn.training.checkpoints import newest_checkpoint

        checkpoint = newest_checkpoint(run / "checkpoints")
        if checkpoint is None:
            raise
        if is_first_process():
            print(f"{error}; the configuration is taken from {checkpoint.path}", flush=True)
        return checkpoint.config
