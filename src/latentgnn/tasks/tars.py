"""Images in tar files: a tar file may be used like a folder, and each image is read from its place in it.

``train.tar/0001.jpg`` is the path of the member ``0001.jpg``. On the file systems of clusters, a million files are slow
to copy and to list, while a thousand tar files are not. The order of images is not affected: unlike programs that read
tar files from front to back, this reads each image once per epoch, in an order that depends only on the seed.
"""

import hashlib
import io
import posixpath
import tarfile
import threading
from functools import cache
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray

from latentgnn.errors import UserError, concerning
from latentgnn.files.reading import UnreadableError, regular_file

_SUFFIX = ".tar"
_DIGEST = 16
# Otherwise several threads of a process would scan the same tar file at once.
_lock = threading.Lock()


def is_folder(path: Path) -> bool:
    """Whether a path can contain images: a folder or a tar file."""
    return path.is_dir() or (path.suffix == _SUFFIX and path.is_file())


def file_of(path: Path) -> Path:
    """Return the file that contains an image: its own, or the tar file that it is in."""
    return next((parent for parent in path.parents if parent.suffix == _SUFFIX and parent.is_file()), path)


def open_file(path: Path | str) -> BinaryIO:
    """Open an image file, or a member of a tar file, for reading.

    Raises:
        UserError: if it does not exist, is not a regular file, or the tar file cannot be read.
    """
    path = Path(path)
    tar = file_of(path)
    if tar == path:
        return regular_file(path, "image").open("rb")
    with concerning(tar), tar.open("rb") as file:
        status = tar.stat()
        with _lock:
            members = _members(tar, status.st_size, status.st_mtime_ns)
        place = members.place_of(path.relative_to(tar).as_posix())
        if place is None:
            raise UnreadableError(path, "", f"there is no such image in {tar.name}")
        start, length = place
        file.seek(start)
        content = file.read(length)
    if len(content) < length:
        raise UnreadableError(path, "", f"{tar.name} is cut short within this image")
    return io.BytesIO(content)


class _Members:
    """Positions of the files in a tar file, by digests of their names: 32 bytes each, as there may be millions.

    Args:
        names: names of the files; if one occurs twice, the last counts, as for ``tar``.
        starts: offsets of their first bytes.
        lengths: their sizes.
    """

    def __init__(self, names: list[bytes], starts: list[int], lengths: list[int]) -> None:
        digests = np.array(names, f"S{_DIGEST}")
        order = np.argsort(digests, kind="stable")
        self._digests = digests[order]
        self._starts: NDArray[np.int64] = np.array(starts, np.int64)[order]
        self._lengths: NDArray[np.int64] = np.array(lengths, np.int64)[order]

    def place_of(self, name: str) -> tuple[int, int] | None:
        """Return start and size of a file."""
        digest = np.array(_digest(name), self._digests.dtype)
        place = int(np.searchsorted(self._digests, digest, side="right")) - 1
        if place < 0 or self._digests[place] != digest:
            return None
        return int(self._starts[place]), int(self._lengths[place])


@cache
def _members(path: Path, size: int, time: int) -> _Members:
    """The members of a tar file; it is scanned again if its size or time has changed."""
    names: list[bytes] = []
    starts: list[int] = []
    lengths: list[int] = []
    try:
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                if member.isreg() and not member.issparse():
                    names.append(_digest(member.name))
                    starts.append(member.offset_data)
                    lengths.append(member.size)
                # Otherwise it would keep all of them.
                tar.members.clear()  # type: ignore[attr-defined]
    except tarfile.TarError as error:
        raise UserError(
            f"{path} cannot be read as a tar file ({error}): make it again, without compression (tar -cf)"
        ) from error
    return _Members(names, starts, lengths)


def _digest(name: str) -> bytes:
    return hashlib.blake2b(posixpath.normpath(name).encode("utf-8", "surrogateescape"), digest_size=_DIGEST).digest()
