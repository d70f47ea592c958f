"""A task's sections of a run's report, as plain data, so that it can be rewritten without model or data."""

import math
from collections.abc import Sequence
from dataclasses import MISSING, dataclass, fields, is_dataclass
from typing import Any, TypeVar, cast, get_args, get_origin, get_type_hints

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Table:
    """Rows of text; the first cell of each row is its name.

    Args:
        title: title above the table.
        columns: titles of the columns.
        rows: the rows, each with one string per column.
    """

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]

    def __post_init__(self) -> None:
        if any(len(row) != len(self.columns) for row in self.rows):
            raise ValueError(f"expected {len(self.columns)} cells in each row of the table {self.title!r}")


@dataclass(frozen=True, kw_only=True)
class Line:
    """A line of a chart.

    Args:
        name: name in the legend.
        x: x values, ascending.
        y: y values, as many; the line has a gap where one is not finite.
    """

    name: str
    x: tuple[float, ...]
    y: tuple[float, ...]

    def __post_init__(self) -> None:
        if len(self.x) != len(self.y):
            raise ValueError(f"expected as many x as y in the line {self.name!r}; got {len(self.x)} and {len(self.y)}")
        if not all(map(math.isfinite, self.x)):
            raise ValueError(f"expected finite x in the line {self.name!r}")


@dataclass(frozen=True, kw_only=True)
class Chart:
    """Lines over a common axis.

    Args:
        title: title above the chart.
        x: label of the horizontal axis.
        lines: the lines; those without points are omitted.
        limits: lowest and highest value of the vertical axis; empty takes them from the lines.
    """

    title: str
    x: str
    lines: tuple[Line, ...]
    limits: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        limits = self.limits
        if limits and not (len(limits) == 2 and all(map(math.isfinite, limits)) and limits[0] < limits[1]):
            raise ValueError(f"expected two ascending limits of the chart {self.title!r}, or none; got {limits}")


@dataclass(frozen=True, kw_only=True)
class Matrix:
    """A matrix of counts, coloured by each count's share of its row.

    Args:
        title: title above the matrix.
        rows: names of the rows.
        columns: names of the columns.
        counts: the counts, one row each.
    """

    title: str
    rows: tuple[str, ...]
    columns: tuple[str, ...]
    counts: tuple[tuple[int, ...], ...]

    def __post_init__(self) -> None:
        if len(self.counts) != len(self.rows) or any(len(row) != len(self.columns) for row in self.counts):
            raise ValueError(f"expected {len(self.rows)} x {len(self.columns)} counts in the matrix {self.title!r}")


@dataclass(frozen=True, kw_only=True)
class Picture:
    """A picture of the run.

    Args:
        path: path below the run's ``pictures/``.
        caption: text below the picture.
    """

    path: str
    caption: str


@dataclass(frozen=True, kw_only=True)
class Gallery:
    """Pictures side by side.

    Args:
        title: title above the pictures.
        pictures: the pictures, in order.
        wide: each picture is as wide as the page; on a small screen it stays wide enough for its text to be readable,
            and scrolls.
    """

    title: str
    pictures: tuple[Picture, ...]
    wide: bool = False


@dataclass(frozen=True, kw_only=True)
class Section:
    """A section of a report; its parts are shown in the order of the arguments.

    Args:
        title: its heading.
        text: what a reader needs to know to understand it.
        charts: curves.
        tables: figures.
        matrices: counts.
        galleries: pictures.
    """

    title: str
    text: str = ""
    charts: tuple[Chart, ...] = ()
    tables: tuple[Table, ...] = ()
    matrices: tuple[Matrix, ...] = ()
    galleries: tuple[Gallery, ...] = ()


def read_sections(value: Any) -> tuple[Section, ...]:
    """Read sections from the plain form that `latentgnn.configuration.settings.plain_data` gave them.

    Raises:
        ValueError: if it is something else.
    """
    return cast(tuple[Section, ...], _read(tuple[Section, ...], value))


def _read(hint: Any, value: Any) -> Any:
    if is_dataclass(hint):
        hints = get_type_hints(hint)
        # Fields that have a default are newer, and earlier versions did not write them.
        needed = {field.name for field in fields(hint) if field.default is MISSING}
        if not isinstance(value, dict) or not needed <= set(value) <= set(hints):
            raise ValueError(f"expected {', '.join(hints)} of a {cast(type, hint).__name__.lower()}")
        return cast(Any, hint)(**{name: _read(hints[name], inner) for name, inner in value.items()})
    if get_origin(hint) is tuple:
        if not isinstance(value, list):
            raise ValueError(f"expected a list, got {type(value).__name__}")
        return tuple(_read(get_args(hint)[0], item) for item in value)
    accepted = int | float if hint is float else hint
    if not isinstance(value, accepted) or (isinstance(value, bool) and hint is not bool):
        raise ValueError(f"expected {hint.__name__}, got {type(value).__name__}")
    return value


def thinned(line: Line, most: int = 400) -> Line:
    """Reduce a line to as many points as can be told apart, by averaging stretches of a longer one.

    Example:
        >>> thinned(Line(name="loss", x=(1, 2, 3, 4), y=(4.0, 2.0, 1.0, 1.0)), most=2)
        Line(name='loss', x=(1.5, 3.5), y=(3.0, 1.0))
    """
    size = math.ceil(len(line.x) / most)
    if size <= 1:
        return line
    starts = range(0, len(line.x), size)

    def means(values: Sequence[float]) -> tuple[float, ...]:
        return tuple(sum(part := values[start : start + size]) / len(part) for start in starts)

    return Line(name=line.name, x=means(line.x), y=means(line.y))
