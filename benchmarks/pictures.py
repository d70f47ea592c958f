"""Pictures of a trained block, for docs/how-it-works.md: its assignments, and rows of its affinity.

python -m benchmarks.pictures [--steps 300]

The network is that of ``benchmarks.choices``, one block of 16 latents, trained on the key task with seed 0. Writes
``how-gather.svg`` and ``how-rows.svg`` to ``docs/static``, and ``pictures-DATE.json`` with the figures beside them.
"""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
import torch
from torch import Tensor

from benchmarks.choices import FAMILIES, SIDE, Choice, fitted, maps
from benchmarks.options import RESULTS, header, positive, program, result_stem, run, write_results
from latentgnn import capture

STATIC = RESULTS.parents[1] / "docs" / "static"
COLOURS = ("#2e86ab", "#d1495b", "#edae49", "#3a7d44")


def object_cells(x: Tensor) -> Tensor:
    """Where the objects of each family are, (`FAMILIES`, nodes)."""
    return x[FAMILIES : 2 * FAMILIES].flatten(1) > 0.5


def affinity_figures(affinity: Tensor, objects: Tensor) -> dict[str, float]:
    """The rank of an affinity, and the mean and least cosine between the rows of two objects.

    Args:
        affinity: (N, N).
        objects: the nodes that are objects, (N,).

    Example:
        >>> affinity_figures(torch.eye(3), torch.tensor([True, True, False]))
        {'rank': 2, 'nodes': 3, 'mean_cosine': 0.0, 'least_cosine': 0.0}
    """
    rows = torch.nn.functional.normalize(affinity[objects], dim=1)
    cosine = (rows @ rows.T)[~torch.eye(len(rows), dtype=torch.bool)]
    return {
        "rank": int(torch.linalg.matrix_rank(affinity)),
        "nodes": len(affinity),
        "mean_cosine": round(cosine.mean().item(), 3),
        "least_cosine": round(cosine.min().item(), 3),
    }


def draw_map(axis: Any, x: Tensor, *, faint: bool = False) -> None:
    """Draw keys as squares, filled if worth 1, and objects as discs; one colour per family."""
    keys, objects, worth = x.unflatten(0, (3, FAMILIES))
    for family, colour in enumerate(COLOURS):
        for cells, marker, size in ((keys[family] > 0.5, "s", 80), (objects[family] > 0.5, "o", 30)):
            rows, columns = cells.nonzero(as_tuple=True)
            filled = not faint and (marker == "o" or bool(worth[family][cells] > 0))
            style = {"facecolors": colour if filled else "none", "edgecolors": colour, "linewidths": 1.6}
            axis.scatter(columns.numpy(), rows.numpy(), marker=marker, s=size / 2 if faint else size, **style)


def draw(name: str, x: Tensor, panels: Sequence[tuple[str, Tensor | None, int | None]], out: Path) -> None:
    """Draw panels side by side: a title, the nodes' weights in gray, and a marked node."""
    from matplotlib import pyplot as plt

    made, axes = plt.subplots(1, len(panels), figsize=(9, 9 / len(panels) + 0.35))
    for axis, (title, weights, marked) in zip(axes, panels, strict=True):
        if weights is not None:
            axis.imshow(weights.unflatten(0, (SIDE, SIDE)).numpy(), cmap="Greys")
        draw_map(axis, x, faint=weights is not None)
        if marked is not None:
            family = int(object_cells(x)[:, marked].nonzero()[0])
            row, column = divmod(marked, SIDE)
            axis.scatter([column], [row], s=90, color=COLOURS[family], edgecolors="black", linewidths=1.5)
        edge = (-0.5, SIDE - 0.5)
        axis.set(title=title, xticks=[], yticks=[], xlim=edge, ylim=edge[::-1], aspect="equal")
    made.tight_layout(pad=0.6)
    made.savefig(out / name, metadata={"Date": None})
    plt.close(made)


def main(argv: list[str]) -> None:
    """Train, and write pictures and figures.

    Args:
        argv: command-line arguments.
    """
    parser = program("pictures", __doc__)
    parser.add_argument("--steps", type=positive, default=300, metavar="N", help="of the training (300)")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="for all of it (docs/static, benchmarks/results)")
    given = parser.parse_args(argv)
    matplotlib.use("agg")
    torch.set_num_threads(1)
    head = header("benchmarks.pictures", argv, device="cpu", dtype="float32", threads=1)
    model = fitted(Choice(title="", gamma_init=1.0), seed=0, steps=given.steps)
    with torch.no_grad():
        x, _ = maps(1, generator=torch.Generator().manual_seed(7))
        with capture(model) as seen:
            model(x)
    (kernel,) = seen[0].samples[0].kernels
    (gathered,), affinity = kernel.gather, (kernel.scatter.mT @ kernel.affinity @ kernel.gather)[0]
    objects = object_cells(x[0])
    figures = affinity_figures(affinity, objects.any(0))

    used = gathered.norm(dim=1).argsort(descending=True)[:3].tolist()
    firsts = [int(cells.nonzero()[0]) for cells in objects]
    pictures = given.out or STATIC
    with matplotlib.rc_context({"svg.hashsalt": "latentgnn", "svg.fonttype": "path", "font.size": 9}):
        gather = [(f"gather: latent {latent}", gathered[latent], None) for latent in used]
        draw("how-gather.svg", x[0], [("the map", None, None), *gather], pictures)
        rows = [(f"an object of family {i + 1}", affinity[node], node) for i, node in enumerate(firsts)]
        draw("how-rows.svg", x[0], rows, pictures)
    print(figures)
    stem = result_stem(given.out or RESULTS, "pictures", head)
    write_results(stem, {**head, "steps": given.steps, **figures})


if __name__ == "__main__":
    sys.exit(run(main))
