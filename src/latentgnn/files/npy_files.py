"""Rows of a NumPy file, read and written piece by piece.

Files are not memory-mapped: mapped pages count as the process's memory.
"""

import os
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from latentgnn.errors import UserError, concerning, first_line
from latentgnn.files.reading import regular_file

# Bytes that are written to disk at once while the layer computes, so that not everything is left for the end.
_SYNCED = 1 << 26

_TYPES = ("float16", "float32", "float64")


@dataclass(frozen=True)
class NpyFile:
    """A two-dimensional array in a ``.npy`` file, whose rows are read and written by index.

    Args:
        path: path of the file.
        nodes: number of rows, N.
        channels: number of columns, C.
        dtype: dtype of the elements.
        offset: bytes before the first element.
    """

    path: Path
    nodes: int
    channels: int
    dtype: str
    offset: int

    @classmethod
    def open(cls, path: Path) -> "NpyFile":
        """Open an existing file.

        Raises:
            UserError: if it is not such an array.
        """
        try:
            mapped = np.lib.format.open_memmap(regular_file(path), mode="r")
        except ValueError as error:
            raise UserError(f"{path} is no .npy file with one array of numbers ({first_line(error)})") from None
        if mapped.ndim != 2 or mapped.dtype.name not in _TYPES or not mapped.dtype.isnative:
            raise UserError(
                f"{path} holds an array {mapped.shape} of {mapped.dtype}: expected (N, C), nodes by channels, of "
                f"{', '.join(_TYPES)} in this machine's byte order"
            )
        if not mapped.flags.c_contiguous:
            raise UserError(f"{path} has its columns one after another; save it with np.save(path, array, order='C')")
        nodes, channels = mapped.shape
        return cls(path, nodes, channels, mapped.dtype.name, mapped.offset)

    def create(self, path: Path, dtype: str) -> "NpyFile":
        """Create a file for as many rows and columns; disk space is allocated as it is written."""
        path.unlink(missing_ok=True)
        mapped = np.lib.format.open_memmap(path, mode="w+", dtype=np.dtype(dtype), shape=(self.nodes, self.channels))
        return NpyFile(path, self.nodes, self.channels, dtype, mapped.offset)

    @property
    def row_bytes(self) -> int:
        """Size of a row in bytes."""
        return self.channels * np.dtype(self.dtype).itemsize

    def read(self, file: BinaryIO, first: int, rows: NDArray[Any]) -> None:
        """Read rows from ``first`` on into an array."""
        left = rows.data.cast("B")
        file.seek(self.offset + first * self.row_bytes)
        while left:
            count = file.readinto(left)  # type: ignore[attr-defined]
            if not count:
                raise UserError(f"{self.path} ends before its last row: it is damaged, or being written")
            left = left[count:]

    def write(self, file: BinaryIO, first: int, rows: NDArray[Any]) -> None:
        """Write rows from ``first`` on."""
        left = rows.data.cast("B")
        file.seek(self.offset + first * self.row_bytes)
        while left:
            left = left[file.write(left) :]


class RowWriter:
    """Writes chunks to a file, each while the next one is computed; a context manager.

    Args:
        target: the array in the file.
    """

    def __init__(self, target: NpyFile) -> None:
        self._target = target
        self._file = target.path.open("r+b", buffering=0)
        self._thread = ThreadPoolExecutor(1)
        self._waiting: Future[None] | None = None
        self._unsynced = 0

    def __enter__(self) -> "RowWriter":
        return self

    def __exit__(self, *error: object) -> None:
        self._thread.shutdown()
        self._file.close()

    def write(self, first: int, rows: NDArray[Any]) -> None:
        """Start writing rows, which must not be modified."""
        self._wait()
        self._waiting = self._thread.submit(self._write, first, rows)

    def sync(self) -> None:
        """Wait until everything written is on disk."""
        self._wait()
        with concerning(self._target.path):
            os.fsync(self._file.fileno())

    def _wait(self) -> None:
        if self._waiting is not None:
            self._waiting.result()

    def _write(self, first: int, rows: NDArray[Any]) -> None:
        with concerning(self._target.path):
            self._target.write(self._file, first, rows)
            self._unsynced += rows.nbytes
            if self._unsynced >= _SYNCED:
                os.fsync(self._file.fileno())
                self._unsynced = 0
