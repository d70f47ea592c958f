"""Locations of a set's images and label pictures, and the meaning of its ids, by layout."""

import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

from latentgnn.errors import UserError
from latentgnn.files.reading import read_lines
from latentgnn.tasks.checks import Split
from latentgnn.tasks.images import IMAGE_SUFFIXES
from latentgnn.tasks.segmentation.config import LARGEST_ID, Color, DataConfig, Layout
from latentgnn.tasks.voc import VOC_CLASSES, voc_color


class Source(NamedTuple):
    """An image and its label picture; ``None`` where one of them has no partner.

    Args:
        name: name shown to the user: its path below the split's folder, without suffix.
        image: its file.
        label: its label picture.
    """

    name: str
    image: Path | None
    label: Path | None


def resolve(config: DataConfig) -> DataConfig:
    """Replace ``null`` settings by what the layout defines.

    Raises:
        UserError: if there is no such folder, or its layout or classes are unknown.
    """
    if config.root is None:
        raise UserError("data.root is not given: name the folder of images, as in --data.root /data/camvid")
    root = Path(config.root).expanduser()
    if not root.is_dir():
        raise UserError(f"data.root: {root} is no folder")
    name = config.layout or _found(root)
    layout = _LAYOUTS[name]
    classes = config.classes if config.classes is not None else layout.classes(root)
    ignored = config.ignored if config.ignored is not None else layout.ignored
    return replace(
        config,
        layout=name,
        train=config.train or layout.splits[0],
        val=config.val or layout.splits[1],
        classes=classes,
        # An id that is a class in this run is not ignored, even if the layout ignores it.
        ignored=tuple(id for id in ignored if id not in classes),
        colors=config.colors if config.colors is not None else layout.colors,
    )


def find_sources(config: DataConfig, split: Split) -> list[Source]:
    """Return the images of a split and their label pictures, sorted by name.

    Args:
        config: see `resolve`.
        split: ``train`` or ``val``.

    Raises:
        UserError: if a folder of the layout is missing, or has no images.
    """
    assert config.root is not None
    assert config.layout is not None
    root, name = Path(config.root).expanduser(), config.train if split == "train" else config.val
    assert name is not None
    sources = _LAYOUTS[config.layout].find(root, name)
    if not sources:
        raise UserError(f"{root}: the split {name!r} of the layout {config.layout} has no images")
    return sources


def _found(root: Path) -> Layout:
    for name, layout in _LAYOUTS.items():
        if all((root / folder).is_dir() for folder in layout.marks):
            return name
    known = "; ".join(f"{name}: {', '.join(layout.marks)}" for name, layout in _LAYOUTS.items())
    raise UserError(f"data.root: {root} does not have the folders of any known layout ({known}); give its own folder")


def _paired(images: Path, labels: Path, *, image: str = "", label: str = "") -> list[Source]:
    """Pair the files below two folders, by their names without suffix and without the given endings."""
    found = [_named(folder, end) for folder, end in ((images, image), (labels, label))]
    names = sorted({*found[0], *found[1]})
    return [Source(name, found[0].get(name), found[1].get(name)) for name in names]


def _named(folder: Path, end: str) -> dict[str, Path]:
    if not folder.is_dir():
        raise UserError(f"there is no folder {folder}: the split has another name (--data.train, --data.val)?")
    files: dict[str, Path] = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).with_suffix("").as_posix()
        if path.suffix.lower() not in IMAGE_SUFFIXES or not name.endswith(end):
            continue
        name = name.removesuffix(end)
        if name in files:
            raise UserError(f"{files[name]} and {path} have the same name: which one is meant?")
        files[name] = path
    return files


def _cityscapes(root: Path, split: str) -> list[Source]:
    return _paired(
        root / "leftImg8bit" / split, root / "gtFine" / split, image="_leftImg8bit", label="_gtFine_labelIds"
    )


def _voc(root: Path, split: str) -> list[Source]:
    names = " ".join(read_lines(root / "ImageSets" / "Segmentation" / f"{split}.txt", "list")).split()
    images, labels = (root / "JPEGImages", root / "SegmentationClass")
    return [
        Source(name, _present(images / f"{name}.jpg"), _present(labels / f"{name}.png")) for name in sorted({*names})
    ]


