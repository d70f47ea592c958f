"""Random numbers that depend on the seed and the step alone, so that no generator's state has to be saved."""

import hashlib
import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch


def seed_generators(*words: int) -> None:
    """Seed the generators of torch (every device), numpy and Python from a hash of non-negative integers.

    Training calls it at the start of every micro-batch with (seed, step, micro-batch, process). So no generator's state
    has to be saved to continue a run exactly, and whatever draws random numbers in between (validation, pictures, data
    loading in the same process) changes nothing. The hash is numpy's ``SeedSequence``: neighbouring words, such as two
    steps, give unrelated streams, which a sum of them would not.

    Args:
        words: what the stream depends on.

    Example:
        >>> seed_generators(0, 7)
        >>> a = torch.rand(3)
        >>> seed_generators(0, 7)
        >>> bool((torch.rand(3) == a).all())
        True
    """
    state = np.random.SeedSequence(words).generate_state(8)
    torch.manual_seed(int(state[0]) << 32 | int(state[1]))
    random.seed(int(state[2]) << 32 | int(state[3]))
    np.random.seed(state[4:])


@contextmanager
def stream_of(*numbers: int) -> Iterator[None]:
    """A stream of torch's default CPU generator that depends on these numbers alone, for the making of one sample.

    Afterwards the generator is as before. Near numbers give unrelated streams.
    """
    digest = hashlib.blake2b(",".join(map(str, numbers)).encode(), digest_size=8).digest()
    with torch.random.fork_rng(devices=[]):
        # Not torch.manual_seed, which would reseed the accelerators too.
        torch.default_generator.manual_seed(int.from_bytes(digest, "little"))
        yield
