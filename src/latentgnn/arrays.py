"""A layer over a NumPy file that may be larger than memory, from disk to disk, in two sweeps that can be interrupted.

Both files are read and written piece by piece, and not mapped: pages of a mapped file count as the process's memory.

Axes: N nodes, C channels.
"""

import json
import os
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from latentgnn.errors import UserError, concerning, first_line
from latentgnn.files import write_json
from latentgnn.halves import why_not_halves
from latentgnn.points import PackedLatentGNN
from latentgnn.reading import regular_file
from latentgnn.streaming import gather_chunk, scatter_chunk
from latentgnn.sums import LatentSums

Progress = Callable[[str, int], None]
"""Is told a sweep, ``gather`` or ``scatter``, and how many nodes of it are done."""

# Numbers of a chunk: 8 MiB in float32. Much larger tensors are new memory from the system each time, whose first touch
# takes as long as a part of the layer; much smaller ones cost more calls.
_NUMBERS = 1 << 21
# So many bytes go to the disk at once, while the layer computes: not all at the end, when nothing else is to do.
_SYNCED = 1 << 26
_TYPES = ("float16", "float32", "float64")
# In a work folder.
_STATE, _SUMS, _OUTPUT = "state.json", "sums.safetensors", "output.npy"


@dataclass(frozen=True)
class NpyFile:
    """A two-dimensional array in a ``.npy`` file, whose rows are read and written by their numbers.

    Args:
        path: of the file.
        nodes: rows, N.
        channels: columns, C.
        dtype: type of the numbers.
        offset: bytes before the first.
    """

    path: Path
    nodes: int
    channels: int
    dtype: str
    offset: int

    @classmethod
    def open(cls, path: Path) -> "NpyFile":
        """Of a file that is there.

        Raises:
            UserError: it is no such array.
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
        """A new file for as many rows and columns; its space on the disk is taken as it is written."""
        path.unlink(missing_ok=True)
        mapped = np.lib.format.open_memmap(path, mode="w+", dtype=np.dtype(dtype), shape=(self.nodes, self.channels))
        return NpyFile(path, self.nodes, self.channels, dtype, mapped.offset)

    @property
    def row_bytes(self) -> int:
        """Of one row."""
        return self.channels * np.dtype(self.dtype).itemsize

    def read(self, file: BinaryIO, first: int, rows: NDArray[Any]) -> None:
        """Fill an array with rows from ``first`` on."""
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


@dataclass(frozen=True)
class _State:
    """What a work folder says besides the sums: what it is of, and how many nodes have been written."""

    source: dict[str, Any]
    chunk_nodes: int
    dtype: str
    scattered: int = 0

    @classmethod
    def of(cls, source: NpyFile, chunk_nodes: int, dtype: str) -> "_State":
        status = source.path.stat()
        known = {
            "path": str(source.path.resolve()),
            "nodes": source.nodes,
            "channels": source.channels,
            "dtype": source.dtype,
            "bytes": status.st_size,
            "changed": status.st_mtime_ns,
        }
        return cls(known, chunk_nodes, dtype)

    @classmethod
    def read(cls, path: Path) -> "_State | None":
        try:
            return cls(**json.loads(path.read_bytes()))
        except FileNotFoundError:
            return None
        except (ValueError, TypeError):
            raise UserError(f"{path} is damaged: remove its folder to begin anew") from None


def work_folder(target: Path) -> Path:
    """Where what has been done for a target is kept until the target is complete: beside it."""
    return target.with_name(f".{target.name}.work")


def apply_to_file(
    layer: PackedLatentGNN,
    source: Path,
    target: Path,
    *,
    chunk_nodes: int | None = None,
    dtype: str | None = None,
    every: float = 30.0,
    progress: Progress = lambda sweep, nodes: None,
) -> None:
    """Write the layer's output for an array (N, C), the nodes of one scene.

    What is done is noted in `work_folder`, from time to time; a call with the same files goes on from there. At the end
    the target gets its name, and the folder is removed.

    Args:
        layer: whose norms are maps of each node, as `latentgnn.streaming.gather_chunks` wants it.
        source: a ``.npy`` file.
        target: likewise, a new one.
        chunk_nodes: of a chunk; ``None`` chooses.
        dtype: of the target, ``None`` for that of the source.
        every: seconds between notes.
        progress: is called after each chunk.

    Raises:
        UserError: the layer has other norms; the source is no such file, has other channels than the layer, or has
            changed since it was begun with; the target is there; or the work folder is of something else.
    """
    if (reason := why_not_halves(layer.arrangement())) is not None:
        raise UserError(f"this layer cannot take the nodes of {source} in chunks: {reason}")
    given = NpyFile.open(source)
    if given.channels != layer.config.channels:
        raise UserError(f"{source} has {given.channels} channels (N, C), the layer has {layer.config.channels}")
    if given.nodes == 0:
        raise UserError(f"{source} has no nodes: its shape is (0, {given.channels})")
    if os.path.lexists(target):
        raise UserError(f"{target} is there already: name another file, or move it away")
    work = work_folder(target)
    work.mkdir(parents=True, exist_ok=True)
    count = chunk_nodes or max(_NUMBERS // given.channels, 1)
    state = _begun(work, _State.of(given, count, dtype or given.dtype))
    job = _Job(layer, given, work, state, every, progress)
    job.scatter(job.gather())
    with concerning(target):
        os.replace(work / _OUTPUT, target)
    _empty(work)
    with suppress(OSError):
        # What else is in it is the caller's.
        work.rmdir()


def _begun(work: Path, asked: _State) -> _State:
    """The state in a work folder, which must be of what is asked for; a new one where there is none."""
    found = _State.read(work / _STATE)
    if found is not None and found.scattered and not (work / _OUTPUT).exists():
        # A call that was ended when its target had got its name, which has been moved away since.
        found = None
    if found is None:
        _empty(work)
        write_json(work / _STATE, asdict(asked))
        return asked
    anew = f"remove {work} to begin anew"
    if found.source != asked.source:
        changed = sorted(name for name, value in asked.source.items() if found.source.get(name) != value)
        raise UserError(
            f"{asked.source['path']} is not what {work} was begun with, or has changed since ({', '.join(changed)}): "
            f"{anew}"
        )
    if found.dtype != asked.dtype:
        raise UserError(f"{work} was begun with output in {found.dtype}, not {asked.dtype}: say the same, or {anew}")
    return found


def _empty(work: Path) -> None:
    """Remove what has been done; the state last, for it says of what the others are."""
    for name in (_SUMS, _OUTPUT, _STATE):
        (work / name).unlink(missing_ok=True)


class _Job:
    def __init__(
        self,
        layer: PackedLatentGNN,
        source: NpyFile,
        work: Path,
        state: _State,
        every: float,
        progress: Progress,
    ) -> None:
        self._layer, self._source, self._work, self._state = layer, source, work, state
        self._every, self._progress = every, progress

    def gather(self) -> LatentSums:
        """The first sweep, from where the sums in the work folder end."""
        path, noted = self._work / _SUMS, time.monotonic()
        sums, anew = LatentSums.load(path) if path.exists() else None, f"remove {self._work} to begin anew"
        done = 0 if sums is None else sums.nodes
        with torch.no_grad():
            for first, rows in self._chunks(done):
                part = gather_chunk(self._layer, rows)
                if not part.is_finite:
                    raise UserError(
                        f"{self._source.path}: rows {first} to {first + len(rows)} hold numbers that are not finite, "
                        f"or too large for {part.compute}: take them out"
                    )
                try:
                    sums = part if sums is None else sums + part
                except UserError as error:
                    raise UserError(f"{self._work} was begun with another layer: {first_line(error)}; {anew}") from None
                if time.monotonic() - noted >= self._every or sums.nodes == self._source.nodes:
                    sums.save(path)
                    noted = time.monotonic()
                self._progress("gather", sums.nodes)
        assert sums is not None
        return sums

    def scatter(self, sums: LatentSums) -> None:
        """The second sweep, from where the output is known to be written to the disk."""
        path, state, noted = self._work / _OUTPUT, self._state, time.monotonic()
        target = NpyFile.open(path) if state.scattered else self._source.create(path, state.dtype)
        with torch.no_grad(), _Writer(target) as writer:
            for first, rows in self._chunks(state.scattered):
                try:
                    out = _in_type(scatter_chunk(self._layer, rows, sums), state.dtype)
                except UserError as error:
                    raise UserError(
                        f"{self._source.path}, rows {first} to {first + len(rows)}: {first_line(error)}; remove "
                        f"{self._work} to begin anew"
                    ) from None
                done = first + len(rows)
                writer.write(first, out)
                if time.monotonic() - noted >= self._every or done == self._source.nodes:
                    writer.sync()
                    write_json(self._work / _STATE, {**asdict(state), "scattered": done})
                    noted = time.monotonic()
                self._progress("scatter", done)

    def _chunks(self, done: int) -> Iterator[tuple[int, NDArray[Any]]]:
        """Rows from a number on, each chunk read while the one before is worked at; its memory is used again."""
        source, count = self._source, self._state.chunk_nodes
        firsts = range(done, source.nodes, count)
        memories = [np.empty((min(count, source.nodes), source.channels), source.dtype) for _ in range(2)]
        with source.path.open("rb", buffering=0) as file, ThreadPoolExecutor(1) as reader:

            def read(index: int) -> NDArray[Any]:
                rows = memories[index % 2][: source.nodes - firsts[index]]
                source.read(file, firsts[index], rows)
                return rows

            ahead = reader.submit(read, 0) if firsts else None
            for index, first in enumerate(firsts):
                assert ahead is not None
                rows = ahead.result()
                ahead = reader.submit(read, index + 1) if index + 1 < len(firsts) else None
                yield first, rows


class _Writer:
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

    def __enter__(self) -> "_Writer":
        return self

    def __exit__(self, *error: object) -> None:
        self._thread.shutdown()
        self._file.close()

    def write(self, first: int, rows: NDArray[Any]) -> None:
        """Begin to write rows, which must stay as they are."""
        self._wait()
        self._waiting = self._thread.submit(self._write, first, rows)

    def sync(self) -> None:
        """Return when all that was written is on the disk."""
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


def _in_type(out: Tensor, dtype: str) -> NDArray[Any]:
    """As an array of this type.

    Raises:
        UserError: some numbers do not fit.
    """
    narrow = out.to(getattr(torch, dtype))
    # An exponent whose bits are all ones is infinity, or no number.
    if dtype == "float16" and narrow.view(torch.int16).bitwise_and(0x7FFF).amax() >= 0x7C00:
        raise UserError("the output is too large for float16: ask for float32")
    return narrow.cpu().numpy()
