"""Locations of a set's scans and meaning of its ids, by layout: folders, ScanNet, S3DIS, SemanticKITTI."""

import glob
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from latentgnn.configuration.settings import parse_config
from latentgnn.errors import UserError
from latentgnn.files.reading import read_yaml
from latentgnn.tasks.checks import Split
from latentgnn.tasks.pointcloud import kitti
from latentgnn.tasks.pointcloud.classes import S3DIS_CLASSES, SCANNET_CLASSES
from latentgnn.tasks.pointcloud.config import DataConfig, Layout
from latentgnn.tasks.pointcloud.scans import SUFFIXES, RawScan, read_scan
from latentgnn.tasks.pointcloud.text import read_rows

DATASET_FILE = "dataset.yaml"
DATASET_SETTINGS = ("layout", "train", "val", "classes", "ignored", "features")


@dataclass(frozen=True, kw_only=True)
class Source:
    """A scan that has not been read yet.

    Args:
        name: name of the scan.
        path: its file or folder.
        read: reads it.
    """

    name: str
    path: Path
    read: Callable[[], RawScan]

    @property
    def files(self) -> list[Path]:
        """Return all files that are read: the scan's file and any labels beside it, or a folder's objects."""
        if self.path.is_dir():
            return _objects(self.path)
        labels = kitti.labels_of(self.path) if self.path.suffix == ".bin" else _labels_beside(self.path)
        return [self.path, labels] if labels is not None and labels.exists() else [self.path]


def resolve(config: DataConfig) -> DataConfig:
    """Complete the configuration with what the data folder defines: layout, classes, and its ``dataset.yaml``.

    Raises:
        UserError: if there is no such folder, or its ``dataset.yaml`` is invalid.
    """
    root = _root(config)
    if (root / DATASET_FILE).is_file():
        settings = _dataset_settings(root / DATASET_FILE)
        if config.dataset_yaml == "fills":
            settings = {name: value for name, value in settings.items() if not getattr(config, name)}
        config = replace(config, **settings)
    layout = config.layout or _layout_of(root)
    classes = config.classes
    ignored = config.ignored
    if layout != "scans" and classes is None:
        classes = _CLASSES_OF[layout]
        if layout == "semantickitti":
            ignored = ignored or kitti.IGNORED
    config = replace(config, layout=layout, classes=classes, ignored=ignored)
    check_classes(config)
    return config


def find_scans(config: DataConfig, split: Split) -> list[Source]:
    """Return the scans of a split, sorted by name; a name may occur twice, which `check_split` reports.

    Args:
        config: configuration from `resolve`.
        split: ``train`` or ``val``.

    Raises:
        UserError: if there are none.
    """
    finders = {
        "scans": _find_files,
        "scannet": _find_scannet,
        "s3dis": _find_s3dis,
        "semantickitti": _find_semantickitti,
    }
    assert config.layout is not None
    root = _root(config)
    named = config.train if split == "train" else config.val
    sources = finders[config.layout](root, named, split, config)
    if not sources:
        raise UserError(f"{root}: there are no scans for {split} in {_list(named) if named else 'the usual places'}")
    return sorted(sources, key=lambda source: source.name)


def _find_files(root: Path, named: Sequence[str] | None, split: Split, config: DataConfig) -> list[Source]:
    files: list[Path] = []
    for pattern in named or (split,):
        if (root / pattern).is_file():
            files.append(root / pattern)
            continue
        # A folder may have brackets in its name, so first try the pattern as a folder.
        names = [pattern] if (root / pattern).is_dir() else sorted(glob.glob(pattern, root_dir=root, recursive=True))
        if not names:
            raise UserError(f"{root / pattern}: there is no such folder or scan; set data.{split}")
        places = [root / name for name in names]
        inside = [path for place in places for path in (sorted(place.rglob("*")) if place.is_dir() else [place])]
        # A pattern such as **/* matches both a folder and its content.
        files += [path for path in dict.fromkeys(inside) if path.suffix.lower() in SUFFIXES and path.is_file()]
    return [Source(name=path.stem, path=path, read=partial(read_scan, path)) for path in files]


_CLASSES_OF = {"scannet": SCANNET_CLASSES, "s3dis": S3DIS_CLASSES, "semantickitti": kitti.CLASSES}
_SCANNET_FOLDERS = ("", "Tasks/Benchmark", "ScanNet/Tasks/Benchmark")


