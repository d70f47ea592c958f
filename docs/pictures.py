"""Make the pictures of docs/how-it-works.md from a trained block: ``python docs/pictures.py``, ten seconds.

The network is that of ``benchmarks.choices``, one block of 16 latents, trained for 300 steps on its key task.
"""

from pathlib import Path

import matplotlib
import torch
from torch import Tensor, nn

from benchmarks.choices import FAMILIES, SIDE, Choice, fitted, maps
from latentgnn import LatentGNN, reference

HERE = Path(__file__).parent / "static"
COLOURS = ("#2e86ab", "#d1495b", "#edae49", "#3a7d44")


def input_of(model: nn.Sequential, x: Tensor) -> tuple[LatentGNN, Tensor]:
    """The block of a network, and what it is given for an input."""
    seen: list[Tensor] = []
    block = next(module for module in model.modules() if isinstance(module, LatentGNN))
    handle = block.register_forward_hook(lambda block, inputs, output: seen.append(inputs[0]))
    model(x)
    handle.remove()
    return block, seen[0]


def draw_map(axis: object, x: Tensor, *, faint: bool = False) -> None:
    """Keys as squares, filled where they are worth 1, and objects as discs, one colour a family."""
    keys, objects, worth = x.unflatten(0, (3, FAMILIES))
    for family, colour in enumerate(COLOURS):
        for marks, marker, size in ((keys[family] > 0.5, "s", 80), (objects[family] > 0.5, "o", 30)):
            rows, columns = marks.nonzero(as_tuple=True)
            filled = marker == "o" or bool(worth[family][keys[family] > 0.5] > 0)
            axis.scatter(  # type: ignore[attr-defined]
                columns,
                rows,
                marker=marker,
                s=size * (0.5 if faint else 1),
                facecolors=colour if filled and not faint else "none",
                edgecolors=colour,
                linewidths=1.6,
            )


def main() -> None:
    """Write the pictures, and print how different the rows of the affinity are."""
    matplotlib.use("agg")
    matplotlib.rcParams.update({"svg.hashsalt": "latentgnn", "svg.fonttype": "path", "font.size": 9})
    from matplotlib import pyplot as plt

    torch.set_num_threads(1)
    model = fitted(Choice(title="", gamma_init=1.0), seed=0, steps=300)
    with torch.no_grad():
        x, _ = maps(1, generator=torch.Generator().manual_seed(7))
        block, given = input_of(model, x)
        affinity = reference.dense_affinity(block, given)[0, 0, 0]
        gathered = reference._steps(block, given.flatten(2))[0][0][0]
        rows = affinity / affinity.norm(dim=1, keepdim=True).clamp_min(1e-12)
        rank = torch.linalg.matrix_rank(affinity).item()
        objects = x[0, FAMILIES : 2 * FAMILIES] > 0.5

        def figure(count: int, width: float) -> tuple[object, list[object]]:
            made, axes = plt.subplots(1, count, figsize=(width, width / count + 0.35), squeeze=False)
            for axis in axes[0]:
                axis.set(xticks=[], yticks=[], xlim=(-0.5, SIDE - 0.5), ylim=(SIDE - 0.5, -0.5), aspect="equal")
            return made, list(axes[0])

        def save(made: object, name: str) -> None:
            made.tight_layout(pad=0.6)  # type: ignore[attr-defined]
            made.savefig(HERE / name, metadata={"Date": None})  # type: ignore[attr-defined]
            plt.close(made)  # type: ignore[arg-type]

        made, axes = figure(4, 9)
        draw_map(axes[0], x[0])
        axes[0].set_title("the map")
        strongest = gathered.norm(dim=1).argsort(descending=True)[:3]
        for axis, latent in zip(axes[1:], strongest, strict=True):
            axis.imshow(gathered[latent].unflatten(0, (SIDE, SIDE)), cmap="Greys")
            draw_map(axis, x[0], faint=True)
            axis.set_title(f"gather: latent {latent.item()}")
        save(made, "how-gather.svg")

        made, axes = figure(4, 9)
        for family, axis in enumerate(axes):
            row, column = (index[0].item() for index in objects[family].nonzero(as_tuple=True))
            axis.imshow(affinity[row * SIDE + column].unflatten(0, (SIDE, SIDE)), cmap="Greys")
            draw_map(axis, x[0], faint=True)
            axis.scatter([column], [row], marker="o", s=90, color=COLOURS[family], edgecolors="black", linewidths=1.5)
            axis.set_title(f"an object of family {family + 1}")
        save(made, "how-rows.svg")

        everywhere = objects.flatten(1).any(0)
        cosine = rows[everywhere] @ rows[everywhere].T
        other = cosine[~torch.eye(len(cosine), dtype=torch.bool)]
    print(f"rank {rank} of {len(affinity)}; cosine between rows of objects {other.mean():.2f}, least {other.min():.2f}")


if __name__ == "__main__":
    main()
