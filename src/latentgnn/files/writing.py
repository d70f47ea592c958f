"""Files that are complete or absent: written under a temporary name, then renamed.

Whole files are written only through `replacing`. Its steps are separate functions (`_create`, `_complete`, `_rename`,
`_sync_folder`), so that a test can stop a process in any of them.
"""

import errno
import json
import os
import platform
import re
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from latentgnn.errors import UserError, concerning

# A temporary name begins with the file's own name, for readability, cut because file systems limit the length of names.
_LONGEST = 48
_TEMPORARY = re.compile(r"\..+\.(?P<host>[0-9a-f]{8})-(?P<process>\d+)\.tmp")
# A temporary file from another machine counts as left over after this many seconds without a change.
_DAY = 24 * 60 * 60


@contextmanager
def replacing(path: Path | str, *, before: Callable[[], None] = lambda: None) -> Iterator[BinaryIO]:
    """Open a new file for writing and reading, which gets its name when the block ends.

    Missing folders above it are created. The content is on disk before the name is, and the name is on disk before this
    returns. After an error, or if the process ends inside the block, a previous file of that name is unchanged. Errors
    of the operating system name the file, not its temporary name.

    Args:
        path: the file's name.
        before: called when the content is on disk, before the file gets its name.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = temporary_name(path)
    with concerning(path):
        try:
            with _create(temporary) as file:
                yield file
                _complete(file)
            before()
            _rename(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
        _sync_folder(path.parent)


def write_bytes(path: Path | str, data: bytes) -> None:
    """Write a whole file in one step, creating missing folders above it."""
    with replacing(path) as file:
        file.write(data)


def write_text(path: Path | str, text: str) -> None:
    """Write a whole file of UTF-8 text, like `write_bytes`."""
    write_bytes(path, text.encode())


def write_json(path: Path | str, value: Any) -> None:
    """Write a whole file of indented JSON, like `write_bytes`."""
    write_text(path, json.dumps(value, indent=2) + "\n")


def append_text(path: Path, text: str) -> None:
    """Append UTF-8 text to a file that this process, or an earlier one of the same run, has started.

    Raises:
        UserError: if it is a link, as the file that it points to could be anything.
    """
    if path.is_symlink():
        raise UserError(f"{path} is a link to another file, which is not written to: remove the link")
    with concerning(path), path.open("a", encoding="utf-8", newline="") as file:
        file.write(text)


def temporary_name(path: Path) -> Path:
    """Return the name beside ``path`` under which this process creates what will be ``path``.

    Several processes may create the same file at the same time, and `remove_leftovers` must know whose it is. So the
    name contains a hash of the machine's name, and the process id.
    """
    return path.with_name(f".{path.name[:_LONGEST]}.{_host()}-{os.getpid()}.tmp")


def is_temporary(path: Path) -> bool:
    """Whether a name is from `temporary_name`."""
    return _TEMPORARY.fullmatch(path.name) is not None


def leftovers(folder: Path) -> list[Path]:
    """Return what ended processes left in a folder and below it under temporary names.

    Call it before this process writes there, as files with its process id are then from an earlier process. Nothing is
    known of processes on other machines; theirs count as ended a day after the file's last change.
    """
    found: list[Path] = []
    for parent, folders, files in os.walk(folder):
        there = [Path(parent, name) for name in (*folders, *files)]
        found += [path for path in there if is_temporary(path) and _is_left_over(path)]
        folders[:] = [name for name in folders if _TEMPORARY.fullmatch(name) is None]
    return found


def _create(path: Path) -> BinaryIO:
    return path.open("w+b")


def _complete(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())


def _rename(temporary: Path, path: Path) -> None:
    os.replace(temporary, path)


def _sync_folder(folder: Path) -> None:
    """Write a folder's names to disk; until then, a power cut may undo a renaming."""
    if os.name != "posix":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        # Some network file systems do not support fsync of folders; they have stored the names already.
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(descriptor)


def _host() -> str:
    return f"{zlib.crc32(platform.node().encode()):08x}"


def _is_left_over(path: Path) -> bool:
    match = _TEMPORARY.fullmatch(path.name)
    assert match is not None
    if match["host"] != _host():
        return time.time() - path.lstat().st_mtime > _DAY
    return int(match["process"]) == os.getpid() or not _is_running(int(match["process"]))


def _is_running(process: int) -> bool:
    if os.name != "posix":
        # On Windows, signal 0 is not a query but Ctrl-C.
        return True
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        return True
    return True
