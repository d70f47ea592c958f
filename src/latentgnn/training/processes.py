"""Files that several processes share between them, so that each is worked on once and results come in their order."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import islice
from typing import Any, TypeVar

import torch.distributed
from lightning.fabric import Fabric

from latentgnn.training.config import TrainingConfig
from latentgnn.training.devices import launch, make_fabric, quiet, started
from latentgnn.training.lifeline import Lifeline
from latentgnn.training.sampling import share

T = TypeVar("T")

# Files that a process works on before results are gathered: the more, the less one waits for another with larger
# files; the fewer, the less is lost where a command ends early.
_ROUND = 8


class Processes:
    """The processes that a command runs on; by default this one alone.

    Args:
        fabric: launched.
        lifeline: of this process.

    Attributes:
        world: their number.
        rank: of this process, from 0.
        is_first: whether it is the one that writes and tells.
    """

    def __init__(self, fabric: Fabric | None = None, lifeline: Lifeline | None = None) -> None:
        self.world = 1 if fabric is None else fabric.world_size
        self.rank = 0 if fabric is None else fabric.global_rank
        self.is_first = self.rank == 0
        self._fabric, self._lifeline = fabric, lifeline
        # Objects travel by gloo: other backends would take them through the memory of an accelerator.
        self._group: Any = None if fabric is None else torch.distributed.new_group(backend="gloo")

    def mine(self, total: int) -> list[int]:
        """The indices, of so many files, that this process works on, ascending."""
        return [indices[place] for indices in self._rounds(total) for place in self._share(indices)]

    def others(self, total: int) -> list[int]:
        """The indices of all the other files."""
        mine = set(self.mine(total))
        return [index for index in range(total) if index not in mine]

    def in_order(self, results: Iterator[T], total: int) -> Iterator[T]:
        """In the first process the results of all files in their order, in the others nothing; all must go through it.

        Args:
            results: of the files that are `mine`, made as they are taken.
            total: number of files.
        """
        if self._fabric is None:
            yield from results
            return
        for indices in self._rounds(total):
            for part in self.gathered(list(islice(results, len(self._share(indices))))):
                yield from part
        # What follows the last result in its iterator, such as a picture of it.
        for _ in results:
            raise AssertionError("there are more results than files")

    def gathered(self, value: T) -> list[T]:
        """In the first process the values of all, by their rank; in the others nothing."""
        if self._fabric is None:
            return [value]
        values: list[Any] = [None] * self.world
        torch.distributed.gather_object(value, values if self.is_first else None, dst=0, group=self._group)
        return values if self.is_first else []

    def from_first(self, make: Callable[[], T]) -> T:
        """What the first process makes, in all of them."""
        made: list[Any] = [make() if self.is_first else None]
        if self._fabric is not None:
            torch.distributed.broadcast_object_list(made, src=0, group=self._group)
        value: T = made[0]
        return value

    def wait(self) -> None:
        """Wait until all are here."""
        if self._fabric is not None:
            torch.distributed.barrier(group=self._group)

    def done(self) -> None:
        """Say that this process has done its part: that it ends after this, even with an error, is no one else's."""
        if self._lifeline is not None:
            self._lifeline.done()

    def _rounds(self, total: int) -> Iterator[range]:
        size = _ROUND * self.world
        return (range(first, min(first + size, total)) for first in range(0, total, size))

    def _share(self, indices: range) -> range:
        return share(len(indices), world=self.world, rank=self.rank)


@contextmanager
def sharing(config: TrainingConfig) -> Iterator[Processes]:
    """The processes of a command that trains nothing: those of a launcher, or as many as ``devices`` and ``machines``.

    With ``auto`` devices and no launcher it is one.

    Raises:
        UserError: this machine has no such devices, or another process is gone.
    """
    if started() is None and config.devices in (1, "auto") and config.machines == 1:
        yield Processes()
        return
    with quiet():
        fabric = make_fabric(config, [])
        disconnect = launch(fabric, config)
    if fabric.world_size == 1:
        yield Processes()
    else:
        with Lifeline(fabric, lambda: "what was written before is kept") as lifeline, lifeline.told():
            yield Processes(fabric, lifeline)
            lifeline.done()
    disconnect()
