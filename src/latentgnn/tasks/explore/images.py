"""Images on the page of ``latentgnn explore``, for any task."""

import io
from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import nn

from latentgnn.inspection import Seen, capture
from latentgnn.inspection.running import inspected_blocks, without
from latentgnn.tasks.explore.views import Parts, block_view
from latentgnn.tasks.image_explaining import Frame
from latentgnn.tasks.images import IMAGE_SUFFIXES, read_image

LONGEST = 1600
"""Maximum length in pixels of the longer side of the picture that is sent to the page."""

_MOST_PIXELS = 2**25  # of a file that is dropped on the page


class ImageExplorer(ABC):
    """See `latentgnn.tasks.explore.views.Explorer`; a subclass says what is found in an image, and how a batch is made.

    Args:
        model: the model in evaluation mode.
        paths: image files.
        about: what the page needs to show results: ``task``, ``title``, ``categories``.
    """

    def __init__(self, model: nn.Module, paths: Sequence[Path], about: dict[str, Any]) -> None:
        self.model = model
        self.paths = paths
        self.about = about
        self.names = [path.name for path in paths]
        self.suffixes = sorted(IMAGE_SUFFIXES)

    @abstractmethod
    def find(self, sample: Image.Image, parts: Parts) -> dict[str, Any]:
        """Run the network on an image, and return what the page shows of the result.

        Args:
            sample: the image.
            parts: collects arrays.
        """

    @abstractmethod
    def frame(self, sample: Image.Image) -> Frame:
        """Return how an image is placed in the network's batch."""

    def input(self, number: int) -> Image.Image:
        """Return one of the images."""
        return read_image(self.paths[number])

    def read(self, path: Path) -> Image.Image:
        """Read a file that was dropped on the page."""
        return read_image(path, most_pixels=_MOST_PIXELS)

    def view(self, sample: Image.Image) -> bytes:
        """Return the image, the results on it, and every block that has run."""
        parts = Parts()
        with torch.no_grad(), capture(self.model) as seen:
            found = self.find(sample, parts)
        frame = self.frame(sample)
        header = {
            "width": sample.width,
            "height": sample.height,
            "picture": parts.add(_jpeg(sample), "uint8"),
            **found,
            "blocks": [_block(seen, name, frame, parts) for name in seen],
        }
        return parts.pack(header)

    def without(self, sample: Image.Image, block: str | None) -> bytes:
        """Return the results without a block."""
        parts = Parts()
        with torch.no_grad(), ExitStack() as stack:
            for name, layer in inspected_blocks(self.model).items():
                if block in (None, name):
                    stack.enter_context(without(layer))
            found = self.find(sample, parts)
        return parts.pack(found)


def _block(seen: Seen, name: str, frame: Frame, parts: Parts) -> dict[str, Any]:
    """A block, with the part of its map that the image covers: in whole nodes, and as a fraction."""
    block = block_view(seen, name, parts)
    inside = frame.inside(tuple(block["shape"]))
    sides = zip(block["shape"], frame.resized, frame.padded, strict=True)
    covered = [size * part / whole for size, part, whole in sides]
    return {**block, "inside": list(inside), "covered": covered}


def _jpeg(image: Image.Image) -> bytes:
    small = image.copy()
    small.thumbnail((LONGEST, LONGEST))
    stream = io.BytesIO()
    small.save(stream, "JPEG", quality=92)
    return stream.getvalue()
