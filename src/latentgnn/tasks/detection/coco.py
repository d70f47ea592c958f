"""COCO-format data: finding files, accessing annotations, and making samples of them."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from faster_coco_eval.core import mask as coco_mask
from torch import Tensor
from torchvision import tv_tensors

from latentgnn.errors import UserError
from latentgnn.files.stored_lists import StoredList
from latentgnn.tasks.checks import Split
from latentgnn.tasks.detection.config import AugmentConfig, CropConfig, DataConfig
from latentgnn.tasks.detection.crops import cut_target, draw_window
from latentgnn.tasks.detection.segmentations import decode_masks, to_rle
from latentgnn.tasks.detection.transforms import build_transform
from latentgnn.tasks.images import read_image, to_tensor
from latentgnn.tasks.tars import is_folder
from latentgnn.training.randomness import stream_of

_YEARS = ("2017", "2014", "")


def find_split(config: DataConfig, split: Split) -> tuple[Path, Path]:
    """Return the annotation file and the image folder of a split: those configured, or those found by COCO's names.

    It looks for ``annotations/instances_<split>.json`` with ``<split>/``, ``images/<split>/`` or ``<split>.tar``, where
    ``<split>`` is for example ``train2017``, ``train2014`` or ``train``; a file and a folder with the same name are
    preferred.

    Raises:
        UserError: if something is missing; the message lists the names that were tried.
    """
    if config.root is None:
        raise UserError("data.root is null, which means the embedded set; give the folder of a COCO-format set")
    root = Path(config.root)
    if not root.is_dir():
        raise UserError(f"data.root: there is no folder {root}")
    names, files, folders = _candidates(config, root, split)
    found_files = {name: path for name in names for path in files[name] if path.is_file()}
    found_folders = {name: path for name in names for path in reversed(folders[name]) if is_folder(path)}
    missing = []
    if not found_files:
        missing.append(_not_found("annotation file", f"{split}_annotations", files))
    if not found_folders:
        missing.append(_not_found("image folder", f"{split}_images", folders))
    if missing:
        raise UserError(f"no {split} split in {root}:\n" + "\n".join(missing))
    for name in names:
        if name in found_files and name in found_folders:
            return found_files[name], found_folders[name]
    return next(iter(found_files.values())), next(iter(found_folders.values()))


def has_split(config: DataConfig, split: Split) -> bool:
    """Whether the annotation file of a split is configured, or exists under one of COCO's names."""
    if getattr(config, f"{split}_annotations") is not None:
        return True
    names, files, _ = _candidates(config, Path(config.root or ""), split)
    return any(path.is_file() for name in names for path in files[name])


def _candidates(
    config: DataConfig, root: Path, split: Split
) -> tuple[list[str], dict[str, list[Path]], dict[str, list[Path]]]:
    """COCO's names for a split, and for each of them the possible paths of annotation file and image folder."""
    given_annotations: str | None = getattr(config, f"{split}_annotations")
    given_images: str | None = getattr(config, f"{split}_images")
    names = [f"{split}{year}" for year in _YEARS]
    files = {name: [root / "annotations" / f"instances_{name}.json"] for name in names}
    folders = {name: [root / name, root / "images" / name, root / f"{name}.tar"] for name in names}
    if given_annotations is not None:
        files = {name: [root / given_annotations] for name in names}
    if given_images is not None:
        folders = {name: [root / given_images] for name in names}
    return names, files, folders


def _not_found(what: str, option: str, candidates: dict[str, list[Path]]) -> str:
    paths = dict.fromkeys(str(path) for group in candidates.values() for path in group)
    return f"  no {what}; looked for {', '.join(paths)}; name it with data.{option}"


@dataclass(frozen=True, kw_only=True, slots=True)
class ImageRecord:
    """An image in a set.

    Args:
        id: id in the annotation file.
        file_name: name in the annotation file.
        width: annotated width in pixels.
        height: annotated height in pixels.
        path: the image file.
    """

    id: int
    file_name: str
    width: int
    height: int
    path: Path


