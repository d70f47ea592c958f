"""Fingerprints of a run's data: enough to notice on resuming that data have changed, without reading them again."""

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from latentgnn.training.run_files import check_plain

_ABSENT = -1  # the size of a file that is not there


@dataclass(frozen=True, kw_only=True)
class Record:
    """The source of one sample.

    Args:
        name: name shown to the user, such as its file's name; the order of records in the set matters.
        content: everything known of it without reading its files, such as boxes and labels, as plain data.
        files: the files that are read when the sample is loaded.
    """

    name: str
    content: Any = None
    files: Sequence[Path] = ()


@dataclass(frozen=True, kw_only=True, eq=False)
class Fingerprint:
    """The fingerprint of a set of samples.

    A change of a file's content is detected by its size and modification time. Times are compared only if the set is in
    the same folder as before: a copy elsewhere has its own times, and there the records and file sizes decide whether
    it is the same set. A new copy in the same place, as jobs make it on a node's local disk, counts as changed unless
    it keeps the times (``cp -p``, ``rsync -a``, ``tar``): from outside it cannot be told from files that were
    regenerated with other content, which must not go unnoticed.

    Args:
        root: the folder of the files, with links resolved.
        names: names of the records, in the set's order.
        contents: 64 bits of the digest of each record's content, int64 (N,).
        sizes: total size in bytes of each record's files, int64 (N,).
        times: latest modification time of each record's files in nanoseconds, int64 (N,); empty if times are not
            compared.
        totals: counts over the whole set, by name.
    """

    root: str
    names: Sequence[str]
    contents: NDArray[np.int64]
    sizes: NDArray[np.int64]
    times: NDArray[np.int64]
    totals: Mapping[str, int] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        root: Path | str,
        records: Iterable[Record],
        *,
        times: bool = True,
        totals: Mapping[str, int] | None = None,
    ) -> "Fingerprint":
        """Return the fingerprint of records; it calls stat on each file and opens none.

        Args:
            root: the folder of the files.
            records: the records in the set's order.
            times: whether modification times are compared; not for files that a run generates itself, always with the
                same content.
            totals: counts over the whole set, by name.
        """
        names, contents, sizes, changed = [], [], [], []
        for record in records:
            entries = [_entry(path) for path in record.files]
            names.append(record.name)
            contents.append(_digest(record.content))
            sizes.append(sum(size for size, _ in entries))
            changed.append(max((time for _, time in entries), default=0))
        return cls(
            root=os.path.realpath(root),
            names=names,
            contents=np.array(contents, np.int64),
            sizes=np.array(sizes, np.int64),
            times=np.array(changed if times else [], np.int64),
            totals=dict(totals or {}),
        )

    def to_plain(self) -> dict[str, Any]:
        """Return the form in which a checkpoint stores it: 24 bytes per record, and its name."""
        return {
            "root": self.root,
            # One string instead of a hundred thousand: a checkpoint's reader checks each object.
            "names": json.dumps(self.names),
            "contents": torch.from_numpy(self.contents),
            "sizes": torch.from_numpy(self.sizes),
            "times": torch.from_numpy(self.times),
            "totals": dict(self.totals),
        }

    def summary(self) -> dict[str, Any]:
        """Return what identifies the set to the user: folder, size, and a digest that is the same for a copy of it."""
        digest = hashlib.sha256(json.dumps(list(self.names)).encode())
        for array in (self.contents, self.sizes):
            digest.update(np.ascontiguousarray(array, "<i8").tobytes())
        return {
            "root": self.root,
            "samples": len(self.names),
            "digest": digest.hexdigest()[:32],
            "totals": dict(self.totals),
        }

    @classmethod
    def from_plain(cls, plain: Any) -> "Fingerprint":
        """Read what `to_plain` returned.

        Raises:
            ValueError: if it is something else.
        """
        try:
            arrays = {name: plain[name].numpy() for name in ("contents", "sizes", "times")}
            names = json.loads(plain["names"])
            root, totals = plain["root"], plain["totals"]
            check_plain(totals)
            lengths = {len(names), len(arrays["contents"]), len(arrays["sizes"]), len(arrays["times"]) or len(names)}
            sound = (
                isinstance(root, str)
                and isinstance(totals, dict)
                and isinstance(names, list)
                and all(isinstance(name, str) for name in names)
                and all(array.dtype == np.int64 and array.ndim == 1 for array in arrays.values())
                and len(lengths) == 1
            )
        except (KeyError, TypeError, AttributeError, RuntimeError, RecursionError):
            sound = False
        if not sound:
            raise ValueError("the data fingerprint has an unexpected structure")
        return cls(root=root, names=names, totals=totals, **arrays)


def changes(before: Fingerprint, now: Fingerprint) -> list[str]:
    """Describe each difference in words; empty if there is none."""
    old = {key: index for index, key in enumerate(_keys(before.names))}
    new = {key: index for index, key in enumerate(_keys(now.names))}
    found = [
        *_listed("removed", [name for name, number in old if (name, number) not in new], len(old)),
        *_listed("added", [name for name, number in new if (name, number) not in old], len(new)),
    ]
    common = [key for key in old if key in new]
    positions = np.array([old[key] for key in common], np.int64), np.array([new[key] for key in common], np.int64)

    def differing(array: Callable[[Fingerprint], NDArray[np.int64]]) -> list[str]:
        different = array(before)[positions[0]] != array(now)[positions[1]]
        return [common[index][0] for index in np.flatnonzero(different)]

    found += _listed("with other content", differing(lambda set: set.contents), len(old))
    sizes = differing(lambda set: set.sizes)
    found += _listed("with files of another size", sizes, len(old))
    if before.root == now.root and len(before.times) and len(now.times):
        # If the size changed, the time need not be reported too.
        touched = set(sizes)
        times = [name for name in differing(lambda set: set.times) if name not in touched]
        found += _listed("with files that were written since", times, len(old))
    found += [
        f"{name}: was {before.totals.get(name, 0)}, is {now.totals.get(name, 0)}"
        for name in dict.fromkeys((*before.totals, *now.totals))
        if before.totals.get(name, 0) != now.totals.get(name, 0)
    ]
    if (np.diff(positions[1]) < 0).any():
        found.append("the order is another")
    return found


def _listed(what: str, names: Sequence[str], total: int) -> Iterator[str]:
    if names:
        count = f"all {total}" if len(names) == total > 1 else str(len(names))
        yield f"{count} {what} ({'first ' if len(names) > 1 else ''}{names[0]})"


def _keys(names: Sequence[str]) -> Iterator[tuple[str, int]]:
    """Yield names, each with the number of its earlier occurrences, which makes them unique."""
    seen: dict[str, int] = {}
    for name in names:
        seen[name] = seen.get(name, -1) + 1
        yield name, seen[name]


def _entry(path: Path) -> tuple[int, int]:
    """A file's size and its modification time in nanoseconds."""
    try:
        status = path.stat()
    except FileNotFoundError:
        return _ABSENT, 0
    return status.st_size, status.st_mtime_ns


def _digest(content: Any) -> int:
    text = json.dumps(content, sort_keys=True, separators=(",", ":"))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little", signed=True)
