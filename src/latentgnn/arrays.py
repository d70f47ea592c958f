"""Applies a layer to a NumPy file that may be larger than memory, in two sweeps that can be interrupted.

Axes: N nodes, C channels.
"""

import json
import os
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from latentgnn.errors import UserError, concerning, first_line
from latentgnn.files.npy_files import NpyFile, RowWriter
from latentgnn.files.writing import write_json
from latentgnn.halves import why_not_halves
from latentgnn.points import PackedLatentGNN
from latentgnn.streaming import gather_chunk, scatter_chunk
from latentgnn.sums import LatentSums

Progress = Callable[[str, int], None]
"""Called with the sweep, ``gather`` or ``scatter``, and the number of nodes done."""

# Elements per chunk: 8 MiB in float32. Much larger tensors are newly allocated by the system each time, and touching
# them first takes as long as a part of the layer; much smaller ones cost more calls.
_NUMBERS = 1 << 21
# Files in a work folder.
_STATE, _SUMS, _OUTPUT = "state.json", "sums.safetensors", "output.npy"


@dataclass(frozen=True)
class _State:
    """A work folder's state besides the sums: what it belongs to, and how many nodes have been written."""

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
    """Return the folder beside a target that stores intermediate work until the target is complete."""
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

    Progress is saved to `work_folder` from time to time; a call with the same files continues from there. At the end
    the target gets its name, and the folder is removed.

    Args:
        layer: a layer whose norms act on each node by itself, as `latentgnn.streaming.gather_chunks` requires.
        source: a ``.npy`` file.
        target: the ``.npy`` file to create.
        chunk_nodes: number of nodes per chunk; ``None`` chooses it.
        dtype: dtype of the target, ``None`` for that of the source.
        every: seconds between saves of the progress.
        progress: called after each chunk.

    Raises:
        UserError: if the layer has other norms; the source is not such a file, has another number of channels than the
            layer, or has changed since the work began; the target exists; or the work folder belongs to something else.
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
        # Anything else in it belongs to the caller.
        work.rmdir()


def _begun(work: Path, asked: _State) -> _State:
    """The state in a work folder, which must match the request; a new one if there is none."""
    found = _State.read(work / _STATE)
    if found is not None and found.scattered and not (work / _OUTPUT).exists():
        # An earlier call was interrupted after the target got its name, and the target has been moved away since.
        found = None
    if found is None:
        _empty(work)
        write_json(work / _STATE, asdict(asked))
        return asked
    anew = f"remove {work} to begin anew"
    if found.source != asked.source:
        changed = sorted(name for name, value in asked.source.items() if found.source.get(name) != value)
        raise UserError(
            f"{work} was started with another file than {asked.source['path']}, or the file has changed since "
            f"({', '.join(changed)}): {anew}"
        )
    if found.dtype != asked.dtype:
        raise UserError(f"{work} was started with output in {found.dtype}, not {asked.dtype}: use the same, or {anew}")
    return found


def _empty(work: Path) -> None:
    """Remove intermediate work; the state last, as it says what the other files belong to."""
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
        """Run the first sweep, continuing from the sums in the work folder."""
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
                    raise UserError(
                        f"{self._work} was started with another layer: {first_line(error)}; {anew}"
                    ) from None
                if time.monotonic() - noted >= self._every or sums.nodes == self._source.nodes:
                    sums.save(path)
                    noted = time.monotonic()
                self._progress("gather", sums.nodes)
        assert sums is not None
        return sums

    def scatter(self, sums: LatentSums) -> None:
        """Run the second sweep, continuing after the output that is known to be on disk."""
        path, state, noted = self._work / _OUTPUT, self._state, time.monotonic()
        target = NpyFile.open(path) if state.scattered else self._source.create(path, state.dtype)
        with torch.no_grad(), RowWriter(target) as writer:
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
        """Yield rows from a given one on; each chunk is read into reused memory while the one before is processed."""
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


def _in_type(out: Tensor, dtype: str) -> NDArray[Any]:
    """Convert to an array of this dtype.

    Raises:
        UserError: if some values do not fit.
    """
    narrow = out.to(getattr(torch, dtype))
    # An exponent with all bits set means infinity or NaN.
    if dtype == "float16" and narrow.view(torch.int16).bitwise_and(0x7FFF).amax() >= 0x7C00:
        raise UserError("the output is too large for float16: ask for float32")
    return narrow.cpu().numpy()
