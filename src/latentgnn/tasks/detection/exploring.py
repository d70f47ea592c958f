"""A detector's images on the page of ``latentgnn explore``."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image
from torch import Tensor

from latentgnn.tasks.detection.loading import TrainedDetector
from latentgnn.tasks.explore.images import ImageExplorer
from latentgnn.tasks.explore.views import Parts, finite
from latentgnn.tasks.image_explaining import Frame

_MOST_FOUND = 100
_LEAST_SCORE = 0.05


class DetectorExplorer(ImageExplorer):
    """Images with their detections.

    Args:
        trained: the detector.
        title: title of the page.
        paths: image files.
    """

    def __init__(self, trained: TrainedDetector, title: str, paths: Sequence[Path]) -> None:
        self._trained = trained
        self._names = [name for _, name in trained.categories]
        super().__init__(trained.model, paths, {"task": "detection", "title": title, "categories": self._names})

    def find(self, sample: Image.Image, parts: Parts) -> dict[str, Any]:
        """Return ``found``: boxes with their categories, highest scores first."""
        found: dict[str, Tensor] = self.model([self._trained.transform(sample)])[0]
        rows = zip(finite(found["boxes"]), found["labels"].tolist(), finite(found["scores"]), strict=True)
        sure = [row for row in rows if row[2] >= _LEAST_SCORE][:_MOST_FOUND]
        listed = [
            {"box": box, "label": label - 1, "name": self._names[label - 1], "score": score}
            for box, label, score in sure
        ]
        return {"found": listed}

    def frame(self, sample: Image.Image) -> Frame:
        """Return how the detector resizes and pads an image."""
        transform: Any = self.model.get_submodule("transform")
        batch, _ = transform([self._trained.transform(sample)])
        return Frame(sample.width, sample.height, batch.image_sizes[0], tuple(batch.tensors.shape[2:]))
