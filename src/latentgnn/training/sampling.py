"""The order of the training samples, as a pure function of seed and position."""

from collections.abc import Iterator

import numpy as np
from torch.utils.data import Sampler

from latentgnn.errors import UserError
from latentgnn.training.task import TrainingSet

# Separates the order's random stream from that of the training steps, which has the same seed.
_ORDER = 0x6F72646572


class BatchStream(Sampler[list[tuple[int, int]]]):
    """One process's micro-batches, as lists of (epoch, index), for a range of steps of an endless stream.

    Each epoch is a permutation of all samples. Samples queue up by group; as soon as a group has enough for a step,
    they form its batch. Samples left in the queues are carried over into the next epoch, so that none is dropped or
    repeated. A step's batch depends only on its size; it is cut into ``parts`` x ``world`` micro-batches, and each
    process gets every ``world``-th of them. Starting at a later step replays only indices and loads nothing.

    Args:
        training_set: provides the number of samples and their groups.
        per_device: samples per micro-batch.
        world: number of processes.
        rank: rank of this process.
        parts: micro-batches per step and process.
        seed: seed of the order.
        start: first step.
        stop: step at which to stop (exclusive).

    Raises:
        UserError: if there are no samples.
    """

    def __init__(
        self,
        training_set: TrainingSet,
        *,
        per_device: int,
        world: int,
        rank: int,
        seed: int,
        start: int,
        stop: int,
        parts: int = 1,
    ) -> None:
        if len(training_set) == 0:
            raise UserError("the training set has no samples: check the training annotations")
        self.groups = [training_set.group_of(index) for index in range(len(training_set))]
        self.per_device = per_device
        self.world = world
        self.rank = rank
        self.parts = parts
        self.seed = seed
        self.start = start
        self.stop = stop

    def __len__(self) -> int:
        return (self.stop - self.start) * self.parts

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        for step, batch in enumerate(self._steps()):
            if step >= self.stop:
                return
            if step >= self.start:
                for part in range(self.parts):
                    first = place_in_step(part, world=self.world, rank=self.rank) * self.per_device
                    yield batch[first : first + self.per_device]

    def _steps(self) -> Iterator[list[tuple[int, int]]]:
        """Yield the batches of all processes together, endlessly."""
        size = self.per_device * self.world * self.parts
        queues: dict[int, list[tuple[int, int]]] = {group: [] for group in set(self.groups)}
        epoch = 0
        while True:
            order = np.random.default_rng(np.random.SeedSequence([self.seed, _ORDER, epoch]))
            for index in order.permutation(len(self.groups)).tolist():
                queue = queues[self.groups[index]]
                queue.append((epoch, index))
                if len(queue) == size:
                    yield queue.copy()
                    queue.clear()
            epoch += 1


def place_in_step(part: int, *, world: int, rank: int) -> int:
    """Return the index within a step of the micro-batch that is a process's ``part``-th.

    Two processes with one part each work on the same micro-batches as one process with two.
    """
    return part * world + rank


def share(total: int, *, world: int, rank: int) -> range:
    """Return the indices of a validation set that one process works on: a contiguous range, without padding.

    Concatenated, the ranges are the whole set in order, so scores do not depend on the number of processes.
    """
    return range(total * rank // world, total * (rank + 1) // world)
