"""One-line messages for faults of the machine: out of memory, a loading process that was killed."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from latentgnn.errors import UserError, first_line, is_lack_of_memory
from latentgnn.training.loading import LoadingProcessGone

# Raised wherever the signal of a dead child process arrives, possibly in the middle of a step.
_DEAD_WORKER = "DataLoader worker (pid"


@contextmanager
def faults_told(place: Callable[[], str]) -> Iterator[None]:
    """Turn faults of the machine into errors that say which setting to change.

    Args:
        place: returns where it happens, such as ``in step 7``.

    Raises:
        UserError: instead of such a fault; other errors are passed on.
    """
    try:
        yield
    except UserError:
        raise
    except (MemoryError, RuntimeError, OSError) as error:
        if is_lack_of_memory(error):
            raise UserError(
                f"out of memory {place()} ({first_line(error)}): lower training.batch_size, or raise "
                "training.accumulate to work it off in smaller parts; hold less with training.activation_checkpointing "
                "true; take smaller samples (images, blocks of "
                "points) or fewer latents (model.blocks); where the accelerator has it, training.precision bf16-mixed; "
                "with many loading processes, fewer of them (training.workers)"
            ) from error
        if isinstance(error, LoadingProcessGone) or str(error).startswith(_DEAD_WORKER):
            raise UserError(
                f"a loading process ended {place()} ({first_line(error)}): where it was killed for lack of memory, "
                "lower training.workers or take smaller samples"
            ) from error
        raise
