"""The effect of a block's options: latents, norm, initial gamma, learning rates, weight decay, and place.

python -m benchmarks.choices [--groups latents,norm] [--seeds 3] [--steps 300]

The task is made on the fly, and needs far context: a map of 12 x 12 cells holds a key of each of four families, worth
0 or 1, and four objects of each family, all in places drawn at random. Every object must say what its family's key is
worth. A network of three convolutions sees only three cells around an object, so without a block it does little better
than guessing, 0.5. In the group ``local``, the object's own cell has a copy of the key, and no context is needed.

Prints the tables, and writes ``choices-DATE.json`` and ``.md``; later groups of the same day are added to them.
"""

import json
import statistics
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.options import header, names_from, positive, program, result_stem, run, save_results, write_results
from benchmarks.report import header_block, markdown_table, mean_and_range
from benchmarks.study_rates import grouped
from latentgnn import FrozenBatchNorm, LatentGNN, insert, norms
from latentgnn.norms import NormFactory

FAMILIES, OBJECTS, SIDE, WIDTH = 4, 4, 12, 64
# Maps per training step.
BATCH = 16


@dataclass(frozen=True, kw_only=True)
class Choice:
    """One training.

    Args:
        title: of its row.
        latents: of the block; ``None`` for no block.
        norm: norm of the block.
        gamma_init: initial gamma.
        optimizer: optimizer of all parameters.
        rate: learning rate of the network.
        block_factor: multiplies the rate for the block.
        gamma_factor: multiplies the rate for gamma; by default, as ``block_factor``.
        decay: weight decay of the network and the block.
        gamma_decay: weight decay of gamma; by default, ``decay``.
        after: the layers that a block follows, counted from 0.
        local: the key is in the object's own cell.
    """

    title: str
    latents: int | None = 16
    norm: NormFactory | str = "batch_norm"
    gamma_init: float = 0.0
    optimizer: Literal["adamw", "sgd"] = "adamw"
    rate: float = 4e-3
    block_factor: float = 1.0
    gamma_factor: float | None = None
    decay: float = 1e-4
    gamma_decay: float | None = None
    after: tuple[int, ...] = (1,)
    local: bool = False


def _norms() -> dict[str, NormFactory | str]:
    frozen: NormFactory = FrozenBatchNorm
    return {
        "batch norm (the default)": "batch_norm",
        "frozen batch norm": frozen,
        "group norm": norms.group_norm,
        "layer norm": "layer_norm",
        "none": "none",
    }


GROUPS: dict[str, list[Choice]] = {
    "latents": [
        Choice(title="no block", latents=None),
        *(Choice(title=f"{count}", latents=count, gamma_init=1.0) for count in (1, 2, 4, 8, 16, 32, 64)),
    ],
    "norm": [Choice(title=title, norm=norm, gamma_init=1.0) for title, norm in _norms().items()],
    "gamma": [Choice(title=f"gamma starts at {start:g}", gamma_init=start) for start in (0.0, 0.1, 1.0)],
    "rate": [
        *(
            Choice(title=f"AdamW, the block at {factor:g} times 0.004", block_factor=factor)
            for factor in (0.1, 1.0, 5.0)
        ),
        *(
            Choice(title=f"SGD, the block at {factor:g} times 0.1", optimizer="sgd", rate=0.1, block_factor=factor)
            for factor in (0.1, 1.0, 5.0)
        ),
        Choice(title="SGD, gamma alone at 10 times 0.1", optimizer="sgd", rate=0.1, gamma_factor=10.0),
    ],
    "decay": [
        *(
            Choice(title=f"AdamW, weight decay {decay:g}, {words}", decay=decay, gamma_decay=of_gamma)
            for decay, of_gamma, words in (
                (1e-4, None, "gamma too"),
                (0.05, None, "gamma too"),
                (0.05, 0.0, "gamma without"),
                (0.5, None, "gamma too"),
                (0.5, 0.0, "gamma without"),
            )
        ),
    ],
    "place": [
        Choice(title="after the first convolution", after=(0,), gamma_init=1.0),
        Choice(title="after the second", after=(1,), gamma_init=1.0),
        Choice(title="after the third", after=(2,), gamma_init=1.0),
        Choice(title="after all three", after=(0, 1, 2), gamma_init=1.0),
    ],
    "local": [
        Choice(title="no block", latents=None, local=True),
        Choice(title="16 latents", local=True),
        Choice(title="16 latents, the block at 5 times the rate", block_factor=5.0, local=True),
    ],
}


