"""A detector that processes images, whole or in tiles, and returns COCO-results records."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from latentgnn.tasks.detection.results import records_of
from latentgnn.tasks.detection.tiles import Tiling, detect_in_tiles
from latentgnn.tasks.images import to_tensor


class Finder:
    """A detector, and how it processes images.

    Args:
        model: a detector with torchvision's interface; it is moved to ``device`` and put in evaluation mode.
        categories: id and name of each category, in the order of the labels, which start at 1.
        score_threshold: detections that score less are omitted.
        device: the device to run on.
        tiling: process images in overlapping tiles (see `latentgnn.tasks.detection.tiles.detect_in_tiles`).
        nms_threshold: threshold for merging the detections of tiles.
    """

    def __init__(
        self,
        model: nn.Module,
        categories: Sequence[tuple[int, str]],
        *,
        score_threshold: float = 0.5,
        device: torch.device | str = "cpu",
        tiling: Tiling | None = None,
        nms_threshold: float = 0.5,
    ) -> None:
        self.categories = categories
        self.tiling = tiling
        self._model = model.to(device).eval()
        self._category_of_label = {label: category_id for label, (category_id, _) in enumerate(categories, 1)}
        self._score_threshold, self._nms_threshold = score_threshold, nms_threshold
        self._device = device

    def find(
        self, image: Image.Image, image_id: int, *, on_tile: Callable[[int, int], None] | None = None
    ) -> list[dict[str, Any]]:
        """Return COCO-results records of the detections in an image.

        Args:
            image: RGB.
            image_id: id for the records.
            on_tile: called after each tile with the number of tiles done and the total.
        """

        def records(output: Mapping[str, Tensor]) -> list[dict[str, Any]]:
            strong = output["scores"] >= self._score_threshold
            # If all are kept, masks are not copied.
            kept = output if bool(strong.all()) else {name: value[strong] for name, value in output.items()}
            return records_of(kept, image_id, self._category_of_label)

        with torch.inference_mode():
            if self.tiling is None:
                return records(self._model([to_tensor(image).to(self._device)])[0])
            return detect_in_tiles(
                self._model,
                image,
                self.tiling,
                records,
                device=self._device,
                nms_threshold=self._nms_threshold,
                on_tile=on_tile,
            )
