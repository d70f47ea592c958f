"""Pictures of what a point network's blocks do on a scan."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from latentgnn.errors import UserError, require
from latentgnn.inspection import Seen, capture
from latentgnn.tasks.explaining import Explained
from latentgnn.tasks.panels import (
    DPI,
    HEAT,
    MOST_NODES,
    NODE_COLOURS,
    QUIET,
    WIDTH,
    Latent,
    as_array,
    concentration,
    draw_graph,
    grid,
    most_used,
    png_of,
    strength,
)
from latentgnn.tasks.pointcloud.crop import Crop, Place, take_crop
from latentgnn.tasks.pointcloud.loading import TrainedSegmenter
from latentgnn.tasks.pointcloud.pictures import by_height, marker_size

_BY_ITSELF = 3  # number of nodes that are chosen if none is given
_COLUMNS = 6
_MOST_POINTS = 40_000  # maximum number of points drawn in a panel


def explain_scan(
    trained: TrainedSegmenter, path: Path, *, blocks: Sequence[str], places: Sequence[Place]
) -> Iterator[Explained]:
    """Yield pictures of what each block does on one crop of a scan, cut as in a prediction.

    Args:
        trained: the network.
        path: the scan's file.
        blocks: names of the blocks.
        places: x and y in the file's coordinates, whose nearest points are shown; the crop is taken around the first
            one. If empty, the crop with the most points, and points spread over it.

    Raises:
        UserError: if the file cannot be read, or a place is outside the scan.
    """
    scan = trained.transform.scan(path)
    low, high = scan.points[:, :2].min(axis=0), scan.points[:, :2].max(axis=0)
    outside = [place for place in places if not (np.all(low <= place) and np.all(np.array(place) <= high))]
    if outside:
        x, y = outside[0]
        raise UserError(
            f"{path}: the node {x:g},{y:g} is outside the scan, which goes from {low[0]:.2f},{low[1]:.2f} to "
            f"{high[0]:.2f},{high[1]:.2f}: --node takes x,y in the file's coordinates"
        )
    crop = take_crop(trained, scan.points, scan.features, places[:1])
    model = trained.model
    with torch.no_grad(), capture(model) as seen:
        scores = model(*crop.inputs(next(model.parameters()).device))
    classes = scores.argmax(dim=1).cpu().numpy()
    chosen = _nearest(crop.points, places) if places else choose_points(crop.points, _BY_ITSELF)
    for block in blocks:
        statistics = seen.statistics(block)
        latents = most_used(seen, block, statistics)
        level = int(block.split(".")[1])
        where = "; ".join(
            f"{number}: {x:.1f}, {y:.1f}, {z:.1f}" for number, (x, y, z) in enumerate(crop.points[chosen], 1)
        )
        yield Explained(
            block=block,
            statistics=statistics,
            picture=_draw(crop, level, seen, block, chosen[:MOST_NODES], classes, trained.class_names, latents),
            caption=f"One crop of {len(crop.points):,} points. Nodes at x, y, z: {where}",
        )


def choose_points(points: NDArray[np.float64], count: int) -> list[int]:
    """Choose points far from one another: the first near the middle, each next one farthest from those before.

    Example:
        >>> line = np.array([[0.0, 0, 0], [1, 0, 0], [2, 0, 0], [3, 0, 0], [4, 0, 0]])
        >>> choose_points(line, 3)
        [2, 0, 4]
    """
    middle = (points.min(axis=0) + points.max(axis=0)) / 2
    chosen = [int(((points - middle) ** 2).sum(axis=1).argmin())]
    distance = np.full(len(points), np.inf)
    while len(chosen) < min(count, len(points)):
        distance = np.minimum(distance, ((points - points[chosen[-1]]) ** 2).sum(axis=1))
        chosen.append(int(distance.argmax()))
    return chosen


def _nearest(points: NDArray[np.float64], places: Sequence[Place]) -> list[int]:
    """For each place, the highest of the points about nearest to it, which is what a picture from above shows there."""
    found = []
    for place in places:
        distance = np.hypot(*(points[:, :2] - place).T)
        near = np.flatnonzero(distance <= 1.5 * distance.min() + 1e-9)
        found.append(int(near[points[near, 2].argmax()]))
    return found


def _draw(
    crop: Crop,
    level: int,
    seen: Seen,
    block: str,
    nodes: Sequence[int],
    classes: NDArray[np.int64],
    class_names: Sequence[str],
    latents: Sequence[Latent],
) -> bytes:
    require("matplotlib", extra="pointcloud")
    from matplotlib import colormaps
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    fine, coarse = crop.points, crop.at_level(level)
    origin = fine.min(axis=0)
    fine, coarse = fine - origin, coarse - origin
    extent = fine.max(axis=0)
    aspect = float(np.clip(extent[1] / max(extent[0], 1e-6), 0.4, 1.6))
    columns = len(nodes) + 1
    latent_rows, latent_columns = grid(len(latents), _COLUMNS)
    heights = [
        WIDTH / columns * aspect + WIDTH / columns * 0.7 + 1.2,
        latent_rows * (WIDTH / latent_columns * aspect + 0.35) + 0.4,
        3.4,
    ]
    figure = Figure(figsize=(WIDTH, sum(heights)), dpi=DPI, layout="constrained")
    top, middle, bottom = figure.subfigures(3, 1, height_ratios=heights, squeeze=False)[:, 0]

    names = colormaps["tab10" if len(class_names) <= 10 else "tab20"]
    palette = np.array([names(number % names.N)[:3] for number in range(len(class_names))])
    colours = palette[classes]
    panels: list[tuple[str, str, NDArray[Any], NDArray[Any]]] = [
        ("classes, from above", "in perspective", colours, colours)
    ]
    for number, node in enumerate(nodes, 1):
        at_block = _node_at(coarse, fine[node])
        row = as_array(seen.row(block, at_block))
        panels.append(
            (
                f"node {number}",
                concentration(row),
                _heat(crop.to_finest(row, level)),
                _heat(row),
            )
        )
    for index, (above_title, below_title, at_fine, at_coarse) in enumerate(panels):
        above = top.add_subplot(2, columns, index + 1)
        _from_above(above, fine, at_fine, above_title)
        points = fine if index == 0 else coarse
        below = top.add_subplot(2, columns, columns + index + 1, projection="3d")
        _perspective(below, points, at_coarse, below_title, extent)
        for number, node in enumerate(nodes):
            if index in (0, number + 1):
                _mark(above, fine[node], NODE_COLOURS[number], str(number + 1))
                x, y, z = fine[node]
                below.plot([x], [y], [z], marker="o", markersize=7, color=NODE_COLOURS[number], mec="black", zorder=10)
    handles = [
        Line2D([], [], marker="o", linestyle="", color=palette[number], label=name)
        for number, name in enumerate(class_names)
        if (classes == number).any()
    ]
    top.legend(handles=handles, loc="outside lower center", ncols=min(8, len(handles)), frameon=False, fontsize=8)
    top.suptitle(
        f"{block}: what a node takes in, at the crop's {len(fine):,} points and, below, at the block's {len(coarse):,}",
        fontsize=11,
    )

    axes = middle.subplots(latent_rows, latent_columns, squeeze=False).ravel()
    for target, latent in zip(axes, latents, strict=False):
        _from_above(target, coarse, _heat(latent.weights), latent.title)
    for target in axes[len(latents) :]:
        target.set_axis_off()
    middle.suptitle("where the most used latents gather from, seen from above, with their share of all", fontsize=11)
    draw_graph(bottom, seen, block, seen.statistics(block))
    return png_of(figure)


def _node_at(points: NDArray[np.float64], place: NDArray[np.float64]) -> int:
    return int(((points - place) ** 2).sum(axis=1).argmin())


def _heat(values: NDArray[np.float32]) -> NDArray[np.float64]:
    from matplotlib import colormaps

    colours: NDArray[np.float64] = colormaps[HEAT](0.08 + 0.92 * strength(values))[:, :3]
    return colours


def _from_above(axes: Any, points: NDArray[np.float64], colours: NDArray[np.float64], title: str) -> None:
    points, colours = _some(points, colours)
    order = by_height(points)
    axes.scatter(points[order, 0], points[order, 1], s=_size(len(points)), c=colours[order], linewidths=0)
    axes.set_aspect("equal")
    axes.set_title(title, fontsize=9, color=QUIET)
    axes.set_xticks([])
    axes.set_yticks([])
    axes.set_facecolor("#e9ebee")


def _perspective(
    axes: Any, points: NDArray[np.float64], colours: NDArray[np.float64], title: str, extent: NDArray[np.float64]
) -> None:
    points, colours = _some(points, colours)
    axes.scatter(*points.T, s=_size(len(points)), c=colours, linewidths=0, depthshade=False)
    axes.set_proj_type("persp")
    axes.view_init(elev=32, azim=-60)
    axes.set_box_aspect(np.maximum(extent, 0.02 * extent.max() + 1e-6), zoom=1.1)
    axes.set_axis_off()
    axes.set_title(title, fontsize=9, color=QUIET)


def _some(points: NDArray[np.float64], colours: NDArray[np.float64]) -> tuple[NDArray[Any], NDArray[Any]]:
    if len(points) <= _MOST_POINTS:
        return points, colours
    some = np.linspace(0, len(points) - 1, _MOST_POINTS).astype(np.int64)
    return points[some], colours[some]


def _size(points: int) -> float:
    return marker_size(points, area=40_000, most=26)


def _mark(axes: Any, point: NDArray[np.float64], colour: str, text: str) -> None:
    axes.plot([point[0]], [point[1]], marker="o", markersize=7, markerfacecolor=colour, markeredgecolor="black")
    axes.annotate(
        text,
        (point[0], point[1]),
        xytext=(6, 5),
        textcoords="offset points",
        fontsize=9,
        weight="bold",
        bbox={"boxstyle": "round,pad=0.15", "facecolor": colour, "linewidth": 0},
    )