def maps(count: int, *, generator: torch.Generator, local: bool = False) -> tuple[Tensor, Tensor]:
    """Maps, and the class of each cell, -1 where there is no object.

    Args:
        count: of maps.
        generator: source of all random numbers.
        local: the key is in the object's own cell.

    Returns:
        (count, 3 * `FAMILIES`, `SIDE`, `SIDE`): for each family a channel that says "key", one that says "object" and
        one that says what the key is worth, all with a little noise; and (count, `SIDE`, `SIDE`).
    """
    cells = FAMILIES * (1 + OBJECTS)
    places = torch.rand(count, SIDE * SIDE, generator=generator).argsort(1)[:, :cells].unflatten(1, (FAMILIES, -1))
    worth = torch.randint(2, (count, FAMILIES), generator=generator)
    x = 0.1 * torch.randn(count, 3, FAMILIES, SIDE * SIDE, generator=generator)
    said = torch.full((count, SIDE * SIDE), -1)
    for family in range(FAMILIES):
        key, objects = places[:, family, :1], places[:, family, 1:]
        signed = (2.0 * worth[:, family] - 1)[:, None]
        x[:, 0, family].scatter_(1, key, 1.0)
        x[:, 1, family].scatter_(1, objects, 1.0)
        x[:, 2, family].scatter_(1, key, signed)
        if local:
            x[:, 2, family].scatter_(1, objects, signed.expand(-1, OBJECTS))
        said.scatter_(1, objects, worth[:, family, None].expand(-1, OBJECTS))
    return x.reshape(count, 3 * FAMILIES, SIDE, SIDE), said.reshape(count, SIDE, SIDE)


def network(choice: Choice) -> nn.Sequential:
    """Three convolutions and a classifier of every cell, with the blocks of a choice."""
    layers = [
        nn.Sequential(nn.Conv2d(width, WIDTH, 3, padding=1, bias=False), nn.BatchNorm2d(WIDTH), nn.ReLU())
        for width in (3 * FAMILIES, WIDTH, WIDTH)
    ]
    model = nn.Sequential(*layers, nn.Conv2d(WIDTH, 2, 1))
    if choice.latents is not None:
        places = [str(layer) for layer in choice.after]
        insert(model, places, num_latents=choice.latents, norm=choice.norm, gamma_init=choice.gamma_init)
    return model


def groups_of(model: nn.Module, choice: Choice) -> list[dict[str, Any]]:
    """A network's parameters with the rates and the weight decay of a choice, for an optimizer of torch."""
    gamma_factor = choice.block_factor if choice.gamma_factor is None else choice.gamma_factor
    gamma_decay = choice.decay if choice.gamma_decay is None else choice.gamma_decay

    def settings(name: str) -> dict[str, float]:
        if name.endswith(".gamma"):
            return {"lr": choice.rate * gamma_factor, "weight_decay": gamma_decay}
        factor = choice.block_factor if ".latentgnn." in name else 1.0
        return {"lr": choice.rate * factor, "weight_decay": choice.decay}

    return grouped(model, settings)


def fitted(choice: Choice, *, seed: int, steps: int) -> nn.Sequential:
    """Train one network, and return it in evaluation mode.

    Args:
        choice: how.
        seed: of the network and the maps.
        steps: of training; the rate falls to 0 along half a cosine.
    """
    torch.manual_seed(seed)
    model = network(choice)
    groups = groups_of(model, choice)
    optimizer: torch.optim.Optimizer = (
        torch.optim.AdamW(groups) if choice.optimizer == "adamw" else torch.optim.SGD(groups, momentum=0.9)
    )
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        x, said = maps(BATCH, generator=generator, local=choice.local)
        loss = F.cross_entropy(model(x), said, ignore_index=-1)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return model.eval()


