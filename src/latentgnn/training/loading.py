"""Loading in worker processes: how they start and end, and how their errors become the project's own."""

import gc
import multiprocessing
import os
import threading
from collections.abc import Callable, Iterator, Sized
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
from torch.utils.data import DataLoader, Dataset

from latentgnn.errors import UserError, is_lack_of_memory, system_error, told
from latentgnn.training.stopping import ignore_stop_signals


class Samples(Sized, Protocol):
    """Samples by key: an index, or a pair of epoch and index."""

    def __getitem__(self, key: Any, /) -> Any: ...


def make_loader(
    samples: Samples, collate: Callable[[list[Any]], Any], *, workers: int, seed: int, **options: Any
) -> DataLoader[Any]:
    """A data loader to be read with `batches`.

    Args:
        samples: the data.
        collate: makes a batch of a list of samples.
        workers: number of loading processes; with 0, samples are loaded in the process that takes the batches.
        seed: seed of the loading processes.
        options: further arguments of torch's ``DataLoader``, such as ``batch_sampler``.
    """
    return DataLoader(
        _Tried(samples),
        collate_fn=partial(_collate, collate),
        num_workers=workers,
        worker_init_fn=_start_worker,
        # A generator of its own: without one, the loader would draw its workers' seeds from the global generator.
        generator=torch.Generator().manual_seed(seed),
        **options,
    )


@contextmanager
def batches(loader: DataLoader[Any]) -> Iterator[Iterator[Any]]:
    """Give the batches of a loader from `make_loader`; its processes end with the ``with`` block, even after an error.

    Raises:
        UserError: from the iterator, as one line, if a sample could not be loaded.
        LoadingProcessGone: if a loading process was killed; torch raises its own errors in most such cases.
    """
    iterator = iter(loader)
    try:
        yield _sound(iterator)
    finally:
        # Not left to garbage collection: the traceback of an error keeps the iterator alive until the interpreter
        # exits, which then sends the processes a signal that they ignore, and waits for them.
        if loader.num_workers:
            _end(iterator)


class LoadingProcessGone(RuntimeError):
    """A loading process ended in the middle of its work."""


@dataclass(frozen=True)
class _Fault:
    """An error in a sample. It is returned instead of the sample, as torch would turn an exception into a traceback."""

    message: str


class _Tried(Dataset[Any]):
    """Samples; for a sample with an error that the user can fix, a `_Fault` instead. Other errors are raised."""

    def __init__(self, samples: Samples) -> None:
        self._samples = samples

    def __len__(self) -> int:
        return len(self._samples)

    def __getitem__(self, key: Any) -> Any:
        try:
            return self._samples[key]
        except UserError as error:
            return _Fault(str(error))
        except (OSError, RuntimeError) as error:
            fault = system_error(error)
            # Out of memory is reported by the caller, which knows the settings to lower.
            if fault is None or is_lack_of_memory(fault):
                raise
            return _Fault(told(fault))


def _collate(collate: Callable[[list[Any]], Any], samples: list[Any]) -> Any:
    return next((sample for sample in samples if isinstance(sample, _Fault)), None) or collate(samples)


def _sound(iterator: Any) -> Iterator[Any]:
    """Yield the batches of a loader's iterator, and raise the first fault among them."""
    while True:
        try:
            batch = next(iterator)
        except StopIteration:
            return
        except (OSError, EOFError) as error:
            # A killed process takes batches with it that it has announced but not handed over.
            if any(_has_ended(worker) for worker in getattr(iterator, "_workers", ())):
                raise LoadingProcessGone(str(error)) from error
            raise
        if isinstance(batch, _Fault):
            raise UserError(batch.message)
        yield batch


def _has_ended(worker: multiprocessing.Process) -> bool:
    # Its connections close a moment before the process has ended.
    worker.join(timeout=1)
    return not worker.is_alive()


def _start_worker(worker: int) -> None:
    ignore_stop_signals()
    threading.Thread(target=_end_with_parent, daemon=True).start()
    # Garbage collection writes to every object that it visits. In a forked loading process this would copy the memory
    # that it shares with its parent: gigabytes with COCO's annotations.
    gc.freeze()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _end(iterator: Any) -> None:
    """End the processes of a loader's iterator: ask them first, and kill those that are stuck in a read."""
    workers = list(iterator._workers)
    iterator._shutdown_workers()
    for worker in workers:
        if worker.is_alive():
            worker.kill()
            worker.join()
