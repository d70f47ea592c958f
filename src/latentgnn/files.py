"""Files that are complete or absent: written under a temporary name, then renamed.

`replacing` is the one way in which the project writes a file. Its steps are functions of their own (`_create`,
`_complete`, `_rename`, `_sync_folder`), so that a test can stop a process in any of them.
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

# A temporary file's own name comes first, for people; it is cut because file systems limit the length of names.
_LONGEST = 48
_TEMPORARY = re.compile(r"\..+\.(?P<host>[0-9a-f]{8})-(?P<process>\d+)\.tmp")
# After this many seconds without a change, a temporary file of another machine is left over too.
_DAY = 24 * 60 * 60


@contextmanager
def replacing(path: Path | str, *, before: Callable[[], None] = lambda: None) -> Iterator[BinaryIO]:
    """A new file, open to write and to read, that takes its name when the block ends.

    The folders above it are made. The content is on the disk before the name is, and the name is before this returns;
    after an error, or if the process ends inside, whatever had the name before still has it. Errors of the operating
    system name the file, not its temporary name.

    Args:
        path: the name.
        before: called when the content is on the disk, before it takes its name.
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
    """Write a whole file in one step, with the folders above it."""
    with replacing(path) as file:
        file.write(data)


def write_text(path: Path | str, text: str) -> None:
    """`write_bytes` of UTF-8 text."""
    write_bytes(path, text.encode())


def write_json(path: Path | str, value: Any) -> None:
    """`write_bytes` of indented JSON."""
    write_text(path, json.dumps(value, indent=2) + "\n")


def append_text(path: Path, text: str) -> None:
    """Write UTF-8 text to the end of a file that this process, or an earlier one of the same run, has begun.

    Raises:
        UserError: it is a link, and what is appended to may be anything.
    """
    if path.is_symlink():
        raise UserError(f"{path} is a link to another file, which is not written to: remove the link")
    with concerning(path), path.open("a", encoding="utf-8", newline="") as file:
        file.write(text)


def temporary_name(path: Path) -> Path:
    """Where this process makes what is to be a file or folder ``path``, beside it.

    Several processes may make the same thing side by side, and `remove_leftovers` must know whose it is: the name has
    a hash of the machine's name, and the process's number.
    """
    return path.with_name(f".{path.name[:_LONGEST]}.{_host()}-{os.getpid()}.tmp")


def is_temporary(path: Path) -> bool:
    """Whether a name is one of `temporary_name`'s."""
    return _TEMPORARY.fullmatch(path.name) is not None


def leftovers(folder: Path) -> list[Path]:
    """What processes that have ended left in a folder, and below it, under temporary names.

    To be called before this process writes there: what has its number is an earlier process's. Of other machines'
    processes nothing is known; theirs count as ended a day after their last change.
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
    """Put a folder's names on the disk: until then, a power cut may undo a renaming."""
    if os.name != "posix":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        # Some network file systems know no fsync of folders; they have put the names there already.
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
        # There, signal 0 is no question but Ctrl-C.
        return True
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        return True
    return True
