"""A segmenter's images on the page of ``latentgnn explore``."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from latentgnn.tasks.explore.images import LONGEST, ImageExplorer
from latentgnn.tasks.explore.views import Parts
from latentgnn.tasks.image_explaining import Frame
from latentgnn.tasks.segmentation.datasets import scaled
from latentgnn.tasks.segmentation.layouts import colors_of
from latentgnn.tasks.segmentation.loading import TrainedSegmenter


class SegmenterExplorer(ImageExplorer):
    """Images with the classes of their pixels. The network sees them whole, because an affinity belongs to one map.

    Args:
        trained: the segmenter.
        title: title of the page.
        paths: image files.
    """

    def __init__(self, trained: TrainedSegmenter, title: str, paths: Sequence[Path]) -> None:
        config = trained.config
        self._trained = trained._replace(config=replace(config, evaluation=replace(config.evaluation, tiles=None)))
        about = {
            "task": "segmentation",
            "title": title,
            "categories": list(trained.class_names),
            "colors": colors_of(config.data, trained.class_ids),
        }
        super().__init__(trained.model, paths, about)

    def find(self, sample: Image.Image, parts: Parts) -> dict[str, Any]:
        """Return ``classes`` of pixels, row by row, and ``size``, (height, width), at most the page's picture's."""
        labels = self._trained.predict(sample).numpy().astype(np.int32)
        picture = Image.fromarray(labels)
        # Classes cannot be averaged, so one of several pixels is kept.
        picture.thumbnail((LONGEST, LONGEST), Image.Resampling.NEAREST, reducing_gap=None)
        kept = np.asarray(picture)
        return {"classes": parts.add(kept, "int32"), "size": list(kept.shape)}

    def frame(self, sample: Image.Image) -> Frame:
        """Return the frame: the network's batch is the resized image without padding."""
        height, width = scaled((sample.height, sample.width), self._trained.config.data.scale)
        return Frame(sample.width, sample.height, (height, width), (height, width))
