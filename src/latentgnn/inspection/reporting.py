"""Whether the blocks of a network have an effect, and what they cost: one table for a network and a batch."""

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from latentgnn.inspection.comparison import difference
from latentgnn.inspection.running import inspected_blocks, inspecting, run, without
from latentgnn.inspection.seen import capture
from latentgnn.inspection.statistics import BlockStatistics, RunningStatistics
from latentgnn.inspection.words import Finding, findings
from latentgnn.layer import LatentGNN


@dataclass(frozen=True, kw_only=True)
class BlockReport:
    """The report on one block.

    Args:
        statistics: statistics over the samples of the batch.
        output_change: how much the network's output changes without the block:
            `latentgnn.inspection.comparison.difference`; ``None`` if outputs cannot be compared.
        time_share: share of the network's forward time, measured once.
        memory_share: share of the bytes that the network stores for the backward pass; ``None`` if nothing is stored.
        findings: findings in words.
    """

    statistics: BlockStatistics
    output_change: float | None
    time_share: float
    memory_share: float | None
    findings: tuple[Finding, ...]

    @property
    def name(self) -> str:
        """Name of the block, as in ``model.named_modules()``."""
        return self.statistics.name


@dataclass(frozen=True, kw_only=True)
class Report:
    """All blocks of a network on one batch; ``print(report)`` shows a table and explains it.

    Args:
        blocks: the blocks, in the order of the network.
        not_run: blocks that the network did not run.
        seconds: duration of the network's forward pass, measured once.
        held_bytes: bytes that it stores for the backward pass, without its parameters.
    """

    blocks: tuple[BlockReport, ...]
    not_run: tuple[str, ...]
    seconds: float
    held_bytes: int

    def to_dict(self) -> dict[str, Any]:
        """Return everything as data for JSON."""
        blocks = [
            {"name": block.name, **asdict(block), "statistics": block.statistics.to_dict()} for block in self.blocks
        ]
        return {**asdict(self), "blocks": blocks}

    def __str__(self) -> str:
        rows = [_HEAD, *(_cells(block) for block in self.blocks)]
        widths = [max(len(row[column]) for row in rows) for column in range(len(_HEAD))]
        lines = [
            "  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]).rstrip()  # names to the left
            for row in rows
        ]
        lines.append("")
        for block in self.blocks:
            lines += (f"{_shown(block.name)}: {finding}" for finding in block.findings)
        if self.not_run:
            lines.append(f"not run: {', '.join(map(_shown, self.not_run))}")
        lines.append(
            f"time: the share of one forward pass, {self.seconds * 1e3:.0f} ms, measured once; memory: the share of "
            f"the {self.held_bytes / 2**20:.1f} MiB that a forward pass holds for the backward pass"
        )
        return "\n".join(lines)


_HEAD = (
    *("block", "gamma", "changes input", "changes output", "rows differ", "effective rank", "dead"),
    *("time", "memory"),
)


def _cells(block: BlockReport) -> tuple[str, ...]:
    found = block.statistics
    return (
        _shown(block.name),
        "-" if found.gamma is None else f"{found.gamma:.3g}",
        _percent(found.change.mean),
        _percent(block.output_change),
        f"{found.row_difference:.3f}",
        f"{found.effective_rank:.1f} of {max(graph.latents for graph in found.graphs)}",
        f"{found.dead} of {found.latents}",
        _percent(block.time_share),
        _percent(block.memory_share),
    )


def _shown(name: str) -> str:
    return name or "(the network itself)"


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{share:.1%}"


def report(model: nn.Module, batch: Any) -> Report:
    """Report for every block of a network whether it has an effect, and what it costs.

    The network runs in evaluation mode: once to record the blocks, once for time, once with gradients for memory, and
    once without each block. Afterwards it is unchanged.

    Args:
        model: a network with blocks and any output: a tensor, dicts, lists, detections.
        batch: what the network takes: one argument such as a tensor or a detector's list of images, a tuple of
            arguments, or a mapping of arguments by name.

    Returns:
        For each block: gamma, how much it changes its input, how much the network's output changes without it, how
        different the rows of its affinity are, their effective rank, dead latents, its share of time and memory, and
        what this means.

    Raises:
        ValueError: if the network has no block, runs none of them on this batch, or runs them on no nodes.

    Example:
        >>> net = nn.Sequential(nn.Conv2d(3, 16, 1), LatentGNN(16, num_latents=4), nn.Conv2d(16, 2, 1))
        >>> found = report(net, torch.randn(2, 3, 10, 12))
        >>> found.blocks[0].name, found.blocks[0].output_change, found.blocks[0].findings[0].name
        ('1', 0.0, 'gamma_zero')
        >>> print(found)  # doctest: +ELLIPSIS
        block  gamma  changes input  changes output  rows differ ...
    """
    layers = inspected_blocks(model)
    with inspecting(model):
        with capture(model) as seen:
            output = run(model, batch)
        if not seen:
            raise ValueError(f"the network ran none of its blocks on this batch: {', '.join(map(repr, layers))}")
        seconds, seconds_of = _time(model, layers, batch)
        held, held_by = _memory(model, layers, batch)
        reports = []
        for name, block in seen.items():
            running = RunningStatistics(name)
            running.add(block)
            statistics = running.result()
            with without(layers[name]):
                output_change = difference(output, run(model, batch))
            reports.append(
                BlockReport(
                    statistics=statistics,
                    output_change=output_change,
                    time_share=seconds_of[name] / seconds,
                    memory_share=held_by[name] / held if held else None,
                    findings=findings(statistics, output_change),
                )
            )
    return Report(
        blocks=tuple(reports),
        not_run=tuple(name for name in layers if name not in seen),
        seconds=seconds,
        held_bytes=held,
    )


@contextmanager
def _around(
    layers: Mapping[str, LatentGNN], before: Callable[[str], None], after: Callable[[str], None]
) -> Iterator[None]:
    """Call ``before`` and ``after`` with a block's name before and after it runs."""

    def begin(name: str, module: nn.Module, args: Any) -> None:
        before(name)

    def end(name: str, module: nn.Module, args: Any, out: Any) -> None:
        after(name)

    handles = [layer.register_forward_pre_hook(partial(begin, name)) for name, layer in layers.items()]
    handles += [layer.register_forward_hook(partial(end, name), prepend=True) for name, layer in layers.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _time(model: nn.Module, layers: Mapping[str, LatentGNN], batch: Any) -> tuple[float, dict[str, float]]:
    """The seconds of a forward pass, and those inside each block."""
    inside = dict.fromkeys(layers, 0.0)

    def step(sign: int, name: str) -> None:
        inside[name] += sign * _now()

    with _around(layers, partial(step, -1), partial(step, 1)):
        start = _now()
        run(model, batch)
        return _now() - start, inside


def _now() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def _memory(model: nn.Module, layers: Mapping[str, LatentGNN], batch: Any) -> tuple[int, dict[str, int]]:
    """The bytes that a forward pass stores for the backward pass, and those first stored inside each block."""
    known = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}
    held: dict[int, tuple[int, str | None]] = {}
    place: list[str] = []

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            held.setdefault(storage.data_ptr(), (storage.nbytes(), place[-1] if place else None))
        return tensor

    with (
        torch.enable_grad(),
        torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
        _around(layers, place.append, place.remove),
    ):
        output = run(model, batch)
        del output
    by_block = {name: sum(size for size, owner in held.values() if owner == name) for name in layers}
    return sum(size for size, _ in held.values()), by_block