def _present(path: Path) -> Path | None:
    # os.path.exists, as Path.exists raises if a list contains a name that is not a valid file name.
    return path if os.path.exists(path) else None


def _ade20k_classes(root: Path) -> dict[int, str]:
    """The classes in ``objectInfo150.txt``, which is part of the set: the first column is the id, the last the name."""
    path = root / "objectInfo150.txt"
    if not path.is_file():
        raise UserError(f"{path} is not there, which says what the ids mean: take the set whole, or give data.classes")
    rows = [line.split("\t") for line in read_lines(path, "table")[1:] if line.strip()]
    try:
        classes = {int(row[0]): row[-1].split(",")[0].strip() for row in rows}
    except ValueError:
        classes = {}
    if not classes or not all(0 <= id <= LARGEST_ID for id in classes):
        raise UserError(
            f"{path}: expected a table whose first column is an id, 0 to {LARGEST_ID:,}, and whose last is a name"
        )
    return classes


def _unnamed(root: Path) -> dict[int, str]:
    raise UserError("data.classes is not given: say what the ids in the label pictures mean, such as {0: sky, 1: road}")


@dataclass(frozen=True)
class _Layout:
    """A layout: the folders that identify it, its splits, the location of files, and their content."""

    marks: tuple[str, ...]
    splits: tuple[str, str]
    find: Callable[[Path, str], list[Source]]
    classes: Callable[[Path], dict[int, str]]
    ignored: tuple[int, ...] = ()
    colors: dict[int, Color] | None = None


_CITYSCAPES: dict[int, tuple[str, Color]] = {
    7: ("road", (128, 64, 128)),
    8: ("sidewalk", (244, 35, 232)),
    11: ("building", (70, 70, 70)),
    12: ("wall", (102, 102, 156)),
    13: ("fence", (190, 153, 153)),
    17: ("pole", (153, 153, 153)),
    19: ("traffic light", (250, 170, 30)),
    20: ("traffic sign", (220, 220, 0)),
    21: ("vegetation", (107, 142, 35)),
    22: ("terrain", (152, 251, 152)),
    23: ("sky", (70, 130, 180)),
    24: ("person", (220, 20, 60)),
    25: ("rider", (255, 0, 0)),
    26: ("car", (0, 0, 142)),
    27: ("truck", (0, 0, 70)),
    28: ("bus", (0, 60, 100)),
    31: ("train", (0, 80, 100)),
    32: ("motorcycle", (0, 0, 230)),
    33: ("bicycle", (119, 11, 32)),
}
"""The 19 classes that Cityscapes evaluates, by their ids in its ``labelIds`` pictures."""

_LAYOUTS: dict[Layout, _Layout] = {
    "cityscapes": _Layout(
        marks=("leftImg8bit", "gtFine"),
        splits=("train", "val"),
        find=_cityscapes,
        classes=lambda root: {id: name for id, (name, _) in _CITYSCAPES.items()},
        # The ids that are not evaluated; 255 is -1 in 8 bits, the id of licence plates.
        ignored=(*(id for id in range(34) if id not in _CITYSCAPES), 255),
        colors={id: color for id, (_, color) in _CITYSCAPES.items()},
    ),
    "voc": _Layout(
        marks=("JPEGImages", "SegmentationClass"),
        splits=("train", "val"),
        find=_voc,
        classes=lambda root: dict(enumerate(("background", *VOC_CLASSES))),
        ignored=(255,),
        colors={id: voc_color(id) for id in (*range(21), 255)},
    ),
    "ade20k": _Layout(
        marks=("images", "annotations"),
        splits=("training", "validation"),
        find=lambda root, split: _paired(root / "images" / split, root / "annotations" / split),
        classes=_ade20k_classes,
        ignored=(0,),
    ),
    "folders": _Layout(
        marks=("images", "labels"),
        splits=("train", "val"),
        find=lambda root, split: _paired(root / "images" / split, root / "labels" / split),
        classes=_unnamed,
    ),
}


def colors_of(config: DataConfig, ids: Iterable[int]) -> list[Color]:
    """Return the colours for drawing classes: the data's own, or Pascal VOC's if there are none."""
    own = config.colors or {}
    # Colour 0 of Pascal VOC is black, which is hard to see.
    return [own.get(id, voc_color(place)) for place, id in enumerate(ids, 1)]
