"""Pictures of classes: over an image, and beside the ground truth."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from latentgnn.tasks.classes import IGNORE
from latentgnn.tasks.segmentation.config import Color

_OPACITY = 0.55
_GAP = 6  # gap between panels in pixels
_LONGEST = 1200


def colored(labels: NDArray[np.int64], colors: Sequence[Color]) -> NDArray[np.uint8]:
    """Return labels (H, W) as colours (H, W, 3); black if there is no label."""
    palette = np.array([*colors, (0, 0, 0)], np.uint8)
    return palette[np.where(labels == IGNORE, len(colors), labels)]


def overlay(image: Image.Image, labels: NDArray[np.int64], colors: Sequence[Color]) -> Image.Image:
    """Draw the classes' colours over an image of the same size; pixels without a label are unchanged."""
    over = Image.fromarray(colored(labels, colors))
    mask = Image.fromarray(np.where(labels == IGNORE, 0, round(255 * _OPACITY)).astype(np.uint8))
    return Image.composite(over, image.convert("RGB"), mask)


def beside(
    image: Image.Image, truth: NDArray[np.int64], predicted: NDArray[np.int64], colors: Sequence[Color]
) -> Image.Image:
    """Draw an image, its labels and the prediction side by side."""
    panels = [image.convert("RGB"), *(Image.fromarray(colored(labels, colors)) for labels in (truth, predicted))]
    width, height = image.size
    picture = Image.new("RGB", (3 * width + 2 * _GAP, height), "white")
    for number, panel in enumerate(panels):
        picture.paste(panel, (number * (width + _GAP), 0))
    # Labels must not be interpolated, which would produce colours of other classes.
    picture.thumbnail((_LONGEST, _LONGEST), Image.Resampling.NEAREST)
    return picture
