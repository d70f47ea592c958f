"""Detection on large images in overlapping tiles."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from latentgnn.tasks.detection.config import EvaluationConfig
from latentgnn.tasks.detection.merging import merge_tiles
from latentgnn.tasks.detection.windows import Window
from latentgnn.tasks.images import to_tensor

Record = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Tiling:
    """How images are divided.

    Args:
        size: side of a tile in pixels; in a dimension in which the image is shorter, tiles are as long as the image.
        overlap: minimum overlap of neighbouring tiles, as a fraction of ``size``.
    """

    size: int
    overlap: float

    @classmethod
    def of(cls, config: EvaluationConfig) -> "Tiling | None":
        """Return the configured tiling; ``None`` if images are processed whole."""
        return None if config.tiles is None else cls(size=config.tiles, overlap=config.tile_overlap)

    def windows(self, width: int, height: int) -> list[Window]:
        """Return the tiles of an image, row by row, as evenly spaced as whole pixels allow.

        Example:
            >>> [window[:2] for window in Tiling(size=100, overlap=0.2).windows(180, 100)]
            [(0, 0), (80, 0)]
        """
        tops, lefts = self._starts(height), self._starts(width)
        across, down = min(self.size, width), min(self.size, height)
        return [Window(left, top, left + across, top + down) for top in tops for left in lefts]

    def _starts(self, length: int) -> list[int]:
        room = length - self.size
        if room <= 0:
            return [0]
        step = max(1, self.size - round(self.size * self.overlap))
        number = -(-room // step)
        return [place * room // number for place in range(number + 1)]


def detect_in_tiles(
    model: nn.Module,
    image: Image.Image,
    tiling: Tiling,
    records_of: Callable[[Mapping[str, Tensor]], Sequence[Record]],
    *,
    device: torch.device | str,
    nms_threshold: float,
    on_tile: Callable[[int, int], None] | None = None,
) -> list[Record]:
    """Return a detector's records for an image that is processed tile by tile.

    Args:
        model: a detector with torchvision's interface, in evaluation mode.
        image: RGB.
        tiling: how the image is divided.
        records_of: converts the detector's output to COCO-results records.
        device: the model's device.
        nms_threshold: see `latentgnn.tasks.detection.merging.merge_tiles`.
        on_tile: called after each tile with the number of tiles done and the total.

    Returns:
        The records of the image, as ``merge_tiles`` returns them.
    """
    windows = tiling.windows(*image.size)
    found = []
    for number, window in enumerate(windows, 1):
        (output,) = model([to_tensor(image.crop(window)).to(device)])
        found.append((window, records_of(output)))
        # Otherwise it would be kept while the next one is computed.
        del output
        if on_tile is not None:
            on_tile(number, len(windows))
    return merge_tiles(found, image.size, nms_threshold=nms_threshold)
