"""Errors that users can fix: their class, the system's errors in words, out of memory, and missing packages."""

import errno
import importlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

_LONGEST_PATH = 200

# Advice for errors of the operating system whose own message does not say what to do.
_ADVICE = {
    errno.ENOSPC: "free some space, or write to another place",
    errno.EDQUOT: "free some of your quota, or write to another place",
    errno.EROFS: "write to another place",
    errno.EACCES: "change its permissions or those of the folders above it, or name another place",
    errno.EPERM: "change its permissions or those of the folders above it, or name another place",
    errno.EFBIG: "the limit on the size of files is reached (`ulimit -f`, or the file system's own)",
    errno.EIO: "the disk, or the connection to it, fails",
    errno.EISDIR: "a file is needed, but this is a folder",
    errno.ENOTDIR: "a part of this path is a file, but a folder is needed",
    errno.EEXIST: "something else is there; name another place",
    errno.ENAMETOOLONG: "give it a shorter name",
    errno.ELOOP: "its symbolic links lead in a circle",
    errno.EMFILE: "raise `ulimit -n`, or take fewer loading processes (--training.workers)",
    errno.ENFILE: "close other programs, or take fewer loading processes (--training.workers)",
    errno.ENOMEM: "close other programs, or take smaller batches or fewer loading processes",
    errno.EPIPE: "the program that took the output has ended",
}

# Errors that the next file would have too.
_LASTING = {
    *(errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.EPIPE),
    *(errno.EMFILE, errno.ENFILE, errno.ENODEV, errno.ENXIO, errno.ESTALE),
}

# PyTorch has a class for out of memory only on accelerators; its message contains one of these too.
_NO_MEMORY = (
    "can't allocate memory",
    "not enough memory",
    "out of memory",
    "Cannot allocate memory",
    "Unable to allocate",
    "_ALLOC_FAILED",
)


class UserError(Exception):
    """A mistake in data, configuration or set-up; its message says what was found, what was expected and what to do."""


def system_error(error: BaseException) -> OSError | None:
    """Return an error of the operating system, or one that a library has wrapped in its own; otherwise ``None``.

    Example:
        >>> system_error(FileNotFoundError(2, "No such file or directory", "a.png")).filename
        'a.png'
        >>> system_error(ZeroDivisionError()) is None
        True
    """
    if isinstance(error, OSError) and error.errno is not None:
        return error
    # Not the context of every error: what goes wrong while an error is being handled is a separate error.
    wrapped = error.__context__ if isinstance(error, OSError | RuntimeError) else None
    inner = error.__cause__ or (None if error.__suppress_context__ else wrapped)
    return system_error(inner) if inner is not None else None


def told(error: OSError, where: Path | str | None = None) -> str:
    """Describe an error of the operating system in one line: the path, what is wrong with it, and what to do.

    Args:
        error: an error with ``errno``.
        where: the path, used if the error has none.

    Example:
        >>> told(OSError(errno.ENOSPC, "No space left on device", "out/a.png"))
        'out/a.png: no space left on device: free some space, or write to another place'
    """
    name = error.filename if error.filename is not None else where
    path = "" if name is None else f"{_shortened(os.fsdecode(name) if isinstance(name, bytes) else str(name))}: "
    return f"{path}{reason(error)}"


def reason(error: OSError) -> str:
    """`told` without the path, for callers that add it themselves."""
    what = error.strerror or (os.strerror(error.errno) if error.errno is not None else str(error))
    what = f"{what[:1].lower()}{what[1:]}"
    advice = _ADVICE.get(error.errno or 0)
    return f"{what}: {advice}" if advice else what


def is_lasting(error: OSError) -> bool:
    """Whether the next file would probably have the same error, for example because the disk is full."""
    return error.errno in _LASTING


def is_lack_of_memory(error: BaseException) -> bool:
    """Whether an error of Python, NumPy, PyTorch or the operating system means out of memory.

    Example:
        >>> is_lack_of_memory(RuntimeError("CUDA out of memory. Tried to allocate 8.00 GiB."))
        True
    """
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno == errno.ENOMEM
    # An error from a loading process arrives as text, without an error number.
    spoken = isinstance(error, OSError | RuntimeError) and any(text in str(error) for text in _NO_MEMORY)
    return isinstance(error, MemoryError) or spoken


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, or its class if it has no message."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


@contextmanager
def concerning(path: Path | str) -> Iterator[None]:
    """Set this path in errors of the operating system that have none, or only a temporary name."""
    try:
        yield
    except Exception as error:
        if (fault := system_error(error)) is not None:
            fault.filename, fault.filename2 = str(path), None
        raise


def require(module: str, *, extra: str) -> ModuleType:
    """Import an optional package; if it is missing, say which extra installs it.

    Args:
        module: name of the package to import.
        extra: the extra of latentgnn that installs it.

    Raises:
        UserError: if the package is not installed.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.split(".")[0] != module.split(".")[0]:
            raise
        raise UserError(f"this needs {module!r}, which is not installed: pip install 'latentgnn[{extra}]'") from None


def _shortened(path: str) -> str:
    half = _LONGEST_PATH // 2
    return path if len(path) <= _LONGEST_PATH else f"{path[:half]}...{path[-half:]}"
