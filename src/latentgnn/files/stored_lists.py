"""Lists that are too long to keep in memory: text in a file or buffer, read element by element.

A million images with their objects are some gigabytes as JSON and ten times that as Python objects. A `StoredList` only
keeps the position of each element in memory: 12 bytes. The rest is shared by processes, and the operating system caches
it as long as there is room.
"""

import json
import os
import sys
import weakref
from array import array
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from latentgnn.errors import UserError, reason
from latentgnn.files.reading import UnreadableError

_BLOCK = 256  # number of elements that are read at a time when iterating
# Elements that are close together are read at once, including what is between them.
_NEAR = 2**16


class Source(Protocol):
    """Bytes that are read by position."""

    def read(self, start: int, length: int) -> bytes: ...


class StoredList(Sequence[Any]):
    """A list of JSON values, each of which is decoded on every access.

    Args:
        source: the text.
        starts: offset of each element's first byte, int64 (N,).
        lengths: length of each element, int32 (N,).
        make: converts a decoded element to the list's item; ``None`` returns it unchanged.
    """

    def __init__(
        self,
        source: Source,
        starts: NDArray[np.int64],
        lengths: NDArray[np.int32],
        make: Callable[[Any], Any] | None = None,
    ) -> None:
        self._source, self._starts, self._lengths, self._make = source, starts, lengths, make

    @classmethod
    def of(cls, values: Sequence[Any]) -> "StoredList":
        """Store a list as text in one memory buffer, which processes share as long as none of them writes to it.

        Args:
            values: values that JSON can represent; a stored list is returned unchanged.
        """
        if isinstance(values, StoredList):
            return values
        lengths = array("i")
        buffer = bytearray()
        for value in values:
            text = json.dumps(value).encode()
            lengths.append(len(text))
            buffer += text
        sizes = np.array(lengths, np.int32)
        return cls(_Buffer(bytes(buffer)), np.cumsum(sizes, dtype=np.int64) - sizes, sizes)

    def __len__(self) -> int:
        return len(self._starts)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return self.values(np.arange(len(self))[index])
        if not -len(self) <= index < len(self):
            raise IndexError(f"the list has {len(self)} elements, and no number {index}")
        return self.values([index])[0]

    def __iter__(self) -> Iterator[Any]:
        for first in range(0, len(self), _BLOCK):
            yield from self.values(range(first, min(first + _BLOCK, len(self))))

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Sequence) or isinstance(other, str | bytes):
            return NotImplemented
        return len(self) == len(other) and all(a == b for a, b in zip(self, other, strict=True))

    __hash__ = None  # type: ignore[assignment]

    def values(self, indices: Sequence[int] | NDArray[Any]) -> list[Any]:
        """Return some elements, in the order of the indices."""
        places = np.asarray(indices, np.int64)
        if not len(places):
            return []
        starts, lengths = self._starts[places], self._lengths[places]
        low, high = int(starts.min()), int((starts + lengths).max())
        pairs = zip(starts.tolist(), lengths.tolist(), strict=True)
        if high - low <= max(_NEAR, 2 * int(lengths.sum(dtype=np.int64))):
            text = self._source.read(low, high - low)
            texts = [text[start - low : start - low + length] for start, length in pairs]
        else:
            texts = [self._source.read(start, length) for start, length in pairs]
        values = [json.loads(text) for text in texts]
        return values if self._make is None else [self._make(value) for value in values]

    def part(self, indices: Sequence[int] | NDArray[Any]) -> "StoredList":
        """Return a list of some of the elements, in the order of the indices."""
        places = np.asarray(indices, np.int64)
        return StoredList(self._source, self._starts[places], self._lengths[places], self._make)

    def mapped(self, make: Callable[[Any], Any]) -> "StoredList":
        """Return a list whose items are the results of ``make`` on the elements."""
        return StoredList(self._source, self._starts, self._lengths, make)


def part_of(values: Sequence[Any], indices: Sequence[int]) -> Sequence[Any]:
    """Return some elements of a list; the result is a stored list if the input is."""
    return values.part(indices) if isinstance(values, StoredList) else [values[index] for index in indices]


class _Buffer:
    """Text in memory."""

    def __init__(self, text: bytes) -> None:
        # An array, not bytes: pages that contain a reference count would be copied into each process.
        self._bytes = np.frombuffer(text, np.uint8)

    def read(self, start: int, length: int) -> bytes:
        return self._bytes[start : start + length].tobytes()


class StoredFile:
    """A file that must not change; if it does, reading it raises an error."""

    def __init__(self, path: Path, version: tuple[int, int]) -> None:
        self._path, self._version = path, version
        self._descriptor: int | None = None

    def __getstate__(self) -> tuple[Path, tuple[int, int]]:
        return self._path, self._version

    def __setstate__(self, state: tuple[Path, tuple[int, int]]) -> None:
        self._path, self._version = state
        self._descriptor = None

    def read(self, start: int, length: int) -> bytes:
        try:
            if self._descriptor is None:
                # Not a file object, for which Python would warn if it is not closed.
                descriptor = os.open(self._path, os.O_RDONLY | getattr(os, "O_BINARY", 0))
                weakref.finalize(self, os.close, descriptor)
                self._descriptor = descriptor
            text = _read_at(self._descriptor, start, length)
            version = version_of(os.fstat(self._descriptor))
        except OSError as error:
            raise UnreadableError(self._path, "", reason(error)) from error
        if version != self._version or len(text) != length:
            raise UserError(f"{self._path} has changed since it was checked: start again, so that it is checked anew")
        return text


def _read_at(descriptor: int, start: int, length: int) -> bytes:
    """Read bytes at an offset; the file position is not used, because forked processes share it."""
    if sys.platform == "win32":
        os.lseek(descriptor, start, os.SEEK_SET)
        return os.read(descriptor, length)
    return os.pread(descriptor, length, start)


def version_of(status: os.stat_result) -> tuple[int, int]:
    """Return what distinguishes versions of a file: its size and modification time."""
    return status.st_size, status.st_mtime_ns
