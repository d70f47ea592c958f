"""Line charts as shapes of an SVG picture, in units of CSS pixels on a phone."""

import math
from dataclasses import dataclass

from latentgnn.training.sections import Chart, thinned

WIDTH, HEIGHT = 360, 230
_LEFT, _RIGHT, _TOP, _BOTTOM = 46, 10, 10, 34


@dataclass(frozen=True, kw_only=True)
class Tick:
    """A mark on an axis.

    Args:
        place: position along the axis.
        text: label beside the mark.
    """

    place: float
    text: str


@dataclass(frozen=True, kw_only=True)
class Shape:
    """One line of a chart, in SVG's terms.

    Args:
        name: name in the legend.
        path: value of the attribute ``d``; empty if no point is finite.
        dots: positions of points without neighbours, which a path would not show.
        last: the last value, as text.
    """

    name: str
    path: str
    dots: tuple[tuple[float, float], ...]
    last: str


@dataclass(frozen=True, kw_only=True)
class Drawing:
    """A chart's shapes within `WIDTH` x `HEIGHT`.

    Args:
        left: left edge of the plot; likewise ``right``, ``top`` and ``bottom``.
        across: marks on the horizontal axis.
        up: marks on the vertical axis.
        shapes: the lines.
    """

    left: float
    right: float
    top: float
    bottom: float
    across: tuple[Tick, ...]
    up: tuple[Tick, ...]
    shapes: tuple[Shape, ...]


def draw(chart: Chart) -> Drawing | None:
    """Return a chart's shapes, or ``None`` if no line has a finite point or the range of values is empty."""
    lines = [thinned(line) for line in chart.lines]
    points = [[(x, y) if math.isfinite(y) else None for x, y in zip(line.x, line.y, strict=True)] for line in lines]
    finite = [point for line in points for point in line if point is not None]
    if not finite:
        return None
    x_low, x_high = _widened(min(x for x, _ in finite), max(x for x, _ in finite))
    y_low, y_high = chart.limits or _widened(min(y for _, y in finite), max(y for _, y in finite), margin=0.04)
    if not all(1e-300 < extent < math.inf for extent in (x_high - x_low, y_high - y_low)):
        # The range overflows and cannot be divided.
        return None

    def across(x: float) -> float:
        return round(_LEFT + (x - x_low) / (x_high - x_low) * (WIDTH - _LEFT - _RIGHT), 1)

    def up(y: float) -> float:
        return round(HEIGHT - _BOTTOM - (y - y_low) / (y_high - y_low) * (HEIGHT - _TOP - _BOTTOM), 1)

    shapes = []
    for line, values in zip(lines, points, strict=True):
        placed = [None if point is None else (across(point[0]), up(point[1])) for point in values]
        last = next((point[1] for point in reversed(values) if point is not None), None)
        shapes.append(
            Shape(name=line.name, path=_path(placed), dots=_alone(placed), last="" if last is None else f"{last:.4g}")
        )
    return Drawing(
        left=_LEFT,
        right=WIDTH - _RIGHT,
        top=_TOP,
        bottom=HEIGHT - _BOTTOM,
        across=tuple(Tick(place=across(x), text=_text(x)) for x in ticks(x_low, x_high, 5)),
        up=tuple(Tick(place=up(y), text=_text(y)) for y in ticks(y_low, y_high, 5)),
        shapes=tuple(shapes),
    )


def ticks(low: float, high: float, about: int) -> list[float]:
    """Return round numbers from ``low`` to ``high``, in steps of 1, 2 or 5 times a power of ten.

    Example:
        >>> ticks(0.0, 1.0, 5)
        [0.0, 0.2, 0.4, 0.6, 0.8, 1.0]
        >>> ticks(13, 120, 5)
        [20, 40, 60, 80, 100, 120]
    """
    rough = (high - low) / about
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= 0.75 * rough)
    digits = max(0, -math.floor(math.log10(step)))
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [round(number * step, digits) if digits else round(number * step) for number in range(first, last + 1)]


def _widened(low: float, high: float, margin: float = 0.0) -> tuple[float, float]:
    if high - low <= 1e-9 * max(abs(low), abs(high), 1e-200):
        around = abs(low) if abs(low) > 1e-200 else 1.0
        return low - around / 2, high + around / 2
    return low - margin * (high - low), high + margin * (high - low)


def _path(placed: list[tuple[float, float] | None]) -> str:
    parts, pen = [], "M"
    for point in placed:
        if point is None:
            pen = "M"
            continue
        parts.append(f"{pen}{point[0]:g} {point[1]:g}")
        pen = "L"
    return "".join(parts)


def _alone(placed: list[tuple[float, float] | None]) -> tuple[tuple[float, float], ...]:
    """Points between gaps, and all points of a line with few points."""
    surrounded = [None, *placed, None]
    few = len(placed) <= 12
    return tuple(
        point
        for before, point, after in zip(surrounded, placed, surrounded[2:], strict=False)
        if point is not None and (few or (before is None and after is None))
    )


def _text(value: float) -> str:
    if value and (abs(value) >= 1e5 or abs(value) < 1e-4):
        mantissa, exponent = f"{value:.1e}".split("e")
        return f"{mantissa.removesuffix('.0')}e{int(exponent)}"
    return f"{value:,.10g}"
