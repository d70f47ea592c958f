"""Faults of the machine, told in one line: no memory left, a loading process that was killed."""

import errno
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from latentgnn.errors import UserError

# PyTorch has a class of its own for lack of memory on accelerators alone.
_NO_MEMORY = (
    "can't allocate memory",
    "not enough memory",
    "out of memory",
    "Cannot allocate memory",
    "Unable to allocate",
    "_ALLOC_FAILED",
)
# Raised where the signal of a dead child meets the program, be it in the middle of a step.
_DEAD_WORKER = "DataLoader worker (pid"


@contextmanager
def faults_told(place: str) -> Iterator[None]:
    """Turn faults of the machine into errors that say what to change.

    Args:
        place: where it happens, such as ``in step 7``.

    Raises:
        UserError: in the place of such a fault; other errors pass.
    """
    try:
        yield
    except UserError:
        raise
    except (MemoryError, RuntimeError, OSError) as error:
        first_line = (str(error).strip().splitlines() or [type(error).__name__])[0]
        if _is_lack_of_memory(error):
            raise UserError(
                f"out of memory {place} ({first_line}): lower training.batch_size, or raise training.accumulate to "
                "work it off in smaller parts; take smaller samples (images, blocks of points) or fewer latents "
                "(model.blocks); where the accelerator has it, training.precision bf16-mixed; with many loading "
                "processes, fewer of them (training.workers)"
            ) from error
        if str(error).startswith(_DEAD_WORKER):
            raise UserError(
                f"a loading process ended {place} ({first_line}): where it was killed for lack of memory, lower "
                "training.workers or take smaller samples"
            ) from error
        raise


def _is_lack_of_memory(error: BaseException) -> bool:
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return any(text in str(error) for text in _NO_MEMORY)
