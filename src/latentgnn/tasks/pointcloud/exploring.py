"""A point network's scans on the page of ``latentgnn explore``."""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from latentgnn.inspection import Seen, capture
from latentgnn.inspection.running import inspected_blocks, without
from latentgnn.tasks.explore.views import Parts, block_view
from latentgnn.tasks.pointcloud.crop import Crop, take_crop
from latentgnn.tasks.pointcloud.loading import TrainedSegmenter
from latentgnn.tasks.pointcloud.scans import SUFFIXES, Scan


class ScanExplorer:
    """See `latentgnn.tasks.explore.views.Explorer`: shows the crop with the most points of each scan.

    Args:
        trained: the network.
        title: title of the page.
        names: names of the scans.
        load: reads the scan at an index.
    """

    def __init__(
        self, trained: TrainedSegmenter, title: str, names: Sequence[str], load: Callable[[int], Scan]
    ) -> None:
        self._trained = trained
        self._load = load
        self.names = list(names)
        self.suffixes = SUFFIXES
        self.about: dict[str, Any] = {"task": "pointcloud", "title": title, "categories": list(trained.class_names)}

    def input(self, number: int) -> Crop:
        """Return a crop of one of the scans."""
        return self._crop(self._load(number))

    def read(self, path: Path) -> Crop:
        """Return a crop of a file that was dropped on the page."""
        return self._crop(self._trained.transform.scan(path))

    def view(self, sample: Crop) -> bytes:
        """Return the points, their classes, and every block."""
        with capture(self._trained.model) as seen:
            classes = self._classes(sample)
        low, high = sample.points.min(axis=0), sample.points.max(axis=0)
        middle = (low + high) / 2
        parts = Parts()
        header = {
            "middle": middle.tolist(),
            "size": np.maximum(high - low, 1e-6).tolist(),
            "radius": max(float(np.linalg.norm(high - low)) / 2, 1e-6),
            "points": parts.add(sample.points - middle, "float32"),
            "classes": parts.add(classes, "int32"),
            "blocks": [_block(seen, name, sample, middle, parts) for name in seen],
        }
        return parts.pack(header)

    def without(self, sample: Crop, block: str | None) -> bytes:
        """Return the classes without a block."""
        with ExitStack() as stack:
            for name, layer in inspected_blocks(self._trained.model).items():
                if block in (None, name):
                    stack.enter_context(without(layer))
            classes = self._classes(sample)
        parts = Parts()
        return parts.pack({"classes": parts.add(classes, "int32")})

    def _crop(self, scan: Scan) -> Crop:
        return take_crop(self._trained, scan.points, scan.features, ())

    def _classes(self, crop: Crop) -> Tensor:
        model = self._trained.model
        with torch.no_grad():
            scores: Tensor = model(*crop.inputs(next(model.parameters()).device))
        return scores.argmax(dim=1)


def _block(seen: Seen, name: str, crop: Crop, middle: Any, parts: Parts) -> dict[str, Any]:
    """A block, with the positions of its nodes, and the node that represents each point of the finest level."""
    level = int(name.split(".")[1])
    positions = crop.at_level(level) - middle
    nearest = crop.to_finest(np.arange(len(positions), dtype=np.float32), level)
    return {
        **block_view(seen, name, parts),
        "positions": parts.add(positions, "float32"),
        "nearest": parts.add(nearest, "int32"),
    }
