"""Random changes of a training image with its boxes and masks.

A sample is ``(image, target)``: a `tv_tensors.Image`, float (3, H, W) in 0..1, and a dict with ``boxes``
(`tv_tensors.BoundingBoxes`, xyxy), ``labels`` and, in sets that have them, ``masks`` (`tv_tensors.Mask`, uint8
(n, H, W)).
All randomness comes from torch's default CPU generator.
"""

from typing import Any

import torch
from torch import Tensor
from torchvision import tv_tensors
from torchvision.ops import masks_to_boxes
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

from latentgnn.tasks.detection.config import AugmentConfig

_GRAY = 0.5  # value around an image that a zoom has shrunk

# Smaller differences between a box and the clamped box are rounding errors, not an object cut by the image's edge.
_ROUNDING = 1e-3


def build_transform(config: AugmentConfig) -> v2.Compose:
    """Return the pipeline for a configuration; it always ends with `FitBoxes`.

    Example:
        >>> build_transform(AugmentConfig(horizontal_flip=0.0)).transforms
        [FitBoxes()]
    """
    steps: list[torch.nn.Module] = []
    if config.quarter_turns:
        steps.append(QuarterTurn())
    if config.horizontal_flip > 0:
        steps.append(v2.RandomHorizontalFlip(config.horizontal_flip))
    if config.vertical_flip > 0:
        steps.append(v2.RandomVerticalFlip(config.vertical_flip))
    if config.scale is not None:
        steps.append(Zoom(*config.scale))
    if config.crop is not None:
        steps.append(SquareCrop(config.crop))
    if config.brightness or config.contrast or config.saturation or config.hue:
        steps.append(
            v2.ColorJitter(
                brightness=config.brightness, contrast=config.contrast, saturation=config.saturation, hue=config.hue
            )
        )
    if config.grayscale > 0:
        steps.append(v2.RandomGrayscale(config.grayscale))
    if config.invert > 0:
        steps.append(v2.RandomInvert(config.invert))
    steps.append(FitBoxes())
    return v2.Compose(steps)


class QuarterTurn(v2.Transform):  # type: ignore[misc]  # torchvision has no types
    """Turns a sample counter-clockwise by 0, 90, 180 or 270 degrees with equal probability, without resampling."""

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        return {"turns": int(torch.randint(4, ()))}

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        turns = params["turns"]
        if not isinstance(inpt, tv_tensors.BoundingBoxes):
            return tv_tensors.wrap(torch.rot90(inpt.as_subclass(Tensor), turns, (-2, -1)).contiguous(), like=inpt)
        boxes, (height, width) = inpt.as_subclass(Tensor), inpt.canvas_size
        for _ in range(turns):
            left, top, right, bottom = boxes.unbind(-1)
            boxes = torch.stack([top, width - right, bottom, width - left], dim=-1)
            height, width = width, height
        return _boxes(boxes, (height, width))


class SquareCrop(v2.Transform):  # type: ignore[misc]  # torchvision has no types
    """Cuts a random square window; an image that is shorter in a dimension is not cut in it.

    Boxes are moved but not cut: `FitBoxes` does that, and needs the uncut boxes.

    Args:
        side: side of the window, in pixels.
    """

    def __init__(self, side: int) -> None:
        super().__init__()
        self.side = side

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        height, width = v2.query_size(flat_inputs)
        window = min(self.side, height), min(self.side, width)
        return {"corner": (_offset(height - window[0]), _offset(width - window[1])), "window": window}

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        (top, left), (height, width) = params["corner"], params["window"]
        if isinstance(inpt, tv_tensors.BoundingBoxes):
            return _boxes(inpt.as_subclass(Tensor) - inpt.new_tensor([left, top, left, top]), (height, width))
        return F.crop(inpt, top, left, height, width)