def train(choice: Choice, *, seed: int, steps: int) -> dict[str, Any]:
    """Train one network, and score it on maps that it has not seen.

    Args:
        choice: how.
        seed: of the network and the maps.
        steps: of training.

    Returns:
        ``accuracy`` over the objects, ``gamma`` of every block, and ``change``: the length of what a block adds to a
        cell over the length of its input, averaged over the cells.
    """
    model = fitted(choice, seed=seed, steps=steps)
    changes: list[float] = []

    def measure(block: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        changes.append(((output - inputs[0]).norm(dim=1) / inputs[0].norm(dim=1).clamp_min(1e-6)).mean().item())

    blocks = [module for module in model.modules() if isinstance(module, LatentGNN)]
    for block in blocks:
        block.register_forward_hook(measure)
    with torch.no_grad():
        x, said = maps(256, generator=torch.Generator().manual_seed(1000 + seed), local=choice.local)
        right = (model(x).argmax(1) == said)[said >= 0].double().mean().item()
    return {
        "seed": seed,
        "accuracy": round(right, 4),
        "gamma": [round(block.gamma.item(), 4) for block in blocks],
        "change": [round(change, 3) for change in changes],
    }


def table(group: str, rows: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    """A group's means over the seeds, with minimum and maximum, as a Markdown table."""
    lines = []
    for title, runs in rows.items():
        cells = [title, mean_and_range([one["accuracy"] for one in runs])]
        for name in ("gamma", "change"):
            columns = list(zip(*(run[name] for run in runs), strict=True))
            cells.append(", ".join(f"{statistics.mean(map(abs, column)):.2f}" for column in columns))
        lines.append(cells)
    return markdown_table([group, "accuracy", "gamma", "change"], lines)


def measure(groups: Iterable[str], *, seeds: Sequence[int], steps: int) -> dict[str, dict[str, list[dict[str, Any]]]]:
    """Every training of some groups: of each group, the runs of each row."""
    return {
        group: {choice.title: [train(choice, seed=seed, steps=steps) for seed in seeds] for choice in GROUPS[group]}
        for group in groups
    }


def main(argv: list[str]) -> None:
    """Measure, and write the result files.

    Args:
        argv: command-line arguments.
    """
    parser = program("choices", __doc__, out=True)
    parser.add_argument("--groups", type=names_from(GROUPS), default=list(GROUPS), metavar="NAME,NAME", help="(all)")
    parser.add_argument("--seeds", type=positive, default=3, metavar="N", help="how many (3)")
    parser.add_argument("--steps", type=positive, default=300, metavar="N", help="of each training (300)")
    parser.add_argument("--threads", type=positive, default=1, metavar="N", help="of torch (1)")
    given = parser.parse_args(argv)
    torch.set_num_threads(given.threads)
    head = header("benchmarks.choices", argv, device="cpu", dtype="float32", threads=given.threads)
    stem = result_stem(given.out, "choices", head)
    path = stem.with_name(f"{stem.name}.json")
    report: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    for group in given.groups:
        begin = time.perf_counter()
        rows = measure([group], seeds=range(given.seeds), steps=given.steps)[group]
        report[group] = {**head, "steps": given.steps, "seconds": round(time.perf_counter() - begin), "rows": rows}
        print(f"{table(group, rows)}\n", flush=True)
        save_results(stem, report)
    parts = [f"{table(group, part['rows'])}\n\n{header_block(part, ['rows'])}" for group, part in report.items()]
    write_results(stem, report, "# What the choices around a block do\n\n" + "\n\n".join(parts) + "\n")


if __name__ == "__main__":
    sys.exit(run(main))
