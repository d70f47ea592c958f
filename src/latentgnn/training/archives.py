"""Archives with a digest: what was written is what is read.

A checkpoint is a zip archive, as `torch.save` writes it, whose comment is the SHA-256 digest of all bytes before it:
``torch.load`` and ``unzip`` read it as any other, and no bit of it changes unnoticed. The digest lies in the file and
not beside it, so that the two take their name in one step.
"""

import hashlib
import os
from typing import BinaryIO
from zipfile import ZIP_STORED, BadZipFile, ZipFile

_MARK = b"sha256:"
_COMMENT = len(_MARK) + 64
_END = 22  # bytes of an archive's last record, which its comment's length ends
_BLOCK = 2**20


def seal(file: BinaryIO) -> None:
    """Append the digest of an archive to it, as its comment."""
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
    """Make sure that an archive is as it was written.

    Returns:
        Whether it has a digest. Without one (PyTorch's own tools have written it again), the checksums of the archive's
        records were compared.

    Raises:
        ValueError: it is not as it was written, or no archive of `torch.save`.
    """
    size = file.seek(0, os.SEEK_END)
    if size == 0:
        raise ValueError("it is empty")
    file.seek(max(0, size - _COMMENT))
    comment = file.read()
    sealed = comment.startswith(_MARK)
    if sealed and _digest(file, size - _COMMENT) != comment.removeprefix(_MARK):
        raise ValueError("its digest differs from its content's")
    # zipfile and PyTorch put up with a comment that is cut short or gone.
    if not sealed and not (comment[-_END:].startswith(b"PK\5\6") and comment.endswith(b"\0\0")):
        raise ValueError("its end is not a checkpoint's: it was cut short, or is something else")
    try:
        with ZipFile(file) as archive:
            _check_records(archive, size, sealed=sealed)
    except (BadZipFile, NotImplementedError, EOFError) as error:
        raise ValueError(str(error)) from None
    return sealed


def _check_records(archive: ZipFile, size: int, *, sealed: bool) -> None:
    # What unpacks to more than the file holds was made to fill the memory.
    records = archive.infolist()
    if any(record.compress_type != ZIP_STORED for record in records) or sum(r.file_size for r in records) > size:
        raise ValueError("it is packed, which no checkpoint is")
    if not sealed and (bad := archive.testzip()) is not None:
        raise ValueError(f"the checksum of {bad} in it differs from its content's")
