"""Pictures of scans: classes as colours, from above and in perspective, ground truth beside prediction."""

import io
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from latentgnn.errors import require
from latentgnn.tasks.classes import IGNORE

_IGNORED_COLOUR = (0.82, 0.82, 0.82)
_MOST_POINTS = 150_000
_WRONG = "#d62728"
_RIGHT = "#d9dde2"


def drawn_points(number: int) -> NDArray[np.int64]:
    """Return indices of the points that are drawn: at most 150,000, evenly spread over the file, in which consecutive
    points are often neighbours."""
    return np.linspace(0, number - 1, _MOST_POINTS).astype(np.int64) if number > _MOST_POINTS else np.arange(number)


def marker_size(points: int, *, area: float, most: float) -> float:
    """Return a marker size of about the distance between points on paper, so that surfaces look closed.

    Args:
        points: number of points in a panel.
        area: area of the panel's points, in the unit of the size.
        most: maximum, for few points.
    """
    return min(area / max(points, 1), most)


def by_height(points: NDArray[np.float64]) -> NDArray[np.int64]:
    """Return the order of points by height, in which higher points are drawn over lower ones."""
    return np.argsort(points[:, 2], kind="stable")


def draw_scan(
    points: NDArray[np.float64],
    class_names: Sequence[str],
    *,
    predicted: NDArray[np.int64],
    labels: NDArray[np.int64] | None = None,
) -> bytes:
    """Draw a scan from above and in perspective; with labels, also the ground truth and the errors.

    Args:
        points: metres, shape (N, 3); at most 150,000 are drawn.
        class_names: K names.
        predicted: predicted classes, shape (N,).
        labels: classes or `IGNORE`, shape (N,).

    Returns:
        A PNG file's content.

    Raises:
        UserError: if matplotlib is not installed.
    """
    require("matplotlib", extra="pointcloud")
    from matplotlib import colormaps
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    if len(points) > _MOST_POINTS:
        some = drawn_points(len(points))
        points, predicted = points[some], predicted[some]
        labels = None if labels is None else labels[some]
    points = points - points.min(axis=0)
    order = by_height(points)
    points, predicted = points[order], predicted[order]
    names = colormaps["tab10" if len(class_names) <= 10 else "tab20"]
    palette = np.array([names(number % names.N)[:3] for number in range(len(class_names))] + [_IGNORED_COLOUR])

    panels = [("prediction", palette[predicted])]
    if labels is not None:
        labels = labels[order]
        wrong = (labels != predicted) & (labels != IGNORE)
        mixed = np.where(wrong[:, None], _rgb(_WRONG), _rgb(_RIGHT))
        # IGNORE is -1, which indexes the palette's last colour.
        part = wrong.sum() / max((labels != IGNORE).sum(), 1)
        panels = [("ground truth", palette[labels]), *panels, (f"wrong ({part:.1%})", mixed)]

    figure = Figure(figsize=(5 * len(panels), 9.4), layout="constrained")
    extent = points.max(axis=0)
    size = marker_size(len(points), area=250_000, most=30)
    for column, (title, colours) in enumerate(panels):
        above = figure.add_subplot(2, len(panels), column + 1, aspect="equal", title=title)
        above.scatter(points[:, 0], points[:, 1], s=size, c=colours, linewidths=0)
        above.set_xlabel("m")
        below = figure.add_subplot(2, len(panels), len(panels) + column + 1, projection="3d")
        below.scatter(*points.T, s=size, c=colours, linewidths=0, depthshade=False)
        below.set_proj_type("persp")
        below.view_init(elev=32, azim=-60)
        below.set_box_aspect(np.maximum(extent, 0.02 * extent.max() + 1e-6), zoom=1.1)
        below.set_axis_off()
    handles = [
        Line2D([], [], marker="o", linestyle="", color=palette[number], label=name)
        for number, name in enumerate(class_names)
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=min(7, len(handles)), frameon=False)
    stream = io.BytesIO()
    figure.savefig(stream, format="png", dpi=110)
    return stream.getvalue()


def _rgb(text: str) -> NDArray[np.float64]:
    return np.array([int(text[place : place + 2], 16) / 255 for place in (1, 3, 5)])
