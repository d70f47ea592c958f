"""The set that the settings describe: its format, detected or named, and its splits, found or drawn."""

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, get_args

from latentgnn.errors import UserError
from latentgnn.tasks.checks import SPLITS, Split
from latentgnn.tasks.detection.coco import find_split, has_split
from latentgnn.tasks.detection.config import DataConfig, Format
from latentgnn.tasks.detection.formats import labelme, voc, voc_masks, yolo
from latentgnn.tasks.detection.formats.coco_files import other_files, read_coco
from latentgnn.tasks.detection.formats.records import Categories, Reading
from latentgnn.tasks.detection.splits import draw_split, kept_split

_READERS: Mapping[str, Any] = {"voc": voc, "voc_masks": voc_masks, "yolo": yolo, "labelme": labelme}
_TITLES = {
    "coco": "COCO (annotations/instances_train.json)",
    "voc": "Pascal VOC (XML files)",
    "voc_masks": "Pascal VOC's segmentation pictures (SegmentationObject/)",
    "yolo": "YOLO (data.yaml, or labels/)",
    "labelme": "LabelMe (JSON files with shapes)",
}
_COCO_ALONE = ("train_annotations", "train_images", "val_annotations", "val_images")


class DetectionSet:
    """A set in a folder. COCO files are read on request; for other formats, all files are read at once.

    Args:
        config: where the set is, and how it is split.
        run: a run's folder, whose split is used if it has one.

    Attributes:
        format: format of the files.

    Raises:
        UserError: if there is no such folder, its format is unknown, or it has several.
    """

    def __init__(self, config: DataConfig, run: Path | None = None) -> None:
        if config.root is None:
            raise UserError("data.root is null, which means the embedded set; give the folder of a set")
        self.root = Path(config.root)
        if not self.root.is_dir():
            raise UserError(f"data.root: there is no folder {self.root}")
        self.config = config
        self.format = config.format or _recognised(config, self.root)
        self._val: frozenset[str] | None = None
        named = [name for name in _COCO_ALONE if getattr(config, name) is not None]
        if self.format != "coco" and named:
            raise UserError(f"data.{named[0]} only applies to COCO-format sets; {self.root} is read as {self.format}")
        self._run = run
        self._parts = self._readers()
        self._read: dict[str, Reading] = {}

    @property
    def is_split(self) -> bool:
        """Whether there is a validation split: its own, or one that is drawn."""
        return "val" in self._parts or self.config.val_fraction is not None

    def whole(self) -> Reading:
        """Return everything that was read of a set without splits."""
        return self._reading("all" if "all" in self._parts else "train")

    def reading(self, split: Split) -> Reading:
        """Return what was read of a split.

        Raises:
            UserError: if there is no such split and none is to be drawn, or if there are both.
        """
        fraction = self.config.val_fraction
        if "val" in self._parts and fraction is not None:
            raise UserError(
                f"{self.root} has a val split of its own: leave data.val_fraction out (null); it is {fraction:g}"
            )
        if split in self._parts and "val" in self._parts:
            return self._reading(split)
        if fraction is None:
            raise self._missing(split)
        whole = self.whole()
        if any(fault.fatal for fault in whole.faults):
            return whole
        if self._val is None:
            self._val = self._split_of(whole)
        return whole.part(self._val, inside=split == "val")

    def _readers(self) -> Mapping[str, Callable[[], Reading]]:
        """For each existing part, the function that reads it."""
        if self.format != "coco":
            known = self.config.categories
            readings = _READERS[self.format].read(self.root, Categories(known))
            if not readings:
                raise UserError(f"{self.root} holds no files of {_TITLES[self.format]}")
            return {part: partial(_same, reading) for part, reading in readings.items()}
        named = [split for split in SPLITS if has_split(self.config, split)]
        if named:
            return {split: partial(_read_named, self.config, split) for split in named}
        return {part: partial(read_coco, *pair) for part, pair in other_files(self.root).items()}

    def _reading(self, part: str) -> Reading:
        if part not in self._read:
            if part not in self._parts:
                raise self._missing("train")
            self._read[part] = self._parts[part]()
        return self._read[part]

    def _missing(self, split: Split) -> UserError:
        if "val" in self._parts:
            return UserError(f"{self.root} has a val split and no train split: name the training images' folder train")
        drawn = (
            "have a part of the images drawn for validation with --data.val_fraction 0.2, "
            "and with --data.val_groups PATTERN if they belong together"
        )
        if self.format == "coco" and "all" not in self._parts:
            try:
                find_split(self.config, split)
            except UserError as error:
                return UserError(f"{error}\n  or, if there is a train split, {drawn}")
        there = "has a train split and no val split" if "train" in self._parts else "is not split"
        return UserError(f"{self.root} {there}: name the validation images' folder val, or {drawn}")

    def _split_of(self, whole: Reading) -> frozenset[str]:
        config = self.config
        assert config.val_fraction is not None
        images = whole.dataset["images"]
        names = [image["file_name"] for image in images if isinstance(image, dict) and _has_name(image)]
        kept = kept_split(self._run, config) if self._run is not None else None
        if kept is not None and kept.isdisjoint(names):
            raise UserError(
                f"{self.root} has none of the validation images that the split in {self._run} names; "
                "to evaluate on another set, name its images' folder val, and give --data.val_fraction null"
            )
        if kept is not None:
            return kept
        return draw_split(names, fraction=config.val_fraction, seed=config.val_seed, groups=config.val_groups)


def _recognised(config: DataConfig, root: Path) -> Format:
    """Detect the format of a folder by its files.

    Raises:
        UserError: if no format is found, or several.
    """
    if any(getattr(config, name) is not None for name in _COCO_ALONE) or any(
        has_split(config, split) for split in SPLITS
    ):
        return "coco"
    signs = {name: found for name, reader in _READERS.items() if (found := reader.sign(root)) is not None}
    if others := other_files(root):
        signs["coco"] = str(next(iter(others.values()))[0].relative_to(root))
    if "voc" in signs:
        # VOC's own folder has both; more images have boxes.
        signs.pop("voc_masks", None)
    if len(signs) > 1:
        listed = ", ".join(f"{_TITLES[name]}: {sign}" for name, sign in signs.items())
        raise UserError(
            f"{root} may be of several formats ({listed}); name one with --data.format {' or '.join(signs)}"
        )
    for name in get_args(Format):
        if name in signs:
            return name
    looked_for = "; ".join(_TITLES.values())
    scan = next((path for suffix in ("laz", "las") for path in root.rglob(f"*.{suffix}")), None)
    advice = (
        f"there are scans, such as {scan.relative_to(root)}: give a recipe for point clouds, --config lidar_small"
        if scan is not None
        else "docs/detection.md shows how each lies in its folder, and --data.format names one"
    )
    raise UserError(f"{root} holds no set of a known format: {looked_for}; {advice}")


def _read_named(config: DataConfig, split: Split) -> Reading:
    return read_coco(*find_split(config, split))


def _same(reading: Reading) -> Reading:
    return reading


def _has_name(image: dict[str, Any]) -> bool:
    return isinstance(image.get("file_name"), str)
