"""Figures of affinities and latents, over maps, volumes, sequences and points."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from latentgnn.errors import require

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Array = NDArray[Any]

COLOURS = "viridis"
_MARK: dict[str, Any] = {
    "marker": "o",
    "markersize": 9,
    "markerfacecolor": "none",
    "markeredgecolor": "red",
    "markeredgewidth": 2,
}
_MOST_POINTS = 100_000
_COLUMNS = 4


def line_figure(
    weights: Tensor,
    place: Sequence[int],
    mask: Tensor | None,
    *,
    title: str,
    image: Tensor | ArrayLike | None,
    points: Tensor | ArrayLike | None,
) -> "Figure":
    """Return a figure of one row or column of an affinity.

    Args:
        weights: the weights, in the shape of the nodes.
        place: position of the node whose row it is.
        mask: nodes that took part, flattened; the others are left blank.
        title: title above the figure.
        image: image shown beneath a map.
        points: coordinates of points.
    """
    figure = _figure()
    values = _blanked(weights, mask)
    if points is not None:
        where = _points(points, values.size)
        figure.set_size_inches(12, 5.5)
        _scatter(figure, [(values.ravel(), "")], where, mark=place[0])
    elif values.ndim == 1:
        figure.set_size_inches(9, 3.5)
        axes = figure.add_subplot(xlabel="node", ylabel="weight")
        axes.plot(values, linewidth=1)
        axes.axvline(place[0], color="red", linewidth=1)
    elif values.ndim == 2:
        panels: list[tuple[str, Array | None]] = [("weights", None)]
        if image is not None:
            panels.append(("over the input", _picture(image)))
        figure.set_size_inches(6 * len(panels), 5)
        for number, (name, picture) in enumerate(panels):
            axes = figure.add_subplot(1, len(panels), number + 1, title=name)
            shown = _map(axes, values, picture)
            axes.plot(place[1] + 0.5, place[0] + 0.5, **_MARK)
        figure.colorbar(shown, ax=figure.axes, label="weight")
    else:
        figure.set_size_inches(15, 4.5)
        for axis in range(3):
            others = [other for other in range(3) if other != axis]
            axes = figure.add_subplot(1, 3, axis + 1, title=f"through {place[axis]} of dimension {axis}")
            shown = _map(axes, values.take(place[axis], axis), None, most=float(np.nanmax(values)))
            axes.plot(place[others[1]] + 0.5, place[others[0]] + 0.5, **_MARK)
        figure.colorbar(shown, ax=figure.axes, label="weight")
    figure.suptitle(title)
    return figure


def latents_figure(
    assignments: Tensor,
    shape: Sequence[int],
    mask: Tensor | None,
    names: Mapping[int, str],
    *,
    title: str,
    image: Tensor | ArrayLike | None,
    points: Tensor | ArrayLike | None,
) -> "Figure":
    """Return a figure of all nodes' assignments to some latents, with one panel and colour range per latent.

    Args:
        assignments: (D, N).
        shape: shape of the nodes.
        mask: nodes that took part, flattened; the others are left blank.
        names: titles of the panels by latent, in order.
        title: title above the figure.
        image: image shown beneath maps.
        points: coordinates of points.
    """
    figure = _figure()
    panels = [(_blanked(assignments[latent].view(*shape), mask), name) for latent, name in names.items()]
    columns = min(_COLUMNS, len(panels))
    rows = -(-len(panels) // columns)
    if points is not None:
        where = _points(points, panels[0][0].size)
        figure.set_size_inches(4 * len(panels), 6.5)
        _scatter(figure, [(values.ravel(), name) for values, name in panels], where, mark=None)
        figure.suptitle(title)
        return figure
    figure.set_size_inches(3.2 * columns, 2.9 * rows + 0.5)
    picture = None if image is None else _picture(image)
    for number, (values, name) in enumerate(panels):
        axes = figure.add_subplot(rows, columns, number + 1)
        axes.set_title(name, fontsize=9)
        if values.ndim == 1:
            axes.plot(values, linewidth=1)
        else:
            # For a volume, show the largest weight along its first dimension.
            flat = values if values.ndim == 2 else np.fmax.reduce(values, axis=0)
            _map(axes, flat, picture if values.ndim == 2 else None)
    figure.suptitle(title)
    return figure


def _figure() -> "Figure":
    require("matplotlib", extra="viz")
    from matplotlib.figure import Figure

    # Not created by pyplot, which keeps every figure until it is closed.
    return Figure(layout="constrained")


def _map(axes: Any, values: Array, picture: Array | None, most: float | None = None) -> Any:
    height, width = values.shape
    extent = (0, width, height, 0)
    if picture is not None:
        axes.imshow(picture, extent=extent, interpolation="bilinear")
    most = float(np.nanmax(values, initial=0)) if most is None else most
    shown = axes.imshow(
        values,
        extent=extent,
        cmap=COLOURS,
        vmin=0,
        vmax=most or 1,
        alpha=None if picture is None else 0.6,
        interpolation="nearest",
    )
    axes.set_xticks([])
    axes.set_yticks([])
    return shown


def _scatter(figure: Any, panels: Sequence[tuple[Array, str]], points: Array, *, mark: int | None) -> None:
    """Draw points from above and, if they have heights, in perspective; higher points are drawn over lower ones."""
    some = np.linspace(0, len(points) - 1, min(len(points), _MOST_POINTS)).astype(np.int64)
    order = some[np.argsort(points[some, -1], kind="stable")] if points.shape[1] == 3 else some
    size = float(np.clip(100_000 / max(len(points), 1), 0.5, 30))
    views = points.shape[1] - 1
    beside = len(panels) == 1
    rows, columns = (1, views) if beside else (views, len(panels))
    for number, (values, name) in enumerate(panels):
        most = float(np.nanmax(values, initial=0)) or 1
        colours = {"c": values[order], "cmap": COLOURS, "vmin": 0, "vmax": most, "s": size, "linewidths": 0}
        above = figure.add_subplot(rows, columns, number + 1, aspect="equal")
        above.set_title(name or "from above", fontsize=9)
        shown = above.scatter(points[order, 0], points[order, 1], **colours)
        if mark is not None:
            above.plot(*points[mark, :2], **_MARK)
        if views == 2:
            # The mark is drawn over all points, wherever it is in space.
            place = 2 if beside else len(panels) + number + 1
            solid = figure.add_subplot(rows, columns, place, projection="3d", computed_zorder=False)
            solid.scatter(*points[order].T, depthshade=False, **colours)
            if mark is not None:
                solid.plot(*points[mark : mark + 1].T, **_MARK)
            solid.set_proj_type("persp")
            solid.view_init(elev=32, azim=-60)
            extent = np.ptp(points, axis=0)
            solid.set_box_aspect(np.maximum(extent, 0.02 * extent.max() + 1e-6), zoom=1.1)
            solid.set_axis_off()
        if beside:
            figure.colorbar(shown, ax=figure.axes, label="weight")


def _blanked(weights: Tensor, mask: Tensor | None) -> Array:
    """Return weights as float64, with NaN where a node took no part."""
    values = weights.detach().double().cpu().clone()
    if mask is not None:
        values[~mask.cpu().view(values.shape)] = float("nan")
    return values.numpy()


def _points(points: Tensor | ArrayLike, count: int) -> Array:
    found = _array(points).astype(np.float64)
    if found.ndim != 2 or len(found) != count or found.shape[1] not in (2, 3):
        raise ValueError(
            f"points must be the coordinates of this sample's {count} nodes, ({count}, 2) or ({count}, 3); got "
            f"{found.shape}"
        )
    return found


def _picture(image: Tensor | ArrayLike) -> Array:
    """Return an image as (H, W, 3) in 0..1, however it was normalised."""
    found = _array(image).astype(np.float64)
    if found.ndim == 2:
        found = found[None]
    if found.ndim == 3 and found.shape[0] in (1, 3):
        found = found.transpose(1, 2, 0)
    if found.ndim != 3 or found.shape[2] not in (1, 3):
        raise ValueError(f"the image must be (H, W), (C, H, W) or (H, W, C) with 1 or 3 channels; got {found.shape}")
    low, high = found.min(), found.max()
    return np.broadcast_to((found - low) / (high - low if high > low else 1), (*found.shape[:2], 3))


def _array(values: Tensor | ArrayLike) -> Array:
    return values.detach().cpu().numpy() if isinstance(values, torch.Tensor) else np.asarray(values)
