"""The order of the training samples, as a pure function of the seed and the position."""

from collections.abc import Iterator

import numpy as np
from torch.utils.data import Sampler

from latentgnn.errors import UserError
from latentgnn.training.task import TrainingSet

# Keeps the order's random stream apart from that of the training steps, which starts from the same seed.
_ORDER = 0x6F72646572


class BatchStream(Sampler[list[tuple[int, int]]]):
    """One process's micro-batches, as lists of (epoch, index), from one position to another of an endless stream.

    Each epoch is a permutation of all samples. Samples queue up by their group, and as soon as a group has enough for
    all processes they are a micro-batch; what is left in the queues is carried into the next epoch, so that nothing is
    dropped or repeated. Starting at a position replays the integers before it and loads nothing.

    Args:
        training_set: gives the number of samples and their groups.
        per_device: samples of a micro-batch that one process works on.
        world: number of processes.
        rank: this process.
        seed: of the order.
        start: first micro-batch.
        stop: micro-batch to stop before.

    Raises:
        UserError: there are no samples.
    """

    def __init__(
        self, training_set: TrainingSet, *, per_device: int, world: int, rank: int, seed: int, start: int, stop: int
    ) -> None:
        if len(training_set) == 0:
            raise UserError("the training set has no samples: check the training annotations")
        self.groups = [training_set.group_of(index) for index in range(len(training_set))]
        self.per_device = per_device
        self.world = world
        self.rank = rank
        self.seed = seed
        self.start = start
        self.stop = stop

    def __len__(self) -> int:
        return self.stop - self.start

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        first = self.rank * self.per_device
        for position, batch in enumerate(self._global_batches()):
            if position >= self.stop:
                return
            if position >= self.start:
                yield batch[first : first + self.per_device]

    def _global_batches(self) -> Iterator[list[tuple[int, int]]]:
        """The micro-batches of all processes together, without end."""
        size = self.per_device * self.world
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


def share(total: int, *, world: int, rank: int) -> range:
    """The indices of a validation set that one process works off: a contiguous part, without padding.

    Put one after another, the parts are the whole set in its order, so scores do not depend on the number of processes.
    """
    return range(total * rank // world, total * (rank + 1) // world)
