"""Pictures of what a segmenter's blocks do on an image."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from latentgnn.inspection import capture
from latentgnn.tasks.explaining import Explained
from latentgnn.tasks.image_explaining import Frame, Place, choose_places, explain_maps, refuse_outside
from latentgnn.tasks.images import read_image
from latentgnn.tasks.segmentation.loading import TrainedSegmenter


def explain_image(
    trained: TrainedSegmenter, path: Path, *, blocks: Sequence[str], places: Sequence[Place]
) -> Iterator[Explained]:
    """Yield pictures of what each block does on an image, which the network sees whole.

    Args:
        trained: the segmenter.
        path: the image file.
        blocks: names of the blocks.
        places: pixels whose nodes are shown; if empty, places spread over the image.

    Raises:
        UserError: if the file cannot be read, or a place is outside the image.
    """
    image = read_image(path)
    refuse_outside(path, image, places)
    batch = trained.transform(image)
    with torch.inference_mode(False), torch.no_grad(), capture(trained.model) as seen:
        trained.model(batch)
    size = (batch.shape[2], batch.shape[3])
    frame = Frame(image.width, image.height, size, size)
    chosen = list(places) or choose_places([], image.size)
    yield from explain_maps(path, image, frame, seen, blocks=blocks, places=chosen)
