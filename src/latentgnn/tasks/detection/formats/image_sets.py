"""VOC's lists of images, ``ImageSets/<kind>/train.txt`` and ``val.txt``: one name without suffix per line."""

import os
from pathlib import Path

from latentgnn.errors import UserError
from latentgnn.files.reading import read_lines

_SPLITS = ("train", "val")


def named_in_sets(root: Path, kind: str, folder: str, suffix: str) -> tuple[dict[str, list[Path]], list[str]]:
    """Return the listed files by split, and notes for the user; both are empty if there are no lists.

    Args:
        root: a folder with ``ImageSets``, or with a folder that has it, such as ``VOC2012`` or ``VOCdevkit/VOC2012``.
        kind: kind of lists: ``Main`` or ``Segmentation``.
        folder: folder beside ``ImageSets`` with the listed files.
        suffix: suffix of these files.

    Raises:
        UserError: if a list cannot be read, or contains something that is not a name.
    """
    files_of: dict[str, list[Path]] = {}
    notes = []
    places = ("ImageSets", "*/ImageSets", "*/*/ImageSets")
    for lists in sorted({path for place in places for path in root.glob(f"{place}/{kind}")}):
        listed: set[Path] = set()
        for split in _SPLITS:
            if (lists / f"{split}.txt").is_file():
                files = [lists.parents[1] / folder / f"{name}{suffix}" for name in _names(lists / f"{split}.txt")]
                files_of.setdefault(split, []).extend(files)
                listed |= set(files)
        if listed:
            others = set((lists.parents[1] / folder).glob(f"*{suffix}")) - listed
            if others:
                notes.append(f"{len(others)} files are in no list of {lists} and are not used (such as {min(others)})")
    return files_of, notes


def _names(path: Path) -> list[str]:
    names = []
    for number, line in enumerate(read_lines(path, "list of images"), 1):
        name = line.strip()
        if ".." in Path(name).parts or os.path.isabs(name):
            raise UserError(f"{path}: line {number}: {name!r} is no image's name")
        if name:
            names.append(name)
    return list(dict.fromkeys(names))
