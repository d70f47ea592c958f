"""Code of the commands ``explain`` and ``diagnose`` for any task."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

from torch import nn

from latentgnn.blocks import blocks_of
from latentgnn.errors import UserError
from latentgnn.files.outputs import Results
from latentgnn.inspection import BlockStatistics, Report, findings, report, summarize
from latentgnn.progress import counted
from latentgnn.tasks.inputs import noted, raise_faults, result_names
from latentgnn.tasks.panels import figures_table, in_words
from latentgnn.training.page import render
from latentgnn.training.runs import RunFolder
from latentgnn.training.sections import Gallery, Picture, Section

PAGE = "explain.html"
"""The name of the page."""

_MEASURED = 3  # number of samples on which time, memory and the change of the output are measured
_READ = (
    "The heat map of a node shows how much it takes in of every other node. Weights are never negative and need not "
    "sum to one. Each map is scaled by its own largest weight, so compare within a map. Below it, the latents: where "
    "each gathers from and its share of all that is gathered, how much latents take in of each other when they mix, "
    "and how much each is used. Last, the effective rank: about how many different contexts the block can give."
)


@dataclass(frozen=True, kw_only=True)
class Explained:
    """What one block did on one input.

    Args:
        block: name of the block.
        statistics: its figures.
        picture: picture as PNG.
        caption: text below the picture.
    """

    block: str
    statistics: BlockStatistics
    picture: bytes
    caption: str


def spread(total: int, most: int) -> list[int]:
    """Return indices spread over a set.

    Example:
        >>> spread(10, 3), spread(2, 3)
        ([0, 3, 6], [0, 1])
    """
    count = min(total, most)
    return [place * total // count for place in range(count)]


def chosen_blocks(model: nn.Module, wanted: str | None, source: Path) -> list[str]:
    """Return the names of the blocks to explain, in the model's order.

    Args:
        model: the model.
        wanted: a block, the module that it follows, or a part of its name; ``None`` for all.
        source: the run, for errors.

    Raises:
        UserError: if there is no such block.
    """
    names = list(blocks_of(model))
    if not names:
        raise UserError(
            f"the model in {source} has no LatentGNN blocks (model.blocks is empty): name a run that has some, such as "
            "with_blocks of a comparison"
        )
    found = [name for name in names if wanted is None or wanted in name]
    if not found:
        raise UserError(f"the model in {source} has no block {wanted!r}; it has {', '.join(names)}")
    return found


def explain(
    paths: Sequence[Path],
    look: Callable[[Path], Iterable[Explained]],
    *,
    kind: str,
    out: Path,
    overwrite: bool,
    source: Path,
    config: dict[str, Any],
    command: str,
) -> None:
    """Write ``pictures/`` and a page about what the blocks did on each input.

    Args:
        paths: the inputs.
        look: explains one of them.
        kind: name of an input, in the singular.
        out: output folder, new or empty.
        overwrite: replace the results of an earlier command in it.
        source: the run, for the page.
        config: the run's configuration.
        command: the command that is run, for the page.

    Raises:
        UserError: if inputs could not be read, which it lists; or ``out`` cannot be used for results.
    """
    faults: list[str] = []
    sections: list[Section] = []
    with Results(out, (PAGE,), reads=paths, overwrite=overwrite) as results:
        for path, name in zip(paths, result_names(paths), strict=True):
            with noted(faults, path):
                shown = []
                for found in look(path):
                    place = name.with_name(f"{name.name}-{found.block.replace('/', '_')}.png")
                    results.write(Path("pictures") / place, found.picture)
                    sections.append(_section(path, found, place))
                    shown.append(found.block)
                print(f"{path}: {', '.join(shown)}")
        if sections:
            done = len(paths) - len(faults)
            page = render(
                RunFolder(out, config),
                subtitle=f"{source} · {done} {kind}{'' if done == 1 else 's'}",
                notes=[_READ],
                sections=sections,
                commands=[command],
                title=f"{source.resolve().name}: what its blocks do",
            )
            results.write(PAGE, page.encode())
    raise_faults(faults, inputs=len(paths), kind=kind, out=out)


def _section(path: Path, found: Explained, place: Path) -> Section:
    picture = Picture(path=place.as_posix(), caption=found.caption)
    return Section(
        title=f"{path.name} · {found.block}",
        text=in_words(found.statistics),
        tables=(figures_table(found.statistics),),
        galleries=(Gallery(title="What nodes take in, and what the latents do", pictures=(picture,), wide=True),),
    )


def diagnose(model: nn.Module, samples: Iterable[Any], *, total: int) -> Report:
    """Report for every block whether it has an effect over a set.

    Statistics are over all samples. Time, memory and the change of the network's output without a block are means over
    the first few, as each takes several passes.

    Args:
        model: the model in evaluation mode.
        samples: inputs of the model.
        total: number of samples.
    """
    reports: list[Report] = []

    def seen() -> Iterator[Any]:
        iterator = iter(samples)
        for sample in islice(iterator, _MEASURED):
            if not reports:
                # A warm-up pass, so that the later ones are not slowed down by first-time work.
                report(model, sample)
            reports.append(report(model, sample))
            yield sample
        yield from iterator

    statistics = summarize(
        model, counted(seen(), "diagnose", total=total), inputs=lambda sample: sample, progress=False
    )
    first = reports[0]
    blocks = []
    for block in first.blocks:
        same = [found for made in reports for found in made.blocks if found.name == block.name]
        changes = [found.output_change for found in same if found.output_change is not None]
        memory = [found.memory_share for found in same if found.memory_share is not None]
        change = sum(changes) / len(changes) if changes else None
        blocks.append(
            replace(
                block,
                statistics=statistics[block.name],
                output_change=change,
                time_share=sum(found.time_share for found in same) / len(same),
                memory_share=sum(memory) / len(memory) if memory else None,
                findings=findings(statistics[block.name], change),
            )
        )
    return replace(
        first,
        blocks=tuple(blocks),
        seconds=sum(made.seconds for made in reports) / len(reports),
        held_bytes=sum(made.held_bytes for made in reports) // len(reports),
    )
