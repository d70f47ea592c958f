"""Pictures of classes: over an image, and beside what is true."""

import io
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from latentgnn.tasks.classes import IGNORE
from latentgnn.tasks.segmentation.config import Color

_OPACITY = 0.55
_GAP = 6  # pixels between panels
_LONGEST = 1200


def colored(labels: NDArray[np.int64], colors: Sequence[Color]) -> NDArray[np.uint8]:
    """Labels (H, W) as colours (H, W, 3); black where there is none."""
    palette = np.array([*colors, (0, 0, 0)], np.uint8)
    return palette[np.where(labels == IGNORE, len(colors), labels)]


def overlay(image: Image.Image, labels: NDArray[np.int64], colors: Sequence[Color]) -> Image.Image:
    """The classes' colours over an image, of its size; the image alone where there is no label."""
    over = Image.fromarray(colored(labels, colors))
    mask = Image.fromarray(np.where(labels == IGNORE, 0, round(255 * _OPACITY)).astype(np.uint8))
    return Image.composite(over, image.convert("RGB"), mask)


def beside(
    image: Image.Image, truth: NDArray[np.int64], predicted: NDArray[np.int64], colors: Sequence[Color]
) -> Image.Image:
    """An image, its labels and what was predicted, side by side."""
    panels = [image.convert("RGB"), *(Image.fromarray(colored(labels, colors)) for labels in (truth, predicted))]
    width, height = image.size
    picture = Image.new("RGB", (3 * width + 2 * _GAP, height), "white")
    for number, panel in enumerate(panels):
        picture.paste(panel, (number * (width + _GAP), 0))
    # Labels must not be blended, which would make colours of other classes.
    picture.thumbnail((_LONGEST, _LONGEST), Image.Resampling.NEAREST)
    return picture


def png(picture: Image.Image) -> bytes:
    """A picture as a PNG file's content."""
    stream = io.BytesIO()
    picture.save(stream, format="PNG")
    return stream.getvalue()
