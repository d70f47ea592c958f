"""Pictures of what a detector's blocks do on an image."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from latentgnn.inspection import capture
from latentgnn.tasks.detection.loading import TrainedDetector
from latentgnn.tasks.explaining import Explained
from latentgnn.tasks.image_explaining import Frame, Place, choose_places, explain_maps, refuse_outside
from latentgnn.tasks.images import read_image


def explain_image(
    trained: TrainedDetector, path: Path, *, blocks: Sequence[str], places: Sequence[Place]
) -> Iterator[Explained]:
    """Yield pictures of what each block does on an image.

    Args:
        trained: the detector.
        path: the image file.
        blocks: names of the blocks.
        places: pixels whose nodes are shown; if empty, the centres of the highest-scoring detections, then other pixels
            spread over the image.

    Raises:
        UserError: if the file cannot be read, or a place is outside the image.
    """
    image = read_image(path)
    refuse_outside(path, image, places)
    tensor = trained.transform(image)
    model: Any = trained.model
    with torch.inference_mode(False), torch.no_grad():
        with capture(model) as seen:
            found = model([tensor])[0]
        batch, _ = model.transform([tensor])
    frame = Frame(image.width, image.height, batch.image_sizes[0], tuple(batch.tensors.shape[2:]))
    middles = [
        ((x1 + x2) / 2, (y1 + y2) / 2)
        for (x1, y1, x2, y2), score in zip(found["boxes"].tolist(), found["scores"].tolist(), strict=True)
        if score >= 0.5
    ]
    names = dict(trained.categories)
    labels = [names[trained.categories[label - 1][0]] for label in found["labels"].tolist()]
    shown = [
        (box, f"{label} {score:.2f}")
        for box, label, score in zip(found["boxes"].tolist(), labels, found["scores"].tolist(), strict=True)
        if score >= 0.5
    ]
    chosen = list(places) or choose_places(middles, image.size)
    yield from explain_maps(path, image, frame, seen, blocks=blocks, places=chosen, objects=shown)
