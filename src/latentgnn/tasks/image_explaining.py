"""Pictures of what a network's blocks do on an image, for any task."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from latentgnn.errors import UserError, require
from latentgnn.inspection import Seen
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

Place = tuple[float, float]
"""Column and row of a pixel of the image, from its upper left corner."""

_BY_ITSELF = 4  # number of nodes that are chosen if none is given
_COLUMNS = 6
_LONGEST = 900  # maximum side in pixels of the picture's image panels


class Frame(NamedTuple):
    """How an image is placed in the batch that a network makes of it.

    Args:
        width: width of the image.
        height: height of the image.
        resized: height and width that it is resized to.
        padded: height and width of the batch.
    """

    width: int
    height: int
    resized: tuple[int, int]
    padded: tuple[int, int]

    def node(self, place: Place, shape: tuple[int, ...]) -> tuple[int, int]:
        """Return row and column of the node in a map of this shape that contains a pixel."""
        steps = zip((place[1] / self.height, place[0] / self.width), self.resized, self.padded, shape, strict=True)
        row, column = (
            min(int(part * resized / padded * size), size - 1, -(-resized * size // padded) - 1)
            for part, resized, padded, size in steps
        )
        return row, column

    def inside(self, shape: tuple[int, ...]) -> tuple[int, int]:
        """Return how many rows and columns of a map of this shape the image covers."""
        rows, columns = (
            max(1, min(size, -(-resized * size // padded)))
            for resized, padded, size in zip(self.resized, self.padded, shape, strict=True)
        )
        return rows, columns

    def over_image(self, values: Tensor, size: tuple[int, int]) -> NDArray[np.float32]:
        """Resize a map, (h, w), to the image's extent, shown at (height, width)."""
        fine = F.interpolate(values.float()[None, None], size=self.padded, mode="bilinear", align_corners=False)
        own = fine[..., : self.resized[0], : self.resized[1]]
        return as_array(F.interpolate(own, size=size, mode="bilinear", align_corners=False)[0, 0])


def refuse_outside(path: Path, image: Image.Image, places: Sequence[Place]) -> None:
    """Refuse places outside the image.

    Raises:
        UserError: if a place is outside.
    """
    for x, y in places:
        if not (0 <= x < image.width and 0 <= y < image.height):
            raise UserError(
                f"{path}: the node {x:g},{y:g} is outside the image, which is {image.width} x {image.height} pixels: "
                "--node takes column,row from the upper left corner"
            )


def explain_maps(
    path: Path,
    image: Image.Image,
    frame: Frame,
    seen: Seen,
    *,
    blocks: Sequence[str],
    places: Sequence[Place],
    objects: Sequence[tuple[list[float], str]] = (),
) -> Iterator[Explained]:
    """Yield pictures of what each block did on an image.

    Args:
        path: path of the image, for errors.
        image: the original image.
        frame: how it was placed in the network's input.
        seen: what the blocks did.
        blocks: names of the blocks.
        places: pixels whose nodes are shown.
        objects: boxes (x1, y1, x2, y2) and names to draw on the image.

    Raises:
        UserError: if a block has not run.
    """
    where = ", ".join(f"{number}: {x:.0f}, {y:.0f}" for number, (x, y) in enumerate(places, 1))
    for block in blocks:
        if block not in seen:
            raise UserError(f"{path}: the block {block} has not run on this image")
        statistics = seen.statistics(block)
        yield Explained(
            block=block,
            statistics=statistics,
            picture=_draw(image, frame, seen, block, places[:MOST_NODES], objects, most_used(seen, block, statistics)),
            caption=f"Nodes at column, row: {where}",
        )


def choose_places(middles: Sequence[Place], size: tuple[int, int]) -> list[Place]:
    """Choose the centres of objects that are not close together, then places spread over the image.

    Args:
        middles: centres of objects, highest scores first; may be empty.
        size: width and height of the image.

    Example:
        >>> choose_places([(10.0, 10.0), (12.0, 12.0), (70.0, 50.0)], (100, 80))[:2]
        [(10.0, 10.0), (70.0, 50.0)]
    """
    width, height = size
    spread = [(width * x, height * y) for x, y in ((0.5, 0.5), (0.1, 0.1), (0.9, 0.9), (0.9, 0.1), (0.1, 0.9))]
    chosen: list[Place] = []
    for x, y in [*middles[: 20 * _BY_ITSELF], *spread]:
        x, y = min(max(x, 0.0), width - 1.0), min(max(y, 0.0), height - 1.0)
        apart = all(abs(x - a) / width + abs(y - b) / height > 0.15 for a, b in chosen)
        if apart and len(chosen) < _BY_ITSELF:
            chosen.append((x, y))
    return chosen


