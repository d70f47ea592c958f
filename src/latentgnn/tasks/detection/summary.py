"""Figures of a set that help to choose a recipe: images, and object sizes as the detector sees them."""

import math
from array import array
from collections import Counter
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from latentgnn.tasks.detection.coco import CocoAnnotations
from latentgnn.tasks.detection.config import ModelConfig

# COCO's bounds for small and large objects, as sides of squares in pixels.
SMALL, LARGE = 32, 96
_LISTED_SIZES = 3
_LISTED_CATEGORIES = 10
_PERCENTILES = (0, 5, 50, 95, 100)


@dataclass(frozen=True, kw_only=True)
class Summary:
    """The figures of a split. Crowds are not counted as objects.

    Args:
        images: number of images.
        sizes: (width, height), each with the number of images that have it, most frequent first.
        has_masks: whether all objects have a mask.
        crowds: number of crowds.
        objects_of_image: number of objects of each image, int64 (images,).
        sides: for each object, the square root of its box's area in pixels of the resized image, float64 (objects,).
        ratios: for each object, height over width of its box, float64 (objects,).
        categories: id, name, number of objects, and number of images with any, rarest first.
    """

    images: int
    sizes: tuple[tuple[tuple[int, int], int], ...]
    has_masks: bool
    crowds: int
    objects_of_image: NDArray[np.int64]
    sides: NDArray[np.float64]
    ratios: NDArray[np.float64]
    categories: tuple[tuple[int, str, int, int], ...]

    @property
    def objects(self) -> int:
        """Number of objects."""
        return len(self.sides)

    @property
    def without_objects(self) -> int:
        """Number of images without objects."""
        return int((self.objects_of_image == 0).sum())

    def to_json(self) -> dict[str, Any]:
        """Return plain data; distributions are given by minimum, 5th, 50th and 95th percentile, and maximum."""
        small, medium, large = _shares(self.sides)
        return {
            "images": self.images,
            "images_without_objects": self.without_objects,
            "sizes": [{"width": width, "height": height, "images": n} for (width, height), n in self.sizes],
            "objects": self.objects,
            "crowds": self.crowds,
            "has_masks": self.has_masks,
            "objects_an_image": _spread(self.objects_of_image),
            "sides_at_recipe_scale": _spread(self.sides),
            "shares_at_recipe_scale": {"small": small, "medium": medium, "large": large},
            "height_over_width": _spread(self.ratios),
            "categories": [
                {"id": id, "name": name, "objects": objects, "images": images}
                for id, name, objects, images in self.categories
            ],
        }

    def text(self) -> str:
        """Return the figures as text lines."""
        listed = ", ".join(f"{width} x {height} ({n})" for (width, height), n in self.sizes[:_LISTED_SIZES])
        if len(self.sizes) > _LISTED_SIZES:
            listed += f" and {len(self.sizes) - _LISTED_SIZES} other sizes"
        lines = [
            f"images: {self.images}, {self.without_objects} without objects; width x height {listed}",
            f"objects: {self.objects} with {'masks' if self.has_masks else 'boxes and no masks'}, {self.crowds} crowds",
        ]
        if self.objects:
            small, medium, large = (round(100 * share) for share in _shares(self.sides))
            lines += [
                f"objects an image: {_in_words(self.objects_of_image)}",
                f"side of an object as the recipe resizes it, in pixels: {_in_words(self.sides)}; "
                f"{small}% below {SMALL}, {medium}% between, {large}% of {LARGE} and above",
                f"height over width: {_in_words(self.ratios)}",
            ]
        some = self.categories[:_LISTED_CATEGORIES]
        title = "categories, objects, images" + ("" if len(some) == len(self.categories) else ", the rarest:")
        width = max((len(name) for _, name, _, _ in some), default=0)
        lines.append(title)
        lines += [
            f"  {name:{width}} {objects:>8} {100 * objects / max(1, self.objects):5.1f}% {images:>8}"
            for _, name, objects, images in some
        ]
        if len(some) < len(self.categories):
            lines.append(f"  and {len(self.categories) - len(some)} others")
        return "\n".join(lines)


def summarize(annotations: CocoAnnotations, config: ModelConfig, *, window: int | None = None) -> Summary:
    """Compute the figures of a set.

    Args:
        annotations: the set.
        config: says how images are resized.
        window: side in pixels of the crops or tiles that are resized instead of whole images.
    """
    of_category: Counter[int] = Counter()
    images_of_category: Counter[int] = Counter()
    counts: list[int] = []
    boxes = array("d")
    crowds = 0
    for image in annotations.images:
        records = annotations.annotations_of(image.id)
        objects = [record for record in records if not record["iscrowd"]]
        crowds += len(records) - len(objects)
        counts.append(len(objects))
        width, height = (side if window is None else min(side, window) for side in (image.width, image.height))
        factor = scale(width, height, config)
        boxes.extend(side * factor for record in objects for side in record["bbox"][2:])
        ids = [record["category_id"] for record in objects]
        of_category.update(ids)
        images_of_category.update(set(ids))
    box_widths, box_heights = np.array(boxes, np.float64).reshape(-1, 2).T
    categories = [(id, name, of_category[id], images_of_category[id]) for id, name in annotations.categories]
    return Summary(
        images=len(annotations),
        sizes=tuple(Counter((image.width, image.height) for image in annotations.images).most_common()),
        has_masks=annotations.has_masks,
        crowds=crowds,
        objects_of_image=np.array(counts, np.int64),
        sides=np.sqrt(box_widths * box_heights),
        ratios=box_heights / box_widths,
        categories=tuple(sorted(categories, key=lambda category: (category[2], category[0]))),
    )


def scale(width: int, height: int, config: ModelConfig) -> float:
    """Return the factor by which torchvision's detectors resize an image in evaluation.

    Example:
        >>> scale(640, 480, ModelConfig(min_size=(800,), max_size=1000))
        1.5625
    """
    return min(config.min_size[-1] / min(width, height), config.max_size / max(width, height))


def _spread(values: NDArray[Any]) -> list[float]:
    return [float(value) for value in np.percentile(values, _PERCENTILES)] if len(values) else []


def _in_words(values: NDArray[Any]) -> str:
    least, low, middle, high, most = (_short(value) for value in np.percentile(values, _PERCENTILES))
    return f"{least} to {most}, half of them up to {middle}, 9 of 10 from {low} to {high}"


def _short(value: float) -> str:
    return f"{value:.0f}" if value >= 10 or value == math.floor(value) else f"{value:.2g}"


def _shares(sides: NDArray[np.float64]) -> tuple[float, float, float]:
    number = max(1, len(sides))
    small, large = float((sides < SMALL).sum()) / number, float((sides >= LARGE).sum()) / number
    return small, 1 - small - large if len(sides) else 0.0, large
