"""Lists in JSON files that grow, and are valid JSON after each item."""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from latentgnn.errors import concerning


class GrowingList:
    """A list in a JSON file, one item per line; after each item, the file contains all items so far.

    While it grows, the file is named ``partial``; as a context manager, the list renames it at the end. After an error
    it keeps the partial name, and is still valid JSON.

    Args:
        partial: name until the end; ``None`` if another process writes the list, and nothing is added here.
        path: final name.
    """

    def __init__(self, partial: Path | None, path: Path) -> None:
        self._partial = partial
        self._path = path
        self._end = 1
        self._separator = b"\n"
        if partial is None:
            return
        partial.parent.mkdir(parents=True, exist_ok=True)
        with concerning(partial):
            self._file = partial.open("xb", buffering=0)
            try:
                self._write(b"[]\n", 0)
            except BaseException:
                self._file.close()
                raise

    def __enter__(self) -> "GrowingList":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._partial is None:
            return
        with self._file:
            if error is not None:
                return
            with concerning(self._path):
                os.fsync(self._file.fileno())
        with concerning(self._path):
            self._partial.replace(self._path)

    def add(self, items: Sequence[Any]) -> None:
        """Append items; if they cannot be written, the file is unchanged."""
        assert self._partial is not None
        data = b"".join(
            (self._separator if index == 0 else b",\n") + json.dumps(item).encode() for index, item in enumerate(items)
        )
        if not data:
            return
        try:
            with concerning(self._path):
                self._write(data + b"\n]\n", self._end)
        except BaseException:
            # First overwritten in place, where the file already has disk space, and then truncated.
            closing = b"]\n" if self._end == 1 else b"\n]\n"
            self._write(closing, self._end)
            self._file.truncate(self._end + len(closing))
            raise
        self._end += len(data)
        self._separator = b",\n"

    def _write(self, data: bytes, place: int) -> None:
        self._file.seek(place)
        left = memoryview(data)
        while left:
            left = left[self._file.write(left) :]