def _draw(
    image: Image.Image,
    frame: Frame,
    seen: Seen,
    block: str,
    places: Sequence[Place],
    objects: Sequence[tuple[list[float], str]],
    latents: Sequence[Latent],
) -> bytes:
    require("matplotlib", extra="viz")
    from matplotlib.figure import Figure

    shape = seen.sample(block).shape
    rows, columns = frame.inside(shape)
    small = image.copy()
    small.thumbnail((_LONGEST, _LONGEST))
    if max(small.size) < 300:
        small = small.resize((small.width * 3, small.height * 3), Image.Resampling.BICUBIC)
    factor = small.width / image.width
    gray = np.asarray(small.convert("L").convert("RGB"), np.float32) / 255
    aspect = image.height / image.width
    panel = WIDTH / (len(places) + 1)
    latent_rows, latent_columns = grid(len(latents), _COLUMNS)
    heights = [2 * panel * aspect + 0.9, latent_rows * (WIDTH / latent_columns * aspect + 0.3) + 0.3, 3.4]
    figure = Figure(figsize=(WIDTH, sum(heights)), dpi=DPI, layout="constrained")
    top, middle, bottom = figure.subfigures(3, 1, height_ratios=heights, squeeze=False)[:, 0]

    axes = top.subplots(2, len(places) + 1, squeeze=False)
    _show(axes[0, 0], np.asarray(small), "the image and the nodes")
    for box, label in objects:
        _box(axes[0, 0], [value * factor for value in box], label)
    reader = _strongest_reader(seen, block, rows, columns)
    axes[1, 0].imshow(reader, cmap="tab20", vmin=0, vmax=19, interpolation="nearest", extent=(0, columns, rows, 0))
    _bare(axes[1, 0], "the latent read most")
    for index, (place, colour) in enumerate(zip(places, NODE_COLOURS, strict=False)):
        node = frame.node(place, shape)
        row = seen.row(block, node)
        fine = strength(frame.over_image(row, (small.height, small.width)))[..., None]
        heat = _coloured(fine[..., 0])
        coarse = as_array(row)[:rows, :columns]
        _show(axes[0, index + 1], 0.45 * gray * (1 - fine) + heat * (0.25 + 0.75 * fine), f"node {index + 1}")
        axes[1, index + 1].imshow(
            strength(coarse), cmap=HEAT, vmin=0, vmax=1, interpolation="nearest", extent=(0, columns, rows, 0)
        )
        _bare(axes[1, index + 1], concentration(coarse))
        x, y = place[0] * factor, place[1] * factor
        for target in (axes[0, 0], axes[0, index + 1]):
            _mark(target, x, y, colour, str(index + 1))
        _mark(axes[1, index + 1], node[1] + 0.5, node[0] + 0.5, colour, "")
    title = f"{block}: what a node takes in, over the image and at the block's {rows} x {columns} nodes"
    top.suptitle(title, fontsize=11)

    axes = middle.subplots(latent_rows, latent_columns, squeeze=False).ravel()
    for target, latent in zip(axes, latents, strict=False):
        values = latent.weights[:rows, :columns]
        target.imshow(strength(values), cmap=HEAT, vmin=0, vmax=1, interpolation="nearest")
        _bare(target, latent.title)
    for target in axes[len(latents) :]:
        target.set_axis_off()
    middle.suptitle("where the most used latents gather from, with their share of all", fontsize=11)
    draw_graph(bottom, seen, block, seen.statistics(block))
    return png_of(figure)


def _strongest_reader(seen: Seen, block: str, rows: int, columns: int) -> NDArray[np.float32]:
    """For each node, the latent with the largest scatter assignment (first kernel and group), as a colour."""
    sample = seen.sample(block)
    strongest = sample.kernels[0].scatter[0].argmax(dim=0).reshape(sample.shape)
    # Consecutive latents get colours that are far apart.
    return as_array(strongest[:rows, :columns] * 7 % 20)


def _coloured(values: NDArray[np.float32]) -> NDArray[np.float32]:
    from matplotlib import colormaps

    colours: NDArray[np.float32] = colormaps[HEAT](values)[..., :3].astype(np.float32)
    return colours


def _show(axes: Any, picture: NDArray[Any], title: str) -> None:
    axes.imshow(np.clip(picture, 0, 255 if picture.dtype == np.uint8 else 1))
    _bare(axes, title)


def _bare(axes: Any, title: str) -> None:
    axes.set_title(title, fontsize=9, color=QUIET)
    axes.set_xticks([])
    axes.set_yticks([])


def _mark(axes: Any, x: float, y: float, colour: str, text: str) -> None:
    axes.plot([x], [y], marker="o", markersize=7, markerfacecolor=colour, markeredgecolor="black", markeredgewidth=1.2)
    if text:
        axes.annotate(
            text,
            (x, y),
            xytext=(6, 5),
            textcoords="offset points",
            fontsize=9,
            weight="bold",
            color="black",
            bbox={"boxstyle": "round,pad=0.15", "facecolor": colour, "linewidth": 0},
        )


def _box(axes: Any, box: Sequence[float], label: str) -> None:
    from matplotlib.patches import Rectangle

    x1, y1, x2, y2 = box
    axes.add_patch(Rectangle((x1, y1), x2 - x1, y2 - y1, fill=False, edgecolor="white", linewidth=1))
    axes.text(x1, y1, label, fontsize=6, color="black", backgroundcolor=(1, 1, 1, 0.7), va="bottom", clip_on=True)
