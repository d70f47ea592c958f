"""Files that a user names outright, by folders and by patterns; what comes of each, under which name."""

import glob
import os
import unicodedata
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from latentgnn.errors import UserError, first_line, is_lack_of_memory, is_lasting, told
from latentgnn.reading import regular_file


def expand_inputs(
    inputs: Sequence[str | Path], *, suffixes: Collection[str], kind: str, check: Callable[[Path], None]
) -> list[Path]:
    """The files that files, folders and patterns name, each once, in the order given.

    A folder gives the files that lie in it, not those of folders within it. A pattern (``*``, ``?``, ``[...]``, and
    ``**`` for folders at any depth) gives the files that it matches. Both are sorted and pass over files of other
    kinds; a file that is named outright must be of the kind.

    Args:
        inputs: files, folders and patterns; a pattern must be quoted in a shell that would expand it.
        suffixes: of the kind, in lower case, such as ``.png``.
        kind: what the files are called in errors, in the singular.
        check: raises `UserError` for a file that is not of the kind.

    Raises:
        UserError: an input does not exist, is not of the kind, or names no file of it.
    """
    if not inputs:
        raise UserError(f"no input: give {kind} files, folders or quoted patterns")
    # An input may be named twice, by a file and by its folder.
    files: dict[Path, Path] = {}
    for entry in inputs:
        for path in _expand(entry, suffixes, kind, check):
            files.setdefault(path.resolve(), path)
    return list(files.values())


def result_names(paths: Sequence[Path]) -> list[Path]:
    """A name without suffix for what comes of each file: its path below the folder that all files have in common.

    Files that differ in nothing but the suffix are numbered, and those that differ in upper and lower case or in the
    code points of accents, because they would meet in file systems that ignore these.

    Example:
        >>> [name.as_posix() for name in result_names([Path("a/x.png"), Path("b/x.png"), Path("b/x.jpg")])]
        ['a/x', 'b/x', 'b/x-2']
    """
    full = [Path(os.path.abspath(path)) for path in paths]
    try:
        common = os.path.commonpath([path.parent for path in full]) if full else ""
        names = [path.relative_to(common).with_suffix("") for path in full]
    except ValueError:
        # Several drives have no folder in common.
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
    """The work on one input of several: if it fails, the fault is added to the list, and the next may follow.

    What the next would meet too is raised, such as a full disk. Lack of memory is not: the next may be smaller.

    Args:
        faults: the list.
        path: the input, for faults that name no file.
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
    """The faults that several processes have noted, by the places of their inputs."""
    found = [(index, told) for of_one in faults for index, listed in of_one.items() for told in listed]
    return [told for _, told in sorted(found, key=lambda fault: fault[0])]


def raise_faults(faults: Sequence[str], *, inputs: int, kind: str, out: Path) -> None:
    """Say what failed after all inputs were worked on.

    Raises:
        UserError: there are faults, and it lists them.
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
            raise UserError(f"{entry}: the folder has no {kind}s ({listed}); for those of its folders: '{path}/**/*'")
        return files
    # A file is a file, also with a bracket in its name.
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
