"""Files that several processes divide among themselves; each is processed once, and results come in input order."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from itertools import islice
from typing import Any, TypeVar

import torch.distributed
from lightning.fabric import Fabric

from latentgnn.training.config import TrainingConfig
from latentgnn.training.devices import launch, make_fabric, quiet, started
from latentgnn.training.lifeline import Lifeline
from latentgnn.training.sampling import share

T = TypeVar("T")

# Files that a process works on before results are gathered. With more, processes wait less for one with larger files;
# with fewer, less work is lost if a command ends early.
_ROUND = 8


class Processes:
    """The processes that a command runs on; by default this one alone.

    Args:
        fabric: a launched Fabric.
        lifeline: the lifeline of this process.

    Attributes:
        world: number of processes.
        rank: rank of this process, from 0.
        is_first: whether this is the process that writes and prints.
    """

    def __init__(self, fabric: Fabric | None = None, lifeline: Lifeline | None = None) -> None:
        self.world = 1 if fabric is None else fabric.world_size
        self.rank = 0 if fabric is None else fabric.global_rank
        self.is_first = self.rank == 0
        self._fabric, self._lifeline = fabric, lifeline
        # Objects are sent by gloo: other backends would send them through accelerator memory. There is no timeout, as a
        # file may take any time; the lifeline notices processes that are gone.
        self._group: Any = None
        if fabric is not None:
            self._group = torch.distributed.new_group(backend="gloo", timeout=timedelta(days=30))

    def mine(self, total: int) -> list[int]:
        """Return the indices of the files that this process works on, out of ``total``, ascending."""
        return [indices[place] for indices in self._rounds(total) for place in self._share(indices)]

    def others(self, total: int) -> list[int]:
        """Return the indices of all other files."""
        mine = set(self.mine(total))
        return [index for index in range(total) if index not in mine]

    def in_order(self, results: Iterator[T], total: int) -> Iterator[T]:
        """Yield the results of all files in order in the first process, and nothing in the others; all must iterate it.

        Args:
            results: results of the files in `mine`, made as they are taken.
            total: number of files.
        """
        if self._fabric is None:
            yield from results
            return
        for indices in self._rounds(total):
            for part in self.gathered(list(islice(results, len(self._share(indices))))):
                yield from part
        # Runs the code after the iterator's last result, such as drawing its picture.
        for _ in results:
            raise AssertionError("there are more results than files")

    def gathered(self, value: T) -> list[T]:
        """Return the values of all processes by rank in the first process; an empty list in the others."""
        if self._fabric is None:
            return [value]
        values: list[Any] = [None] * self.world
        torch.distributed.gather_object(value, values if self.is_first else None, dst=0, group=self._group)
        return values if self.is_first else []

    def from_first(self, make: Callable[[], T]) -> T:
        """Return in all processes what the first one makes."""
        made: list[Any] = [make() if self.is_first else None]
        if self._fabric is not None:
            torch.distributed.broadcast_object_list(made, src=0, group=self._group)
        value: T = made[0]
        return value

    def wait(self) -> None:
        """Wait until all processes have arrived."""
        if self._fabric is not None:
            torch.distributed.barrier(group=self._group)

    def done(self) -> None:
        """Say that this process is done, so that its end, even with an error, does not affect the others."""
        if self._lifeline is not None:
            self._lifeline.done()

    def _rounds(self, total: int) -> Iterator[range]:
        size = _ROUND * self.world
        return (range(first, min(first + size, total)) for first in range(0, total, size))

    def _share(self, indices: range) -> range:
        return share(len(indices), world=self.world, rank=self.rank)


@contextmanager
def sharing(config: TrainingConfig) -> Iterator[Processes]:
    """Give the processes of a command that does not train: a launcher's, or those of ``devices`` and ``machines``.

    With ``auto`` devices and no launcher there is one process.

    Raises:
        UserError: if this machine lacks such devices, or another process is gone.
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
