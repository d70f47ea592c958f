"""Archives with a digest, which shows whether a file is still as it was written.

A checkpoint is a zip archive as `torch.save` writes it. Its comment is the SHA-256 digest of all bytes before it.
``torch.load`` and ``unzip`` read it like any other archive, and any changed bit is noticed. The digest is inside the
file, not beside it, so that both get their final name in one step.
"""

import hashlib
import os
from typing import BinaryIO
from zipfile import ZIP_STORED, BadZipFile, ZipFile

_MARK = b"sha256:"
_COMMENT = len(_MARK) + 64
_END = 22  # size in bytes of an archive's end record, whose last field is the length of the comment
_BLOCK = 2**20


def seal(file: BinaryIO) -> None:
    """Append the digest of an archive as its comment."""
    end = file.seek(-2, os.SEEK_END)
    assert file.read() == b"\0\0", "the archive has a comment already"
    file.seek(end)
    file.write(_COMMENT.to_bytes(2, "little"))
    digest = _digest(file, end + 2)
    file.seek(0, os.SEEK_END)
    file.write(_MARK + digest)


def _digest(file: BinaryIO, size: int) -> bytes:
    """The hexadecimal digest of a file's first bytes."""
    digest = hashlib.sha256()
    file.seek(0)
    while size:
        block = file.read(min(size, _BLOCK))
        if not block:
            break
        digest.update(block)
        size -= len(block)
    return digest.hexdigest().encode()


def check_archive(file: BinaryIO) -> bool:
    """Check that an archive is unchanged since it was written.

    Returns:
        True if the archive has a digest. False if it has none (PyTorch's own tools have rewritten it); then the
        checksums of its records were compared instead.

    Raises:
        ValueError: if it has changed, or is not an archive written by `torch.save`.
    """
    size = file.seek(0, os.SEEK_END)
    if size == 0:
        raise ValueError("it is empty")
    file.seek(max(0, size - _COMMENT))
    comment = file.read()
    sealed = comment.startswith(_MARK)
    if sealed and _digest(file, size - _COMMENT) != comment.removeprefix(_MARK):
        raise ValueError("its digest differs from its content's")
    # zipfile and PyTorch accept an archive whose comment is truncated or missing.
    if not sealed and not (comment[-_END:].startswith(b"PK\5\6") and comment.endswith(b"\0\0")):
        raise ValueError("its end is not a checkpoint's: it was cut short, or is something else")
    try:
        with ZipFile(file) as archive:
            _check_records(archive, size, sealed=sealed)
    except (BadZipFile, NotImplementedError, EOFError) as error:
        raise ValueError(str(error)) from None
    return sealed


def _check_records(archive: ZipFile, size: int, *, sealed: bool) -> None:
    # An archive that unpacks to more bytes than the file has was made to fill the memory.
    records = archive.infolist()
    if any(record.compress_type != ZIP_STORED for record in records) or sum(r.file_size for r in records) > size:
        raise ValueError("it is compressed, and checkpoints never are")
    if not sealed and (bad := archive.testzip()) is not None:
        raise ValueError(f"the checksum of {bad} in it differs from its content's")
