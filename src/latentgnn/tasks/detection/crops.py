"""Training on crops: choosing a window of a large image, and the objects in it."""

from typing import Any

import numpy as np
import torch
from faster_coco_eval.core import mask as coco_mask
from torch import Tensor
from torchvision import tv_tensors

from latentgnn.tasks.detection.config import CropConfig
from latentgnn.tasks.detection.segmentations import to_rle
from latentgnn.tasks.detection.windows import Window, cut_mask


def draw_window(config: CropConfig, boxes: Tensor, width: int, height: int) -> Window:
    """Draw a random window of an image, with torch's default CPU generator.

    Args:
        config: crop settings with a ``size``.
        boxes: boxes of the image's objects, (n, 4) xyxy.
        width: width of the image.
        height: height of the image.
    """
    assert config.size is not None
    across, down = min(config.size, width), min(config.size, height)
    if len(boxes) and float(torch.rand(())) < config.on_object:
        left, top, right, bottom = boxes[int(torch.randint(len(boxes), ()))].tolist()
        x, y = _start_around(left, right, across, width), _start_around(top, bottom, down, height)
    else:
        x, y = _draw(0, width - across), _draw(0, height - down)
    return Window(x, y, x + across, y + down)


def cut_target(
    boxes: Tensor,
    labels: Tensor,
    segmentations: list[Any] | None,
    window: Window,
    size: tuple[int, int],
    *,
    visible: float,
) -> dict[str, Any]:
    """Return the objects that a window shows.

    Boxes are moved but not cut: the pipeline's last step does that (`latentgnn.tasks.detection.transforms.FitBoxes`),
    because rotation and zoom come before it.

    Args:
        boxes: boxes of the image's objects, (n, 4) xyxy, within the image.
        labels: (n,).
        segmentations: segmentations of the objects, as in COCO's files; ``None`` if there are no masks.
        window: the part of the image.
        size: (width, height) of the image.
        visible: minimum fraction of a mask, or of a box if there are no masks, that must be in the window.

    Returns:
        ``boxes`` and ``labels`` of the objects that are kept and, if there are masks, ``masks`` uint8 (n, H, W) of the
        window.
    """
    left, top, right, bottom = window
    limits = boxes.new_tensor([left, top, right, bottom])
    inside = torch.cat([torch.maximum(boxes[:, :2], limits[:2]), torch.minimum(boxes[:, 2:], limits[2:])], dim=1)
    sides = (inside[:, 2:] - inside[:, :2]).clamp(min=0)
    keep = (sides > 0).all(dim=1)
    masks = []
    if segmentations is None:
        areas = (boxes[:, 2:] - boxes[:, :2]).prod(dim=1)
        keep &= sides.prod(dim=1) >= visible * areas
    else:
        for index in keep.nonzero()[:, 0].tolist():
            rle = to_rle(segmentations[index], size[1], size[0])
            mask = cut_mask(rle, window)
            seen = int(mask.sum())
            if seen and seen >= visible * float(coco_mask.area(rle)):
                masks.append(mask)
            else:
                keep[index] = False
    canvas = (window.height, window.width)
    target: dict[str, Any] = {
        "boxes": tv_tensors.BoundingBoxes(
            boxes[keep] - boxes.new_tensor([left, top, left, top]), format="XYXY", canvas_size=canvas
        ),
        "labels": labels[keep],
    }
    if segmentations is not None:
        stacked = np.stack(masks) if masks else np.zeros((0, *canvas), np.uint8)
        target["masks"] = tv_tensors.Mask(torch.from_numpy(stacked), dtype=torch.uint8)
    return target


def _start_around(low: float, high: float, length: int, limit: int) -> int:
    """A random start of an interval that contains another one or, if that is longer, lies within it."""
    bounds = sorted((int(high) + (high % 1 > 0) - length, int(low)))
    within = [min(max(bound, 0), limit - length) for bound in bounds]
    return _draw(*within)


def _draw(low: int, high: int) -> int:
    return int(torch.randint(low, high + 1, ()))