class CocoAnnotations:
    """Annotations without faults, as `latentgnn.tasks.detection.sound_sets.load_split` provides them.

    Records are not kept as Python objects, millions of which would take gigabytes in each process. They stay as text,
    in the file that they were read from or in one buffer, and are decoded whenever they are requested.

    Args:
        dataset: the COCO dict; its lists may be `latentgnn.files.stored_lists.StoredList`.
        image_folder: folder that the file names are relative to.
        skipped_images: number of images that were left out because of faults.
        skipped_annotations: number of annotations that were left out, including those of such images.
        skipped: message about what was left out and why; empty if nothing was.

    Attributes:
        folder: folder that the file names are relative to.
        dataset: the COCO dict; annotations that lack ``iscrowd`` or ``area`` have them here.
        images: the images, in the file's order.
        objects: number of annotations that are not crowds.
        categories: (id, name) pairs, by ascending id.
        category_of_label: maps each label, from 1 to the number of categories, to the category's id; both ascend.
        has_masks: whether every annotation has a segmentation.
    """

    def __init__(
        self,
        dataset: dict[str, Any],
        image_folder: Path | str,
        *,
        skipped_images: int = 0,
        skipped_annotations: int = 0,
        skipped: str = "",
    ) -> None:
        self.folder = Path(image_folder)
        self.skipped_images = skipped_images
        self.skipped_annotations = skipped_annotations
        self.skipped = skipped
        images = StoredList.of(dataset["images"])
        annotations = StoredList.of(dataset["annotations"])
        self.images: Sequence[ImageRecord] = images.mapped(self._image)
        self._annotations = annotations.mapped(self._completed)
        self.dataset = {**dataset, "images": images, "annotations": self._annotations}
        self.categories = sorted((category["id"], category["name"]) for category in dataset["categories"])
        self.category_of_label = {1 + index: id for index, (id, _) in enumerate(self.categories)}
        self.label_of_category = {id: label for label, id in self.category_of_label.items()}
        ids = np.fromiter((image["id"] for image in images), np.int64, len(images))
        self._by_id = np.argsort(ids)
        self._ids = ids[self._by_id]
        image_ids, crowds = np.empty(len(annotations), np.int64), 0
        self.has_masks = True
        for index, annotation in enumerate(annotations):
            image_ids[index] = annotation["image_id"]
            crowds += annotation.get("iscrowd", 0)
            self.has_masks &= bool(annotation.get("segmentation"))
        self.objects = len(annotations) - crowds
        # The annotations sorted by image, and the end of each image's range.
        images_of = self._by_id[np.searchsorted(self._ids, image_ids)]
        self._by_image = np.argsort(images_of, kind="stable").astype(np.int32)
        self._ends = np.cumsum(np.bincount(images_of, minlength=len(images)))

    def __len__(self) -> int:
        return len(self.images)

    def annotations_of(self, image_id: int) -> list[dict[str, Any]]:
        """Return the annotation records of an image, including crowds."""
        return self.annotations_at(self._index_of(image_id))

    def annotations_at(self, index: int) -> list[dict[str, Any]]:
        """Return the annotation records of the image at an index, including crowds."""
        start = self._ends[index - 1] if index else 0
        return self._annotations.values(self._by_image[start : self._ends[index]])

    def _index_of(self, image_id: int) -> int:
        place = int(np.searchsorted(self._ids, image_id))
        if place == len(self._ids) or self._ids[place] != image_id:
            raise KeyError(image_id)
        return int(self._by_id[place])

    def _image(self, image: dict[str, Any]) -> ImageRecord:
        return ImageRecord(
            id=image["id"],
            file_name=image["file_name"],
            width=image["width"],
            height=image["height"],
            path=self.folder / image["file_name"],
        )

    def _completed(self, annotation: dict[str, Any]) -> dict[str, Any]:
        annotation.setdefault("iscrowd", 0)
        if "area" not in annotation:
            image = self.images[self._index_of(annotation["image_id"])]
            annotation["area"] = _area(annotation, image.height, image.width)
        return annotation


def _area(annotation: dict[str, Any], height: int, width: int) -> float:
    if annotation.get("segmentation"):
        return float(coco_mask.area(to_rle(annotation["segmentation"], height, width)))
    return float(annotation["bbox"][2] * annotation["bbox"][3])


