"""A run's ``report.html``: one file with everything that a run wrote; it needs no network, script or other file."""

import math
import os
import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from latentgnn.configuration.settings import plain_data
from latentgnn.files.writing import write_json, write_text
from latentgnn.training.figures import UNDEFINED, figure_text
from latentgnn.training.page import REPORT, render
from latentgnn.training.progress import read_rows
from latentgnn.training.records import Titles
from latentgnn.training.run_files import (
    Damaged,
    best_validation,
    check_mapping,
    check_metrics,
    check_validations,
    read_json,
)
from latentgnn.training.runs import RunFolder
from latentgnn.training.sections import Chart, Line, Section, Table, read_sections

T = TypeVar("T")

_ANALYSIS = "analysis.json"
# More lines than this are hard to tell apart.
_MOST_LINES = 12


def write_analysis(run: RunFolder, sections: Sequence[Section]) -> None:
    """Store a task's sections of a run's report, so that the report can be written again."""
    if run.writes:
        write_json(run.path / _ANALYSIS, plain_data(list(sections)))


def write_report(run: RunFolder, titles: Titles) -> Path | None:
    """Write ``report.html`` into a run's folder, from the files there; does nothing in a process that does not write.

    For an unfinished run it shows what is there. Damaged files are named in the report.

    Args:
        run: the folder.
        titles: selects and names the figures that are shown first.

    Returns:
        The file, or ``None`` if nothing was written.

    Raises:
        UserError: if a package is not installed.
    """
    if not run.writes:
        return None
    path = run.path / REPORT
    write_text(path, Report(run, titles).page())
    return path