class Zoom(v2.Transform):  # type: ignore[misc]  # torchvision has no types
    """Enlarges or shrinks the content by a random factor and keeps the image's size.

    A random window of an enlarged image is kept; a shrunk image is placed at random on gray. (If the image's size
    changed instead, the detector's own resizing would undo the zoom.)

    Args:
        lowest: smallest factor.
        highest: largest factor.
    """

    def __init__(self, lowest: float, highest: float) -> None:
        super().__init__()
        self.lowest = lowest
        self.highest = highest

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        height, width = v2.query_size(flat_inputs)
        factor = self.lowest + (self.highest - self.lowest) * float(torch.rand(()))
        # Either a part of the image fills the canvas, or the whole image fills a part of the canvas.
        window = min(height, max(1, round(height / factor))), min(width, max(1, round(width / factor)))
        filled = min(height, max(1, round(height * factor))), min(width, max(1, round(width * factor)))
        return {
            "canvas": (height, width),
            "window": window,
            "corner": (_offset(height - window[0]), _offset(width - window[1])),
            "filled": filled,
            "place": (_offset(height - filled[0]), _offset(width - filled[1])),
        }

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        (top, left), (height, width) = params["corner"], params["window"]
        (down, across), (filled_height, filled_width) = params["place"], params["filled"]
        if isinstance(inpt, tv_tensors.BoundingBoxes):
            across_factor, down_factor = filled_width / width, filled_height / height
            scaled = (inpt.as_subclass(Tensor) - inpt.new_tensor([left, top, left, top])) * inpt.new_tensor(
                [across_factor, down_factor, across_factor, down_factor]
            )
            return _boxes(scaled + inpt.new_tensor([across, down, across, down]), params["canvas"])
        is_mask = isinstance(inpt, tv_tensors.Mask)
        # F.resize takes "nearest" for masks, which samples half a pixel away from where bilinear does.
        how = v2.InterpolationMode.NEAREST_EXACT if is_mask else v2.InterpolationMode.BILINEAR
        part = F.resize_image(
            inpt.as_subclass(Tensor)[..., top : top + height, left : left + width],
            [filled_height, filled_width],
            interpolation=how,
        )
        canvas = inpt.as_subclass(Tensor).new_full((*inpt.shape[:-2], *params["canvas"]), 0 if is_mask else _GRAY)
        canvas[..., down : down + filled_height, across : across + filled_width] = part
        return tv_tensors.wrap(canvas, like=inpt)


class FitBoxes(torch.nn.Module):
    """Cuts boxes at the image's edge and drops the objects that are outside.

    A box that the edge cuts becomes the tight box of the rest of its mask; without masks it is clamped, and must keep a
    pixel in both directions. Objects whose masks have no pixel left are dropped.
    """

    def forward(self, image: Tensor, target: dict[str, Any]) -> tuple[Tensor, dict[str, Any]]:
        canvas: tuple[int, int] = target["boxes"].canvas_size
        boxes = target["boxes"].as_subclass(Tensor)
        limits = boxes.new_tensor([canvas[1], canvas[0]] * 2)
        clamped = torch.minimum(boxes.clamp(min=0), limits)
        cut = (clamped - boxes).abs().amax(dim=1) > _ROUNDING
        sides = clamped[:, 2:] - clamped[:, :2]
        keep = (sides > 0).all(dim=1)
        if "masks" in target:
            masks = target["masks"].as_subclass(Tensor)
            keep &= masks.flatten(1).any(dim=1).bool()
            refit = cut & keep
            # `masks_to_boxes` returns the last pixel inside; a box ends one pixel after it.
            clamped[refit] = masks_to_boxes(masks[refit]).to(boxes) + boxes.new_tensor([0, 0, 1, 1])
        else:
            keep &= ~cut | (sides >= 1).all(dim=1)
        fitted = dict(target, boxes=_boxes(clamped[keep], canvas), labels=target["labels"][keep])
        if "masks" in target:
            fitted["masks"] = tv_tensors.Mask(masks[keep])
        return image, fitted


def _boxes(boxes: Tensor, canvas: tuple[int, int]) -> Tensor:
    wrapped: Tensor = tv_tensors.BoundingBoxes(boxes, format="XYXY", canvas_size=canvas)
    return wrapped


def _offset(room: int) -> int:
    return int(torch.randint(room + 1, ()))
