"""Split and image of an annotation file, derived from the names of files and folders."""

import os
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path
from typing import Literal

from latentgnn.tasks.checks import Split
from latentgnn.tasks.images import IMAGE_SUFFIXES

SPLIT_NAMES: dict[str, Split | Literal["test"]] = {
    **dict.fromkeys(("train", "training", "train2017", "train2014"), "train"),
    **dict.fromkeys(("val", "valid", "validation", "val2017", "val2014"), "val"),
    **dict.fromkeys(("test", "testing", "test2017"), "test"),
}
"""Folder names in lower case, and the split of the files in them."""


def files_below(folder: Path, suffixes: Collection[str]) -> list[Path]:
    """Return the files with some suffixes in a folder and below it, sorted, without hidden files and folders.

    Links to folders are followed, each folder once.
    """
    found: list[Path] = []
    seen = {os.path.realpath(folder)}
    for parent, folders, files in os.walk(folder, followlinks=True):
        kept = []
        for name in sorted(folders):
            real = os.path.realpath(Path(parent, name))
            if not name.startswith(".") and real not in seen:
                seen.add(real)
                kept.append(name)
        folders[:] = kept
        found += [
            Path(parent, name) for name in files if not name.startswith(".") and Path(name).suffix.lower() in suffixes
        ]
    return sorted(found)


def split_of(path: Path, root: Path) -> Split | Literal["all", "test"]:
    """Return the split named by a folder above a file; ``all`` if none is."""
    for part in path.relative_to(root).parts[:-1]:
        if part.lower() in SPLIT_NAMES:
            return SPLIT_NAMES[part.lower()]
    return "all"


def by_split(files: Iterable[Path], root: Path) -> tuple[dict[str, list[Path]], list[str]]:
    """Group files by split: ``train`` and ``val``, or ``all`` if there are no splits; also return notes for the user.

    If some files are in folders of splits, the others are ignored, and a note says so.
    """
    files_of: dict[str, list[Path]] = defaultdict(list)
    for path in files:
        files_of[split_of(path, root)].append(path)
    left_out = files_of.pop("test", [])
    notes = [_left_out(left_out, "a test split")] if left_out else []
    if len(files_of) > 1 and "all" in files_of:
        notes.append(_left_out(files_of.pop("all"), "neither a train nor a val folder"))
    return dict(files_of), notes


def _left_out(files: Collection[Path], where: str) -> str:
    return f"{len(files)} files in {where} are not used (such as {min(files)})"


class Images:
    """The images below a folder, by name.

    Args:
        root: the folder.
        without: names of folders whose pictures are not images of the set.

    Attributes:
        left_out: number of such pictures.
    """

    def __init__(self, root: Path, *, without: Iterable[str] = ()) -> None:
        self._root = root
        self._of: dict[str, list[Path]] = defaultdict(list)
        self._unused: set[Path] = set()
        self.left_out = 0
        for path in files_below(root, IMAGE_SUFFIXES):
            if set(without).isdisjoint(path.relative_to(root).parts[:-1]):
                self._of[path.stem].append(path)
                self._unused.add(path)
            else:
                self.left_out += 1

    def belonging_to(self, annotation: Path, named: str | None) -> tuple[Path | None, str]:
        """Return the image of an annotation file, or ``None`` and the reason.

        It is the image with the same name as the file, because the name inside is often out of date. If several have
        it, it is the nearest one, then the one that is named inside. If none has it, it is the one named inside.

        Args:
            annotation: the annotation file.
            named: the image's name inside it, if there is one.
        """
        # Some tools write paths, sometimes Windows paths.
        name = Path((named or "").replace("\\", "/")).name
        candidates = self._of.get(annotation.stem) or [path for path in self._of[Path(name).stem] if path.name == name]
        nearest = sorted(candidates, key=lambda path: self._distance(path, annotation))
        if nearest:
            alike = [
                path for path in nearest if self._distance(path, annotation) == self._distance(nearest[0], annotation)
            ]
            chosen = alike if len(alike) == 1 else [path for path in alike if path.name == name]
            if len(chosen) != 1:
                return None, f"several images have its name: {', '.join(map(str, alike[:3]))}"
            self._unused.discard(chosen[0])
            return chosen[0], ""
        looked_for = f"{annotation.stem}.*" + (f" or {name}" if name and Path(name).stem != annotation.stem else "")
        return None, f"there is no image {looked_for} in {self._root}"

    def unused(self) -> Iterator[Path]:
        """Yield the images without an annotation file."""
        yield from sorted(self._unused)

    def _distance(self, image: Path, annotation: Path) -> tuple[bool, int]:
        folders, others = image.relative_to(self._root).parts[:-1], annotation.relative_to(self._root).parts[:-1]
        shared = 0
        while shared < min(len(folders), len(others)) and folders[shared] == others[shared]:
            shared += 1
        return split_of(image, self._root) != split_of(annotation, self._root), len(folders) + len(others) - 2 * shared
