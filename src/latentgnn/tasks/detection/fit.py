"""Warnings before training about data that do not fit the recipe, each with the setting to change."""

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from latentgnn.tasks.detection.config import DetectionConfig
from latentgnn.tasks.detection.summary import Summary

NEEDS_MASKS = (
    "these annotations have boxes and no masks, which a Mask R-CNN learns from: train a detector that needs none, "
    "--model.detector faster_rcnn or retinanet"
)

# Fraction of the objects that may not fit without a change of recipe.
_FEW = 0.01
# An anchor with half an object's aspect ratio still overlaps it by half.
_NEAR = 2.0
_NAMED = 5


def misfits(config: DetectionConfig, summaries: Mapping[str, Summary]) -> list[str]:
    """Return one line for each mismatch.

    Args:
        config: the recipe's configuration.
        summaries: summary of each existing split, ``train`` and ``val``.
    """
    lines = []
    if config.model.detector == "mask_rcnn" and not all(summary.has_masks for summary in summaries.values()):
        lines.append(NEEDS_MASKS)
    for split, summary in summaries.items():
        lines += [f"{split}: {line}" for line in _of_split(config, summary)]
    if "val" in summaries and "train" in summaries:
        lines += _one_sided(summaries["train"], summaries["val"])
    if "val" not in summaries:
        lines.append(
            "there is no val split, which training needs: have a part of the images drawn for it with "
            "--data.val_fraction 0.2, and with --data.val_groups PATTERN where images belong together, such as the "
            "frames of one video"
        )
    return lines


def _of_split(config: DetectionConfig, summary: Summary) -> list[str]:
    model, lines = config.model, []
    smallest, largest = min(model.anchor_sizes), max(model.anchor_sizes)
    if (text := _share(summary.sides < smallest, summary.objects)) is not None:
        lines.append(
            f"{text} objects are smaller than the smallest anchor, {smallest} pixels, when images are resized: raise "
            "model.min_size and model.max_size, or lower model.anchor_sizes"
        )
    if (text := _share(summary.sides > 2 * largest, summary.objects)) is not None:
        lines.append(
            f"{text} objects are more than twice as large as the largest anchor, {largest} pixels, when images are "
            "resized: raise model.anchor_sizes, or lower model.min_size and model.max_size"
        )
    low, high = min(model.anchor_ratios) / _NEAR, max(model.anchor_ratios) * _NEAR
    if (text := _share((summary.ratios < low) | (summary.ratios > high), summary.objects)) is not None:
        lines.append(
            f"{text} objects are much taller or wider than any anchor, with a height over width beyond {low:g} to "
            f"{high:g}: add to model.anchor_ratios"
        )
    most = int(summary.objects_of_image.max(initial=0))
    limits = {"evaluation.max_detections": config.evaluation.max_detections[-1]}
    if config.evaluation.tiles is None:
        # With tiles, this limit holds per tile.
        limits["model.detections_per_image"] = model.detections_per_image
    for name, limit in limits.items():
        if most > limit:
            images = int((summary.objects_of_image > limit).sum())
            lines.append(f"{images} images have more than {limit} objects, {most} at most: raise {name}")
    return lines


def _one_sided(train: Summary, val: Summary) -> list[str]:
    lines = []
    for split, there, other in (("val", val, train), ("train", train, val)):
        present = {id for id, _, objects, _ in there.categories if objects}
        missing = [name for id, name, objects, _ in other.categories if objects and id not in present]
        if missing:
            some = ", ".join(missing[:_NAMED]) + (f" and {len(missing) - _NAMED} more" if missing[_NAMED:] else "")
            lines.append(
                f"{split}: {len(missing)} categories have no example here, and have one in "
                f"{'train' if split == 'val' else 'val'}: {some}"
            )
    return lines


def _share(chosen: NDArray[np.bool_], objects: int) -> str | None:
    number = int(chosen.sum())
    return f"{number} of {objects}" if number > _FEW * objects else None
