"""A run's output on the terminal, and its ``log.txt`` and ``metrics.csv``."""

import csv
import errno
import io
import os
import re
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lightning.fabric.loggers.logger import Logger
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress

from latentgnn.files.writing import append_text, write_text
from latentgnn.training.run_files import Damaged
from latentgnn.training.runs import RunFolder

_STEP = re.compile(r"[0-9]{1,18}")


class CsvLog(Logger):
    """Writes ``metrics.csv``: one row per logged step, one column per metric, continued when a run is resumed.

    Args:
        run: the folder.
        first_step: rows after it are dropped, as a resumed run repeats these steps.
    """

    def __init__(self, run: RunFolder, *, first_step: int) -> None:
        super().__init__()
        self._path = run.path / "metrics.csv"
        self._writes = run.writes
        self._columns: list[str] = []
        self._last: dict[str, str] = {}
        if self._writes and os.path.lexists(self._path):
            try:
                rows = [row for row in read_rows(self._path) if int(row["step"]) <= first_step]
            except Damaged as error:
                run.do_without(error, self._path)
                return
            if rows:
                self._columns = list(rows[0])
                self._last = {name: value for name, value in rows[-1].items() if value}
            self._write_all(rows)

    @property
    def name(self) -> str:
        return "csv"

    @property
    def version(self) -> str:
        return ""

    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        """Do nothing: the configuration has its own file."""

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        if not self._writes:
            return
        row = {"step": step, **metrics}
        # A validation that a killed run had logged but not recorded is repeated, with the same figures.
        if {name: str(value) for name, value in row.items()} == self._last:
            return
        new = [name for name in row if name not in self._columns]
        if new:
            rows = read_rows(self._path) if self._columns else []
            self._columns += new
            self._write_all([*rows, row])
            return
        append_text(self._path, self._text([row]))

    def _write_all(self, rows: list[dict[str, Any]]) -> None:
        names = {name: name for name in self._columns}
        write_text(self._path, self._text([names, *rows]))

    def _text(self, rows: list[dict[str, Any]]) -> str:
        buffer = io.StringIO(newline="")
        csv.DictWriter(buffer, self._columns, restval="").writerows(rows)
        return buffer.getvalue()


def read_rows(path: Path) -> list[dict[str, str]]:
    """Return the complete rows of a ``metrics.csv``: a killed process may have written only part of its last row.

    Raises:
        Damaged: if it is not such a file.
    """
    if not path.is_file():
        raise Damaged(f"{path} is damaged (it is no file)")
    try:
        with path.open(newline="", encoding="utf-8", errors="strict") as file:
            reader = csv.DictReader(file)
            columns = reader.fieldnames or []
            rows = [row for row in reader if None not in row and None not in row.values()]
    except (csv.Error, UnicodeDecodeError) as error:
        raise Damaged(f"{path} is damaged ({error})") from None
    if (columns and "step" not in columns) or not all(_STEP.fullmatch(row["step"]) for row in rows):
        raise Damaged(f"{path} is damaged (expected a step in each row)")
    return rows


class Progress:
    """Shows loss and remaining time: as a bar on a terminal, otherwise as lines; ``log.txt`` gets the lines either way.

    Args:
        run: the folder; a process that does not write shows nothing either.
        steps: total number of steps.
        terminal: whether standard output is a terminal; ``None`` detects it.
    """

    def __init__(self, run: RunFolder, *, steps: int, terminal: bool | None = None) -> None:
        self._run = run
        self._steps = steps
        self._writes = run.writes
        self._seen = True
        self._bar: RichProgress | None = None
        self._training: TaskID | None = None
        self._validation: TaskID | None = None
        console = Console(file=sys.stdout)
        # A terminal that cannot move its cursor, as in some editors, gets lines instead.
        moves = sys.stdout.isatty() and not console.is_dumb_terminal if terminal is None else terminal
        if run.writes and moves:
            self._bar = RichProgress(
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                TimeRemainingColumn(),
                TextColumn("{task.fields[figures]}"),
                console=console,
            )

    def start(self, step: int) -> None:
        """Show the bar, at the number of steps already done."""
        if self._bar is not None:
            with self._while_seen():
                self._training = self._bar.add_task("train", total=self._steps, completed=step, figures="")
                self._bar.start()

    def advance(self, step: int) -> None:
        """Move the bar."""
        if self._bar is not None and self._training is not None:
            with self._while_seen():
                self._bar.update(self._training, completed=step)

    def figures(self, step: int, metrics: Mapping[str, float], *, seconds_left: float) -> None:
        """Show the figures of the steps since the last call.

        Args:
            step: number of steps done.
            metrics: ``loss``, ``loss/<part>``, ``rate``, ``samples_per_second`` and more.
            seconds_left: estimated remaining time.
        """
        parts = [f"{name[5:]} {value:.4f}" for name, value in metrics.items() if name.startswith("loss/")]
        line = (
            f"step {step}/{self._steps}  loss {metrics['loss']:.4f} ({', '.join(parts)})  rate {metrics['rate']:.3g}  "
            f"{metrics['samples_per_second']:.1f} samples/s  left {_duration(seconds_left)}"
        )
        if self._bar is not None and self._training is not None:
            with self._while_seen():
                self._bar.update(self._training, figures=f"loss {metrics['loss']:.4f}  rate {metrics['rate']:.3g}")
            self._run.keep_line(line)
        else:
            self.say(line)

    def validating(self, batch: int, batches: int) -> None:
        """Show the progress of a validation; removed when it ends."""
        if self._bar is None:
            return
        with self._while_seen():
            if self._validation is None:
                self._validation = self._bar.add_task("validate", total=batches, figures="")
            self._bar.update(self._validation, completed=batch)
            if batch == batches:
                self._bar.remove_task(self._validation)
                self._validation = None

    def say(self, line: str) -> None:
        """Print a line and append it to ``log.txt``."""
        if not self._writes:
            return
        # Written to the log first: there may be nobody left to read the terminal.
        self._run.keep_line(line)
        if self._seen:
            with self._while_seen():
                if self._bar is not None:
                    self._bar.console.print(line, markup=False, highlight=False)
                else:
                    print(line, flush=True)

    def close(self) -> None:
        """Restore the terminal."""
        if self._bar is not None:
            with self._while_seen():
                self._bar.stop()

    @contextmanager
    def _while_seen(self) -> Iterator[None]:
        """Ignore output errors: the run continues if the terminal is gone (SIGHUP) or a pipe is closed."""
        try:
            yield
        except OSError as error:
            if error.errno not in (errno.EIO, errno.EPIPE):
                raise
            self._seen = False
            self._bar = None


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}"
