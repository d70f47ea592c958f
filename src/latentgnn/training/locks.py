"""One process at a time on a run's folder."""

import errno
import json
import os
import platform
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from latentgnn.errors import UserError

LOCK = ".lock"

_MEANT_FOR_PEOPLE = 1024  # bytes that are read of who holds a lock
# Locks of a process do not keep the process itself out, so it counts what it holds: device and inode of each.
_held: set[tuple[int, int]] = set()
_guard = threading.Lock()


@contextmanager
def sole_use(folder: Path) -> Iterator[None]:
    """Keep all other processes out of a folder while the block runs.

    It is a POSIX record lock (``fcntl.lockf``) on ``.lock`` in the folder. The kernel gives it up with the process,
    however that ends, and no process that it has forked keeps it; so nothing is left of it after ``kill -9`` or a
    restart of the machine, and the file may stay. The file says who holds the lock, for the message alone.

    How far that goes: it holds on local file systems, and between machines on NFS (with its lock service, as version 4
    always has), on Lustre mounted with ``flock``, GPFS, CephFS and SMB. After a power cut of the machine that held it,
    an NFS server gives it up when the machine is back or its lease has run out, after a minute or two. Where a file
    system knows no locks, a line says so and the block runs; on Windows it runs without a lock. A process that takes
    the folder by another mount without locks is not kept out.

    Raises:
        UserError: another process, or this one, uses it; the message names it.
    """
    if sys.platform == "win32":
        yield
        return
    import fcntl

    path = folder / LOCK
    with _guard:
        # Asked before the file is opened: closing any descriptor of it would give up the lock that this process has.
        if path.exists() and _identity(os.stat(path)) in _held:
            raise UserError(f"{folder} is in use by this process already")
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)
        try:
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP):
                holder = _holder(descriptor)
                os.close(descriptor)
                if error.errno not in (errno.EAGAIN, errno.EACCES):
                    raise
                raise UserError(
                    f"{folder} is in use by {holder}: wait for it, stop it, or name another folder"
                ) from None
            print(f"{folder} cannot be locked on its file system: make sure that no other process trains into it")
        key = _identity(os.fstat(descriptor))
        _held.add(key)
    try:
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, _self_description(), 0)
        yield
    finally:
        with _guard:
            _held.discard(key)
            os.close(descriptor)


def _identity(status: os.stat_result) -> tuple[int, int]:
    return status.st_dev, status.st_ino


def _self_description() -> bytes:
    since = time.strftime("%Y-%m-%d %H:%M:%S %Z")
    return json.dumps({"process": os.getpid(), "host": platform.node(), "since": since}).encode()


def _holder(descriptor: int) -> str:
    """Who holds a lock, in words; its file may be of any content."""
    try:
        found = json.loads(os.pread(descriptor, _MEANT_FOR_PEOPLE, 0))
        text = f"process {found['process']:d} on {found['host']:.80s} since {found['since']:.40s}"
        return text if text.isprintable() else "another process"
    except (ValueError, TypeError, LookupError, RecursionError):
        return "another process"
