"""Statistics of blocks over a data set."""

from collections.abc import Callable, Iterable
from typing import Any

from torch import nn

from latentgnn.inspection.running import inspected_blocks, inspecting, run
from latentgnn.inspection.seen import capture
from latentgnn.inspection.statistics import BlockStatistics, RunningStatistics
from latentgnn.progress import counted


def summarize(
    model: nn.Module,
    loader: Iterable[Any],
    *,
    inputs: Callable[[Any], Any] | None = None,
    progress: bool = True,
) -> dict[str, BlockStatistics]:
    """Return statistics of every block over a data set: mean and spread over samples of those of `Seen.statistics`.

    The network runs in evaluation mode without gradients. Only running sums are stored, so memory does not grow with
    the number of batches. A latent counts as dead if it is dead over all samples together.

    Args:
        model: a network with blocks.
        loader: batches, as a `torch.utils.data.DataLoader` gives them.
        inputs: extracts from a batch what the network takes: one argument, a tuple of arguments, or a mapping of
            arguments by name; by default the first entry of a tuple or a list (images before targets), otherwise the
            batch itself.
        progress: show a progress bar on a terminal, if `rich` is installed.

    Returns:
        Statistics by block name; blocks that did not run are omitted.

    Raises:
        ValueError: if the network has no block, or the loader is empty.

    Example:
        >>> import torch, latentgnn
        >>> net = nn.Sequential(nn.Conv2d(3, 16, 1), latentgnn.LatentGNN(16, num_latents=4))
        >>> batches = [(torch.randn(2, 3, 8, 8), torch.tensor([0, 1])) for _ in range(3)]
        >>> summarize(net, batches)["1"].samples
        6
    """
    running = {name: RunningStatistics(name) for name in inspected_blocks(model)}
    take = _first if inputs is None else inputs
    with inspecting(model):
        for batch in counted(loader, "looking") if progress else loader:
            with capture(model) as seen:
                run(model, take(batch))
            for name, block in seen.items():
                running[name].add(block)
    found = {name: statistics.result() for name, statistics in running.items() if statistics.has_samples}
    if not found:
        raise ValueError("no block saw a sample: the loader gave no batch, or the network runs none of its blocks")
    return found


def _first(batch: Any) -> Any:
    return batch[0] if isinstance(batch, tuple | list) else batch