class CocoTrainingSet:
    """Augmented samples whose randomness depends only on the seed, the epoch and the image's id.

    A sample is ``(image, target)``: float32 (3, H, W) in 0..1, and a dict of ``boxes`` float32 (n, 4) xyxy, ``labels``
    int64 (n,), ``masks`` uint8 (n, H, W) where the set has masks, and ``image_id``. Crowds are left out of it.

    Args:
        annotations: the set.
        augment: the random changes of an image.
        seed: seed of the augmentation and of the crops.
        crop: with a ``size``, samples are windows of the images.
        group_by_aspect: whether `group_of` separates wide and tall images.
    """

    def __init__(
        self,
        annotations: CocoAnnotations,
        *,
        augment: AugmentConfig,
        seed: int,
        crop: CropConfig | None = None,
        group_by_aspect: bool = True,
    ) -> None:
        self._crop = crop if crop is not None and crop.size is not None else None
        self._transform = build_transform(augment)
        self._seed = seed
        self._annotations = annotations
        self._is_tall = np.array([group_by_aspect and image.height > image.width for image in annotations.images], bool)

    def __len__(self) -> int:
        return len(self._is_tall)

    def group_of(self, index: int) -> int:
        """Return 0 for a wide or square image, 1 for a tall one."""
        return int(self._is_tall[index])

    def __getitem__(self, key: tuple[int, int], /) -> tuple[Tensor, dict[str, Any]]:
        epoch, index = key
        record = self._annotations.images[index]
        objects = [object for object in self._annotations.annotations_at(index) if not object["iscrowd"]]
        with stream_of(self._seed, epoch, record.id):
            image, target = self._transform(*self._sample(record, objects))
        plain = {name: value.as_subclass(Tensor) for name, value in target.items()}
        return image.as_subclass(Tensor), {**plain, "image_id": record.id}

    def _sample(self, record: ImageRecord, objects: Sequence[dict[str, Any]]) -> tuple[Tensor, dict[str, Any]]:
        """An image, or a random window of it, with its objects."""
        height, width = record.height, record.width
        image = read_image(record.path, size=(width, height))
        xywh = torch.tensor([object["bbox"] for object in objects], dtype=torch.float32).reshape(-1, 4)
        xyxy = torch.cat([xywh[:, :2], xywh[:, :2] + xywh[:, 2:]], dim=1)
        # Clamped before the transforms: an annotation a fraction of a pixel outside the image is not an object cut off.
        boxes = torch.minimum(xyxy.clamp(min=0), xyxy.new_tensor([width, height] * 2))
        label_of = self._annotations.label_of_category
        labels = torch.tensor([label_of[object["category_id"]] for object in objects], dtype=torch.int64)
        masks = [object["segmentation"] for object in objects] if self._annotations.has_masks else None
        if self._crop is not None:
            window = draw_window(self._crop, boxes, width, height)
            target = cut_target(boxes, labels, masks, window, (width, height), visible=self._crop.visible)
            return tv_tensors.Image(to_tensor(image.crop(window))), target
        target = {
            "boxes": tv_tensors.BoundingBoxes(boxes, format="XYXY", canvas_size=(height, width)),
            "labels": labels,
        }
        if masks is not None:
            target["masks"] = tv_tensors.Mask(torch.from_numpy(decode_masks(masks, height, width)), dtype=torch.uint8)
        return tv_tensors.Image(to_tensor(image)), target


class CocoValidationSet:
    """The images of a set in order, without changes.

    A sample is ``(image, {"image_id": id, "size": (H, W)})`` with a float32 image (3, H, W) in 0..1. Images that are
    processed in tiles are large and not loaded ahead of their use: for them, the sample holds the image's path instead.

    Args:
        annotations: the set.
        in_tiles: whether samples hold paths.
    """

    def __init__(self, annotations: CocoAnnotations, *, in_tiles: bool = False) -> None:
        self._images = annotations.images
        self._in_tiles = in_tiles

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, index: int, /) -> tuple[Tensor | Path, dict[str, Any]]:
        image = self._images[index]
        about = {"image_id": image.id, "size": (image.height, image.width)}
        if self._in_tiles:
            return image.path, about
        return to_tensor(read_image(image.path, size=(image.width, image.height))), about
