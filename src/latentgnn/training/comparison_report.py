"""The report of a comparison: learning curves and figures of its runs side by side."""

from collections.abc import Mapping
from pathlib import Path

from latentgnn.files.writing import write_text
from latentgnn.training.figures import UNDEFINED, figure_text
from latentgnn.training.page import REPORT, render
from latentgnn.training.records import Titles
from latentgnn.training.report import Report
from latentgnn.training.runs import RunFolder
from latentgnn.training.sections import Chart, Line, Section, Table

_MOST_CHARTS = 9


def write_comparison(both: RunFolder, runs: Mapping[str, RunFolder], titles: Titles) -> Path | None:
    """Write ``report.html`` into a comparison's folder; does nothing in a process that does not write.

    Args:
        both: the folder of the comparison.
        runs: its runs by name; the first is compared with the second.
        titles: selects and names the figures that are shown.

    Returns:
        The file, or ``None`` if nothing was written.
    """
    if not both.writes:
        return None
    reports = {name.replace("_", " "): Report(run, titles) for name, run in runs.items()}
    first = next(iter(reports.values()))
    text = (
        "The same model, data, seed and steps. One run a side does not tell how much of a difference is chance: "
        f"other seeds do. Each run has its own report: {', '.join(f'{name}/{REPORT}' for name in runs)}."
    )
    charts = [Chart(title="Loss in training", x="step", lines=_lines(reports, "loss"))]
    charts += [Chart(title=title, x="step", lines=_lines(reports, name)) for name, title in first.titles.items()]
    sections = [
        Section(title="Figures", text=text, tables=(_table(reports),)),
        Section(title="Course", charts=tuple(chart for chart in charts if _is_line(chart))[:_MOST_CHARTS]),
    ]
    page = render(
        both,
        subtitle=" · ".join(f"{name}: {report.state}" for name, report in reports.items()),
        notes=[note for report in reports.values() for note in report.notes],
        sections=sections,
        commands=first.commands,
    )
    path = both.path / REPORT
    write_text(path, page)
    return path


def _table(reports: Mapping[str, Report]) -> Table:
    """The figures of each run's last validation, and their difference if there are two runs."""
    last = [report.last for report in reports.values()]
    titles = next(iter(reports.values())).titles
    rows = []
    for name, title in titles.items():
        values = [metrics.get(name, UNDEFINED) for metrics in last]
        defined = UNDEFINED not in values and len(values) == 2
        rows.append((title, *map(figure_text, values), f"{values[0] - values[1]:+.3f}" if defined else "n/a"))
    return Table(title="After the last validation", columns=("", *reports, "difference"), rows=tuple(rows))


def _lines(reports: Mapping[str, Report], name: str) -> tuple[Line, ...]:
    return tuple(
        Line(name=title, x=tuple(x for x, _ in points), y=tuple(y for _, y in points))
        for title, report in reports.items()
        if (points := report.points(name))
    )


def _is_line(chart: Chart) -> bool:
    return any(len(line.x) > 1 for line in chart.lines)
