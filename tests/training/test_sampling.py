import itertools

import numpy as np
import pytest

from latentgnn.errors import UserError
from latentgnn.training.sampling import BatchStream, share

GROUPS = [0, 0, 1, 0, 2, 1, 1, 0, 0, 1, 2]


class Samples:
    def __init__(self, groups: list[int]) -> None:
        self.groups = groups

    def __len__(self) -> int:
        return len(self.groups)

    def __getitem__(self, key: tuple[int, int]) -> None:
        raise AssertionError("the order must not load samples")

    def group_of(self, index: int) -> int:
        return self.groups[index]


def stream(groups: list[int] = GROUPS, **changes: int) -> list[list[tuple[int, int]]]:
    settings = {"per_device": 2, "world": 1, "rank": 0, "seed": 3, "start": 0, "stop": 40}
    return list(BatchStream(Samples(groups), **{**settings, **changes}))


def test_batches_hold_one_group() -> None:
    for batch in stream(per_device=3):
        assert len(batch) == 3
        assert len({GROUPS[index] for _, index in batch}) == 1


def test_each_epoch_is_a_permutation() -> None:
    keys = [key for batch in stream([0] * 7, per_device=2, stop=70) for key in batch]
    epochs = [[index for _, index in group] for _, group in itertools.groupby(keys, key=lambda key: key[0])]
    assert len(epochs) == 20
    assert all(sorted(epoch) == list(range(7)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) > 15


def test_nothing_is_dropped_or_repeated_across_groups_and_epochs() -> None:
    keys = [key for batch in stream(stop=400) for key in batch]
    assert len(set(keys)) == len(keys)
    last_whole = max(epoch for epoch, _ in keys) - 3  # later ones may still wait in the queues
    for epoch in range(last_whole):
        assert sorted(index for of, index in keys if of == epoch) == list(range(len(GROUPS)))


def test_processes_share_a_batch_without_overlap() -> None:
    together = stream(per_device=6)
    parts = [stream(per_device=2, world=3, rank=rank) for rank in range(3)]
    assert [list(itertools.chain(*slices)) for slices in zip(*parts, strict=True)] == together


@pytest.mark.parametrize("start", [0, 1, 6, 17, 39, 40])
def test_any_start_gives_the_rest_of_the_same_stream(start: int) -> None:
    assert stream(start=start) == stream()[start:]
    assert len(BatchStream(Samples(GROUPS), per_device=2, world=1, rank=0, seed=3, start=start, stop=40)) == 40 - start


def test_order_depends_on_the_seed() -> None:
    assert stream() == stream()
    assert stream() != stream(seed=4)


def test_first_sample_is_uniform() -> None:
    first = [stream([0] * 5, per_device=1, stop=1, seed=seed)[0][0][1] for seed in range(500)]
    assert np.bincount(first, minlength=5).min() > 60


def test_no_samples() -> None:
    with pytest.raises(UserError, match="no samples"):
        stream([])


@pytest.mark.parametrize(("total", "world"), [(10, 3), (2, 4), (0, 2), (7, 1)])
def test_shares_are_the_whole_in_order(total: int, world: int) -> None:
    parts = [share(total, world=world, rank=rank) for rank in range(world)]
    assert [index for part in parts for index in part] == list(range(total))
    assert max(map(len, parts)) - min(map(len, parts)) <= 1