def _find_scannet(root: Path, named: Sequence[str] | None, split: Split, config: DataConfig) -> list[Source]:
    scans = root / "scans" if (root / "scans").is_dir() else root
    sources = []
    for name in named or (f"scannetv2_{split}.txt",):
        places = [root / folder / name for folder in _SCANNET_FOLDERS]
        file = next((place for place in places if place.is_file()), None)
        if file is None:
            raise UserError(f"there is no split file {name}; looked for {_list(places)}")
        for scene in file.read_text(encoding="utf-8", errors="replace").split():
            path = scans / scene / f"{scene}_vh_clean_2.ply"
            sources.append(Source(name=scene, path=path, read=partial(_read_scannet, path)))
    return sources


def _labels_beside(path: Path) -> Path:
    return path.with_name(f"{path.stem}.labels.ply")


def _read_scannet(path: Path) -> RawScan:
    scan = read_scan(path)
    labels_path = _labels_beside(path)
    classes = read_scan(labels_path).classes
    if classes is None:
        raise UserError(f"{labels_path}: its vertices have no 'label'")
    if len(classes) != len(scan.points):
        raise UserError(f"{path} has {len(scan.points)} points, but {labels_path.name} has labels for {len(classes)}")
    return replace(scan, classes=classes)


def _find_s3dis(root: Path, named: Sequence[str] | None, split: Split, config: DataConfig) -> list[Source]:
    areas = sorted(path.name for path in root.glob("Area_*") if path.is_dir())
    val = config.val or ("Area_5",)
    if named is None:
        named = val if split == "val" else [area for area in areas if area not in val]
    sources = []
    for area in named:
        if area not in areas:
            raise UserError(f"{root} has no folder {area}, which data.{split} names; areas: {_list(areas)}")
        rooms = sorted(path.parent for path in (root / area).glob("*/Annotations") if path.is_dir())
        sources += [Source(name=f"{area}_{room.name}", path=room, read=partial(_read_s3dis, room)) for room in rooms]
    return sources


def _find_semantickitti(root: Path, named: Sequence[str] | None, split: Split, config: DataConfig) -> list[Source]:
    found = kitti.find_velodyne(root, named, split)
    return [Source(name=name, path=path, read=partial(read_scan, path)) for name, path in found]


def _objects(room: Path) -> list[Path]:
    return sorted((room / "Annotations").glob("*.txt"))


def _read_s3dis(room: Path) -> RawScan:
    """A room made of its objects, ``Annotations/<class>_<number>.txt`` with one line ``x y z r g b`` per point."""
    id_of = {name: id for id, name in S3DIS_CLASSES.items()}
    rows, ids = [], []
    files = _objects(room)
    if not files:
        raise UserError(f"{room / 'Annotations'}: there are no objects <class>_<number>.txt")
    for file in files:
        name = file.stem.rpartition("_")[0]
        # S3DIS's own class list has no "stairs" and counts them as clutter.
        id = id_of.get(name, id_of["clutter"])
        rows.append(read_rows(file, width=6, what="six numbers, x y z r g b"))
        ids.append(np.full(len(rows[-1]), id, np.int64))
    values = np.concatenate(rows)
    return RawScan(
        points=values[:, :3].copy(),
        columns={"color": (values[:, 3:] / 255).astype(np.float32)},
        classes=np.concatenate(ids),
    )


def _root(config: DataConfig) -> Path:
    if config.root is None:
        raise UserError("no data are named: set data.root to a folder of scans")
    root = Path(config.root)
    if not root.is_dir():
        raise UserError(f"data.root: there is no folder {root}")
    return root


def _layout_of(root: Path) -> Layout:
    if any((root / folder / "scannetv2_train.txt").is_file() for folder in _SCANNET_FOLDERS):
        return "scannet"
    if kitti.sequences_folder(root) is not None:
        return "semantickitti"
    return "s3dis" if any(root.glob("Area_*/*/Annotations")) else "scans"


def _dataset_settings(path: Path) -> dict[str, Any]:
    """The settings that a data folder defines itself."""
    values = read_yaml(path)
    if not set(values) <= set(DATASET_SETTINGS):
        raise UserError(f"{path}: expected a mapping of any of {_list(DATASET_SETTINGS)}; got {_list(values)}")
    for split in ("train", "val"):
        if isinstance(values.get(split), str):
            values[split] = [values[split]]
    try:
        parsed = parse_config(DataConfig, values)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    return {name: getattr(parsed, name) for name in values}


def check_classes(config: DataConfig) -> None:
    """Refuse classes without names, and ids that are both a class and ignored.

    Raises:
        UserError: if there are any.
    """
    if not config.classes:
        raise UserError(
            f"the classes have no names: set data.classes, for example '{{1: ground, 2: building}}', or write a "
            f"{DATASET_FILE} with classes into {config.root}"
        )
    if both := sorted(set(config.classes) & set(config.ignored)):
        raise UserError(f"data.ignored: class ids {_list(both)} are among data.classes too")


def _list(values: Iterable[Any]) -> str:
    return ", ".join(str(value) for value in values)
