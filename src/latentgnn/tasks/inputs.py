"""Input files given by name, folder or pattern; the names of their results; and errors in some of several inputs."""

import glob
import os
import unicodedata
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from latentgnn.errors import UserError, first_line, is_lack_of_memory, is_lasting, told
from latentgnn.files.reading import regular_file


def expand_inputs(
    inputs: Sequence[str | Path], *, suffixes: Collection[str], kind: str, check: Callable[[Path], None]
) -> list[Path]:
    """Expand files, folders and patterns to files, each once, in the order given.

    A folder stands for the files directly in it. A pattern (``*``, ``?``, ``[...]``, and ``**`` for folders at any
    depth) stands for the files that it matches. Both are sorted and skip files of other kinds; a file that is given by
    name must be of the right kind.

    Args:
        inputs: files, folders and patterns; a pattern must be quoted in a shell that would expand it.
        suffixes: suffixes of the kind, in lower case, such as ``.png``.
        kind: name of such a file in errors, in the singular.
        check: raises `UserError` for a file that is not of the kind.

    Raises:
        UserError: if an input does not exist, is not of the kind, or stands for no file of it.
    """
    if not inputs:
        raise UserError(f"no input: give {kind} files, folders or quoted patterns")
    # An input may occur twice, as a file and by its folder.
    files: dict[Path, Path] = {}
    for entry in inputs:
        for path in _expand(entry, suffixes, kind, check):
            files.setdefault(path.resolve(), path)
    return list(files.values())


def result_names(paths: Sequence[Path]) -> list[Path]:
    """Return a name without suffix for the result of each file: its path relative to the common folder of all files.

    Files that differ only in the suffix are numbered. So are those that differ only in case or in the Unicode form of
    accents, because they would collide in file systems that ignore these.

    Example:
        >>> [name.as_posix() for name in result_names([Path("a/x.png"), Path("b/x.png"), Path("b/x.jpg")])]
        ['a/x', 'b/x', 'b/x-2']
    """
    full = [Path(os.path.abspath(path)) for path in paths]
    try:
        common = os.path.commonpath([path.parent for path in full]) if full else ""
        names = [path.relative_to(common).with_suffix("") for path in full]
    except ValueError:
        # Paths on several drives have no common folder.
        names = [Path(path.stem) for path in full]
    unique: dict[str, Path] = {}
    for name in names:
        free, number = name, 1
        while _one_case(free) in unique:
            number += 1
            free = name.with_name(f"{name.name}-{number}")
        unique[_one_case(free)] = free
    return list(unique.values())


@contextmanager
def noted(faults: list[str], path: Path) -> Iterator[None]:
    """Wrap the work on one of several inputs: if it fails, add the fault to the list and continue with the next one.

    Errors that the next input would have too, such as a full disk, are raised. Out of memory is not: the next may be
    smaller.

    Args:
        faults: list to which faults are added.
        path: the input, for faults that do not name a file.
    """
    try:
        yield
    except UserError as error:
        faults.append(str(error))
    except (MemoryError, RuntimeError, OSError) as error:
        if is_lack_of_memory(error):
            faults.append(f"{path}: out of memory ({first_line(error)}): close other programs, or split or shrink it")
        elif isinstance(error, OSError) and error.errno is not None and not is_lasting(error):
            faults.append(told(error, path))
        else:
            raise


def in_their_order(faults: Sequence[Mapping[int, Sequence[str]]]) -> list[str]:
    """Return the faults of several processes in the order of their inputs."""
    found = [(index, told) for of_one in faults for index, listed in of_one.items() for told in listed]
    return [told for _, told in sorted(found, key=lambda fault: fault[0])]


def raise_faults(faults: Sequence[str], *, inputs: int, kind: str, out: Path) -> None:
    """Raise one error with all faults after all inputs were processed.

    Raises:
        UserError: if there are faults; it lists them.
    """
    if faults:
        listed = "\n  ".join(faults)
        if inputs == 1:
            raise UserError(f"the {kind} failed:\n  {listed}")
        rest = f"; the others are done, in {out}" if len(faults) < inputs else ""
        raise UserError(f"{len(faults)} of {inputs} {kind}s failed{rest}:\n  {listed}")


def _one_case(path: Path) -> str:
    return unicodedata.normalize("NFC", str(path).casefold())


def _expand(entry: str | Path, suffixes: Collection[str], kind: str, check: Callable[[Path], None]) -> list[Path]:
    path = Path(entry)
    listed = ", ".join(sorted(suffixes))

    def fits(path: Path) -> bool:
        return path.suffix.lower() in suffixes and path.is_file()

    if path.is_dir():
        files = sorted(file for file in path.iterdir() if fits(file))
        if not files:
            raise UserError(f"{entry}: the folder contains no {kind}s ({listed}); to include subfolders: '{path}/**/*'")
        return files
    # An existing file is a file, even if its name contains a bracket.
    if path.exists():
        check(regular_file(path))
        return [path]
    if not glob.has_magic(str(entry)):
        raise UserError(f"{entry}: no such file or folder")
    matches = sorted(Path(match) for match in glob.glob(str(entry), recursive=True))
    files = [match for match in matches if fits(match)]
    if not files:
        but = f"; it matches {len(matches)} other files or folders" if matches else ""
        raise UserError(f"{entry}: the pattern matches no {kind} ({listed}){but}")
    return files
