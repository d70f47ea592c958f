"""Random numbers that depend only on the seed and the step, so that no generator state has to be saved."""

import hashlib
import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch


def seed_generators(*words: int) -> None:
    """Seed the generators of torch (every device), numpy and Python from a hash of non-negative integers.

    Training calls it at the start of every micro-batch with (seed, step, micro-batch, process). So a run can be
    continued exactly without saving generator states, and random numbers that are drawn in between (validation,
    pictures, data loading in the same process) change nothing. The hash is numpy's ``SeedSequence``: neighbouring
    words, such as two steps, give unrelated streams, which adding them up would not.

    Args:
        words: the integers that determine the stream.

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
    """Use a stream of torch's default CPU generator that depends only on these numbers, for making one sample.

    Afterwards the generator has its previous state. Neighbouring numbers give unrelated streams.
    """
    digest = hashlib.blake2b(",".join(map(str, numbers)).encode(), digest_size=8).digest()
    with torch.random.fork_rng(devices=[]):
        # Not torch.manual_seed, which would reseed the accelerators as well.
        torch.default_generator.manual_seed(int.from_bytes(digest, "little"))
        yield
