"""A lock that allows one process at a time in a run's folder."""

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

_MEANT_FOR_PEOPLE = 1024  # how many bytes are read of the text that says who holds a lock
# A process is not kept out by its own locks, so it records which it holds, by device and inode.
_held: set[tuple[int, int]] = set()
_guard = threading.Lock()


@contextmanager
def sole_use(folder: Path) -> Iterator[None]:
    """Keep all other processes out of a folder while the block runs.

    It is a POSIX record lock (``fcntl.lockf``) on ``.lock`` in the folder. The kernel releases it when the process
    ends, however that happens, and forked processes do not inherit it. So nothing is left of it after ``kill -9`` or a
    reboot, and the file may stay. The file's content names the holder, for error messages only.

    Limits: the lock works on local file systems and, between machines, on NFS (with its lock service, as version 4
    always has), on Lustre mounted with ``flock``, GPFS, CephFS and SMB. If the machine that holds it loses power, an
    NFS server releases it when the machine is back or its lease has expired, after a minute or two. If the file system
    does not support locks, a line says so and the block runs; on Windows it runs without a lock. A process that uses
    the folder through another mount without locks is not kept out.

    Raises:
        UserError: if the folder is in use by another process, or by this one; the message names it.
    """
    if sys.platform == "win32":
        yield
        return
    import fcntl

    path = folder / LOCK
    with _guard:
        # Checked before the file is opened: closing any descriptor of it would release the lock that this process
        # holds.
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
    """Describe who holds a lock; the file may have any content."""
    try:
        found = json.loads(os.pread(descriptor, _MEANT_FOR_PEOPLE, 0))
        text = f"process {found['process']:d} on {found['host']:.80s} since {found['since']:.40s}"
        return text if text.isprintable() else "another process"
    except (ValueError, TypeError, LookupError, RecursionError):
        return "another process"
