"""Lists that are too long to be held: text in a file or in memory, read element by element.

A million images with their objects are some gigabytes as JSON and ten times that as Python's objects. What is held of a
`StoredList` is where each element lies: 12 bytes. Processes share the rest, which the operating system keeps in memory
as long as there is room.
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
from latentgnn.reading import UnreadableError

_BLOCK = 256  # elements that are read at a time where all are
# Elements that lie near together are read in one go, with what is between them.
_NEAR = 2**16


class Source(Protocol):
    """Bytes by their place."""

    def read(self, start: int, length: int) -> bytes: ...


class StoredList(Sequence[Any]):
    """A list of JSON values, each of which is decoded anew whenever it is asked for.

    Args:
        source: the text.
        starts: of each element, its first byte, int64 (N,).
        lengths: of each element, int32 (N,).
        make: makes of a decoded element what this list gives for it; ``None`` gives the element.
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
        """A list as text in memory: one buffer, which processes share as long as none of them writes to it.

        Args:
            values: that JSON can hold; a stored list is given back as it is.
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
        """Some elements, in the order of the indices."""
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
        """A list of some of the elements, in the order of the indices."""
        places = np.asarray(indices, np.int64)
        return StoredList(self._source, self._starts[places], self._lengths[places], self._make)

    def mapped(self, make: Callable[[Any], Any]) -> "StoredList":
        """A list that gives for each element of the text what ``make`` makes of it."""
        return StoredList(self._source, self._starts, self._lengths, make)


def part_of(values: Sequence[Any], indices: Sequence[int]) -> Sequence[Any]:
    """Some elements of a list, which is stored again if the list is."""
    return values.part(indices) if isinstance(values, StoredList) else [values[index] for index in indices]


class _Buffer:
    """Text in memory."""

    def __init__(self, text: bytes) -> None:
        # An array and not bytes: pages that hold a reference count would be copied into each process.
        self._bytes = np.frombuffer(text, np.uint8)

    def read(self, start: int, length: int) -> bytes:
        return self._bytes[start : start + length].tobytes()


class StoredFile:
    """A file that stays as it is; one that does not is told, and not read as if it had."""

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
                # No file object: where it is forgotten, Python warns.
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
    """Bytes of a file; a process shares its place in the file with those that it was forked from, so that none has."""
    if sys.platform == "win32":
        os.lseek(descriptor, start, os.SEEK_SET)
        return os.read(descriptor, length)
    return os.pread(descriptor, length, start)


def version_of(status: os.stat_result) -> tuple[int, int]:
    """What tells a file from one with other content: its size and the time of its last change."""
    return status.st_size, status.st_mtime_ns
