"""Files that a user names outright, by folders and by patterns."""

import glob
from collections.abc import Callable, Collection, Sequence
from pathlib import Path

from latentgnn.errors import UserError


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


def unique_stems(paths: Sequence[Path]) -> list[str]:
    """Each path's stem, numbered where it was taken, as file systems that ignore case see it too."""
    stems: list[str] = []
    taken: set[str] = set()
    for path in paths:
        stem, number = path.stem, 1
        while stem.casefold() in taken:
            number += 1
            stem = f"{path.stem}-{number}"
        taken.add(stem.casefold())
        stems.append(stem)
    return stems


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
        check(path)
        return [path]
    if not glob.has_magic(str(entry)):
        raise UserError(f"{entry}: no such file or folder")
    matches = sorted(Path(match) for match in glob.glob(str(entry), recursive=True))
    files = [match for match in matches if fits(match)]
    if not files:
        but = f"; it matches {len(matches)} other files or folders" if matches else ""
        raise UserError(f"{entry}: the pattern matches no {kind} ({listed}){but}")
    return files
