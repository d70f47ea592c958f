"""Output folders of commands: each command writes into its own folder, one whole file after the other.

A command only ever creates files. Existing files are not written to, through whatever path, so its inputs cannot be
overwritten. There is one documented exception: with ``--overwrite``, results of an earlier command in the same folder
are removed, only those in its list, and only if the command does not read them.
"""

import json
import os
import shlex
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

from latentgnn.errors import UserError, concerning, system_error, told
from latentgnn.files.growing_lists import GrowingList
from latentgnn.files.unfinished import Unfinished
from latentgnn.files.writing import write_bytes

LIST = ".latentgnn-results"
"""The file in a folder of results that lists them, one JSON string per line; a name is added before its file."""


def try_folder(folder: Path) -> None:
    """Create a folder and test that it can be written to, so that a command fails before its work.

    Raises:
        OSError: if it cannot be created or written to.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with concerning(folder), tempfile.TemporaryFile(dir=folder) as file:
        file.write(bytes(4096))
        file.flush()


def refuse_to_replace(targets: Iterable[Path], *, reads: Iterable[Path]) -> None:
    """Check that no target is, through a link or another spelling, a file that is read.

    Raises:
        UserError: if one is; the message names it.
    """
    # Most targets do not exist yet, and then no file needs to be checked.
    present = {identity: target for target in targets if (identity := _identity(target)) is not None}
    for path in reads if present else ():
        identity = _identity(path)
        if identity in present:
            raise UserError(
                f"{present[identity]} would be replaced, but it is {path}, which is read: write to another folder"
            )


def quoted(path: Path) -> str:
    """Quote a path for a shell, for commands that are shown to the user."""
    return shlex.quote(str(path))


def say_end(written: Path, *following: str) -> None:
    """Print what a command wrote, and which commands may follow."""
    print(f"written to {written}")
    say_next(*following)


def say_next(*commands: str) -> None:
    """Print which commands may follow."""
    for command in commands:
        print(f"next: {command}")


class Results:
    """A folder for a command's results; a context manager that checks it before any work.

    Results appear one by one, each complete. If the work ends early, existing results are kept, and the error says so.
    A folder that was created for results and got none is removed.

    Args:
        folder: new or empty; or with results of an earlier command, if they may be replaced.
        names: names of the files that will be written, as far as known, relative to the folder.
        reads: files that the command reads, as far as known.
        overwrite: remove the results of an earlier command; they are kept until the first new one is written.
        first: whether this is the first or only process of the command. It checks the folder, removes what is replaced
            and lists all results (`announce`) before the others write theirs; only it has lists that grow.
        task: given by a command that continues where it was interrupted, see `latentgnn.files.unfinished.Unfinished`.
            Then its finished results are kept (`has`), and `unfinished` is the same folder as before.

    Raises:
        UserError: if the folder is a file, contains something else, or contains results that may not be replaced.
        OSError: if it cannot be created or written to.
    """

    def __init__(
        self,
        folder: Path,
        names: Iterable[Path | str] = (),
        *,
        reads: Iterable[Path] = (),
        overwrite: bool = False,
        first: bool = True,
        task: Mapping[str, Any] | None = None,
    ) -> None:
        self.folder = folder
        self._first = first
        self._task = task
        self._kept: list[Path] = []
        self._names = [Path(name) for name in names]
        self._reads = list(reads)
        self._overwrite = overwrite
        self._old: list[Path] = []
        self._list: BinaryIO | None = None
        self._made = False
        self._had_list = False

    def __enter__(self) -> "Results":
        if not self._first:
            return self
        folder = self.folder
        if folder.exists() and not folder.is_dir():
            raise UserError(f"{folder}: a folder to write to is needed, but this is a file")
        self._made = not folder.exists()
        self._work = Unfinished(folder, self._task, overwrite=self._overwrite)
        self._old = _listed(folder)
        if self._work.goes_on:
            self._old, self._kept = [], self._old
        self._had_list = _is_list(folder / LIST)
        present = [] if self._made else sorted(path.name for path in folder.iterdir())
        if self._work.found:
            present.remove(self._work.path.name)
        if present and not self._had_list:
            raise UserError(
                f"{folder} is not empty, and what it holds ({_some(present)}) is not known as a command's results: "
                "name a new or an empty folder with --out"
            )
        if self._old and not self._overwrite:
            names = [str(path.relative_to(folder)) for path in self._old]
            raise UserError(
                f"{folder} holds the results of an earlier command ({_some(names)}): name another folder with --out, "
                "or replace them with --overwrite"
            )
        self.reads(self._reads)
        # By identity: on a file system that ignores case, the same file has several names.
        replaced = {_identity(path) for path in self._old}
        for path in (folder / name for name in self._names):
            if path not in (*self._old, *self._kept) and _identity(path) not in replaced:
                _refuse_present(path)
        try_folder(folder)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not self._first:
            return
        if error is None:
            self._work.remove()
        if self._list is not None:
            self._list.close()
        elif self._made:
            with suppress(OSError):
                self.folder.rmdir()
        if self._list is None and not self._work.begun:
            return
        kept = f"what was written before is kept in {self.folder}"
        if self._work.begun:
            kept += "; the same command goes on where this one was"
        if isinstance(error, KeyboardInterrupt):
            raise UserError(f"interrupted; {kept}") from error
        fault = system_error(error) if isinstance(error, OSError | RuntimeError) else None
        # A closed pipe is handled by the command line: it is not an error.
        if fault is not None and not isinstance(fault, BrokenPipeError):
            raise UserError(f"{told(fault)}\n{kept}") from error

    def reads(self, paths: Iterable[Path]) -> None:
        """Add files that the command reads and that were not known before.

        Raises:
            UserError: if one of the files is a result that is to be replaced.
        """
        refuse_to_replace(self._old, reads=paths)

    def has(self, name: Path | str) -> bool:
        """Whether a result exists that the same command finished before it was interrupted."""
        return self.folder / name in self._kept

    def unfinished(self) -> Path:
        """Return the folder for unfinished work, as the same command left it; removed when the results are complete."""
        if not self._work.begun:
            self._work.begin()
        return self._work.path

    def place(self, name: Path | str) -> Path:
        """Return the path for a new result and list it; the writer creates missing folders above it.

        Raises:
            UserError: if something exists there.
        """
        path = self.folder / name
        if not self._first:
            if not _is_list(self.folder / LIST):
                raise UserError(
                    f"{self.folder} is not the folder that the first process has begun to write into: give a folder "
                    "that all machines share"
                )
            _refuse_present(path)
            return path
        if self._list is None:
            self._begin()
        assert self._list is not None
        _refuse_present(path)
        with concerning(self.folder / LIST):
            self._list.write(json.dumps(str(name)).encode() + b"\n")
        return path

    def announce(self, names: Iterable[Path | str]) -> None:
        """List the results that other processes will write; this removes what is replaced, so they must wait for it."""
        for name in names:
            self.place(name)
        if self._first and self._list is None:
            self._begin()

    def write(self, name: Path | str, data: bytes) -> Path:
        """Write a result in one step."""
        path = self.place(name)
        write_bytes(path, data)
        return path

    def write_json(self, name: Path | str, value: Any) -> Path:
        """Write a result as indented JSON."""
        return self.write(name, json.dumps(value, indent=2).encode() + b"\n")

    def json_list(self, name: str) -> "GrowingList":
        """Return a result that grows; see `GrowingList`."""
        if not self._first:
            return GrowingList(None, self.folder / name)
        partial = self.place(f"{name}.partial")
        return GrowingList(partial, self.place(name))

    def _begin(self) -> None:
        if not self._work.begun:
            self._work.remove()
        for path in self._old:
            path.unlink(missing_ok=True)
        emptied = {parent for path in self._old for parent in path.parents if self.folder in parent.parents}
        for parent in sorted(emptied, reverse=True):
            # If it contains something else, it is not ours and is kept.
            with suppress(OSError):
                parent.rmdir()
        if self._had_list and not self._work.goes_on:
            (self.folder / LIST).unlink(missing_ok=True)
        try:
            self._list = (self.folder / LIST).open("ab" if self._work.goes_on else "xb", buffering=0)
        except FileExistsError:
            raise UserError(f"another command has begun to write into {self.folder}: name another folder") from None


def _identity(path: Path) -> tuple[int, int] | None:
    """An identity that is the same for all names of a file; ``None`` if there is no file."""
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_dev, status.st_ino


def _is_list(path: Path) -> bool:
    return path.is_file() and not path.is_symlink()


def _listed(folder: Path) -> list[Path]:
    """The existing files in a folder's list that are inside the folder."""
    if not _is_list(folder / LIST):
        return []
    inside = folder.resolve()
    paths: dict[Path, None] = {}
    for line in (folder / LIST).read_bytes().splitlines():
        try:
            name = json.loads(line)
        except ValueError:
            # The last line of a command that was killed.
            continue
        if not isinstance(name, str) or not name or Path(name).is_absolute() or ".." in Path(name).parts:
            continue
        path = folder / name
        if (path.is_file() or path.is_symlink()) and path.parent.resolve().is_relative_to(inside):
            paths[path] = None
    return list(paths)


def _refuse_present(path: Path) -> None:
    if os.path.lexists(path):
        raise UserError(f"{path} is there already, and is no result to replace: move it, or write to another folder")


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