class Report:
    """A run's files, and the page made from them.

    Args:
        run: the folder.
        titles: selects and names the figures that are shown first.

    Attributes:
        notes: list of what could not be read.
        titles: titles of the figures that are shown first, by figure name.
    """

    def __init__(self, run: RunFolder, titles: Titles) -> None:
        self._run = run
        self.notes: list[str] = []
        self._rows = self._read(lambda: _numbers(run.path / "metrics.csv"), "metrics.csv") or []
        self._validations: list[dict[str, Any]] = self._json("validations.json", check_validations) or []
        self._finished: dict[str, Any] | None = self._json("metrics.json", check_metrics)
        self._environment: dict[str, Any] = self._json("environment.json", check_mapping) or {}
        self._data: dict[str, Any] = self._json("data.json", check_mapping) or {}
        names = list(self._validations[-1]["metrics"]) if self._validations else []
        self.titles = {name: title for name, title in titles(names).items() if name in names}

    def page(self) -> str:
        """The HTML."""
        return render(
            self._run,
            subtitle=self.state,
            notes=self.notes,
            tiles=self._tiles(),
            tiles_of=self._tiles_of(),
            sections=[*self._course(), *self._figures(), *self._analysis()],
            commands=self.commands,
            facts=[table for table in (self.versions(folders=True), self.sets(folders=True)) if table.rows],
        )

    @property
    def last(self) -> dict[str, float]:
        """The figures of the last validation."""
        return self._validations[-1]["metrics"] if self._validations else {}

    def metrics_at(self, step: int) -> dict[str, float]:
        """Return the figures of the validation after this many steps; empty if there was none."""
        return next((record["metrics"] for record in self._validations if record["step"] == step), {})

    def points(self, name: str) -> list[tuple[float, float]]:
        """Return steps and values of a figure that was logged or validated."""
        logged = [(row["step"], row[name]) for row in self._rows if name in row]
        return [(x, math.nan if y == UNDEFINED else y) for x, y in logged]

    def _read(self, read: Callable[[], T], name: str) -> T | None:
        if not os.path.lexists(self._run.path / name):
            return None
        try:
            return read()
        except Damaged as error:
            self.notes.append(str(error))
            return None

    def _json(self, name: str, check: Callable[[Any], Any]) -> Any:
        return self._read(lambda: read_json(self._run.path / name, check), name)

    @property
    def state(self) -> str:
        """Return the task, the progress of the run, and when it started."""
        task = self._run.config.get("task", "detection")
        begun = str(self._environment.get("date", "")).replace("T", " ").replace("+00:00", " UTC")
        training = self._run.config.get("training")
        steps = training.get("steps") if isinstance(training, dict) else None
        if self._finished is not None:
            state = f"finished after {self._finished['step']:,} steps"
        else:
            done = max([0, *(int(row["step"]) for row in self._rows)])
            state = f"not finished: {done:,} of {steps or '?'} steps"
        return " · ".join(part for part in (str(task), state, begun) if part)

    def _tiles(self) -> list[tuple[str, str]]:
        best = best_validation(self._validations)
        if best is None:
            return []
        return [(title, figure_text(best["metrics"].get(name))) for name, title in self.titles.items()]

    def _tiles_of(self) -> str:
        best = best_validation(self._validations)
        return f"The best checkpoint, of step {best['step']:,}, on the validation set" if best else ""

    def _course(self) -> Iterator[Section]:
        columns: dict[str, None] = {}
        for row in self._rows:
            columns |= dict.fromkeys(row)
        losses = {name: name.removeprefix("loss/") for name in columns if name == "loss" or name.startswith("loss/")}
        gammas = {name: name.removeprefix("gamma/") for name in columns if name.startswith("gamma/")}
        found = (
            Chart(title="Loss in training", x="step", lines=self._logged(losses)),
            Chart(title="Validation", x="step", lines=self._validated()),
            Chart(title="Learning rate", x="step", lines=self._logged({"rate": "rate"})),
            Chart(title="Gamma of the blocks: their weight in the sum", x="step", lines=self._logged(gammas)),
        )
        shown = tuple(chart for chart in found if any(line.x for line in chart.lines))
        if shown:
            yield Section(title="Course", charts=shown)

    def _logged(self, titles: Mapping[str, str]) -> tuple[Line, ...]:
        lines = []
        for name, title in list(titles.items())[:_MOST_LINES]:
            rows = [(row["step"], row[name]) for row in self._rows if name in row]
            lines.append(Line(name=title, x=tuple(x for x, _ in rows), y=tuple(y for _, y in rows)))
        return tuple(line for line in lines if line.x)

    def _validated(self) -> tuple[Line, ...]:
        steps = tuple(record["step"] for record in self._validations)
        if len(steps) < 2:
            # The table below shows all of them.
            return ()
        lines = []
        for name, title in list(self.titles.items())[:_MOST_LINES]:
            values = [record["metrics"].get(name, UNDEFINED) for record in self._validations]
            y = tuple(math.nan if value == UNDEFINED else float(value) for value in values)
            lines.append(Line(name=title, x=steps, y=y))
        return tuple(lines)

    def _figures(self) -> Iterator[Section]:
        best, last = best_validation(self._validations), self._validations[-1] if self._validations else None
        if last is None:
            return
        shown = {f"step {last['step']:,} (last)": last["metrics"]}
        if best is not None and best is not last:
            shown = {f"step {best['step']:,} (best)": best["metrics"], **shown}
        tables = tuple(self.table(title, metrics) for title, metrics in shown.items())
        yield Section(title="Figures", text="On the validation set. n/a: undefined on this set.", tables=tables)

    def table(self, title: str, metrics: Mapping[str, float]) -> Table:
        """Return figures one below the other; several kinds, such as ``bbox/AP`` and ``segm/AP``, are side by side."""
        parts = [name.partition("/") for name in metrics]
        kinds, names = dict.fromkeys(kind for kind, _, _ in parts), dict.fromkeys(name for _, _, name in parts)
        if len(kinds) > 1 and len(kinds) * len(names) == len(metrics) and all(name for _, _, name in parts):
            rows = tuple((name, *(figure_text(metrics[f"{kind}/{name}"]) for kind in kinds)) for name in names)
            return Table(title=title, columns=("", *map(self._kind, kinds)), rows=rows)
        rows = tuple((self.titles.get(name, name), figure_text(value)) for name, value in metrics.items())
        return Table(title=title, columns=("", ""), rows=rows)

    def _kind(self, kind: str) -> str:
        """The name of a kind of figures, taken from the title of one of them."""
        ends = [(title, name.partition("/")[2]) for name, title in self.titles.items() if name.startswith(f"{kind}/")]
        return next((title.removesuffix(f" {end}") for title, end in ends if title.endswith(f" {end}")), kind)

    def _analysis(self) -> tuple[Section, ...]:
        content = self._json(_ANALYSIS, read_sections)
        if not content:
            return ()
        first, *others = read_sections(content)
        return replace(first, text=f"From here on: the last validation, after the last step. {first.text}"), *others

    @property
    def commands(self) -> list[str]:
        """Return the commands by which the run was started and resumed."""
        starts = [*self._environment.get("earlier", []), self._environment]
        commands = [start.get("command") for start in starts if isinstance(start, dict)]
        return [
            shlex.join(["latentgnn", *map(str, command[1:])])
            for command in commands
            if isinstance(command, list) and command
        ]

    def versions(self, *, folders: bool = False) -> Table:
        """Return the versions that the run used; with ``folders``, also the folder where it was started."""
        known = self._environment
        packages = known.get("packages")
        versions = packages.items() if isinstance(packages, dict) else ()
        found = known.get("gpus")
        gpus = [gpu for gpu in found if isinstance(gpu, dict)] if isinstance(found, list) else []
        facts = {
            "folder of the command": known.get("folder") if folders else None,
            "system": known.get("platform"),
            "Python": known.get("python"),
            "packages": ", ".join(f"{name} {text}" for name, text in versions),
            "commit": _commit(known.get("commit")),
            "processor": _processor(known.get("cpu")),
            "accelerators": ", ".join(str(gpu.get("name")) for gpu in gpus),
        }
        rows = tuple((name, str(value)) for name, value in facts.items() if value)
        return Table(title="Machine and versions", columns=("", ""), rows=rows)

    def sets(self, *, folders: bool = False) -> Table:
        """Return a description of the data sets; with ``folders``, also their folders."""
        names = ("samples", "digest", "root")[: 3 if folders else 2]
        rows = tuple(
            (title, *(str(record.get(name, "?")) for name in names))
            for title, record in self._data.items()
            if isinstance(record, dict)
        )
        return Table(title="Data", columns=("", "samples", "fingerprint", "folder")[: len(names) + 1], rows=rows)


def _numbers(path: Path) -> list[dict[str, float]]:
    """The rows of ``metrics.csv``, each with only the columns that have a value."""
    try:
        return [{name: float(text) for name, text in row.items() if text} for row in read_rows(path)]
    except ValueError as error:
        raise Damaged(f"{path} is damaged ({error})") from None


def _commit(record: Any) -> str | None:
    if not isinstance(record, dict):
        return None
    return f"{record.get('id')}{', with changes' if record.get('modified') else ''}"


def _processor(record: Any) -> str | None:
    if not isinstance(record, dict):
        return None
    return f"{record.get('model')}, {record.get('usable_cores')} cores"
