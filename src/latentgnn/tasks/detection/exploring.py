"""A detector's images for the page of ``latentgnn explore``."""

import io
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from latentgnn.inspection import Seen, capture
from latentgnn.inspection.running import blocks_of, without
from latentgnn.tasks.detection.loading import TrainedDetector
from latentgnn.tasks.explore.views import Parts, block_view, finite
from latentgnn.tasks.image_explaining import Frame
from latentgnn.tasks.images import IMAGE_SUFFIXES, read_image

_LONGEST = 1600  # pixels of the picture that the page gets
_MOST_PIXELS = 2**25  # of a file that is dropped on the page
_MOST_FOUND = 100
_LEAST_SCORE = 0.05


class ImageExplorer:
    """See `latentgnn.tasks.explore.views.Explorer`.

    Args:
        trained: the detector.
        title: of the page.
        paths: of images.
    """

    def __init__(self, trained: TrainedDetector, title: str, paths: Sequence[Path]) -> None:
        self._trained = trained
        self._paths = paths
        self.names = [path.name for path in paths]
        self.suffixes = sorted(IMAGE_SUFFIXES)
        self.about: dict[str, Any] = {
            "task": "detection",
            "title": title,
            "categories": [name for _, name in trained.categories],
        }

    def input(self, number: int) -> Image.Image:
        """One of the images."""
        return read_image(self._paths[number])

    def read(self, path: Path) -> Image.Image:
        """A file that was dropped on the page."""
        return read_image(path, most_pixels=_MOST_PIXELS)

    def view(self, sample: Image.Image) -> bytes:
        """The image, what is found in it, and every block that has run."""
        model: Any = self._trained.model
        tensor = self._trained.transform(sample)
        with torch.no_grad():
            with capture(model) as seen:
                found = model([tensor])[0]
            batch, _ = model.transform([tensor])
        frame = Frame(sample.width, sample.height, batch.image_sizes[0], tuple(batch.tensors.shape[2:]))
        parts = Parts()
        header = {
            "width": sample.width,
            "height": sample.height,
            "picture": parts.add(_jpeg(sample), "uint8"),
            "found": self._found(found),
            "blocks": [_block(seen, name, frame, parts) for name in seen],
        }
        return parts.pack(header)

    def without(self, sample: Image.Image, block: str | None) -> bytes:
        """What is found without a block."""
        with torch.no_grad(), ExitStack() as stack:
            for name, layer in blocks_of(self._trained.model).items():
                if block in (None, name):
                    stack.enter_context(without(layer))
            found = self._trained.model([self._trained.transform(sample)])[0]
        return Parts().pack({"found": self._found(found)})

    def _found(self, found: dict[str, torch.Tensor]) -> list[dict[str, Any]]:
        names = [name for _, name in self._trained.categories]
        rows = zip(finite(found["boxes"]), found["labels"].tolist(), finite(found["scores"]), strict=True)
        sure = [row for row in rows if row[2] >= _LEAST_SCORE][:_MOST_FOUND]
        return [
            {"box": box, "label": label - 1, "name": names[label - 1], "score": score} for box, label, score in sure
        ]


def _block(seen: Seen, name: str, frame: Frame, parts: Parts) -> dict[str, Any]:
    """A block, with how many nodes of its map the image covers: in whole nodes, and as a part of the map."""
    block = block_view(seen, name, parts)
    inside = frame.inside(tuple(block["shape"]))
    sides = zip(block["shape"], frame.resized, frame.padded, strict=True)
    covered = [size * part / whole for size, part, whole in sides]
    return {**block, "inside": list(inside), "covered": covered}


def _jpeg(image: Image.Image) -> bytes:
    small = image.copy()
    small.thumbnail((_LONGEST, _LONGEST))
    stream = io.BytesIO()
    small.save(stream, "JPEG", quality=92)
    return stream.getvalue()
