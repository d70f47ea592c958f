"""What a prediction by tiles will take of memory, said before it starts: counted, and measured on an empty tile."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image

from latentgnn.errors import UserError
from latentgnn.tasks.detection.loading import TrainedDetector
from latentgnn.tasks.detection.tiles import Tiling
from latentgnn.tasks.images import MOST_PIXELS_IN_TILES, ORIENTATION_TAG, open_image

# Bytes a pixel that Pillow holds of an image in a mode, and those of the conversion to RGB beside it.
_DECODED = {"RGB": 4, "L": 1 + 4, "P": 1 + 4, "1": 1 + 4, "RGBA": 4 + 4, "LA": 4 + 4, "CMYK": 4 + 4, "YCbCr": 4 + 4}
_SIXTEEN_BITS = 32  # the scaling of 16-bit gray to 8 bits counts in 64
# Bytes a pixel that decoders hold beside it: progressive JPEGs' coefficients, frames of WebP and JPEG 2000.
_DECODER = {"JPEG": 6, "MPO": 6, "WEBP": 8, "JPEG2000": 16, "TIFF": 4}
_TURNED = 4  # EXIF orientations copy the image

# Torchvision pastes masks into the tile as float32, one by one, and stacks them: two of each, and one bit mask.
_MASK = 4 + 4 + 1
# A record with a mask of an object, as text and as Python's objects, at most.
_RECORD = 4096
# Pictures are drawn at most so long, and a few copies of one are held.
_PICTURE_SIDE = 4096
_PICTURE_COPIES = 5
_MARGIN = 1.1


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes at most.

    Args:
        host: of the process, with what it holds already; ``None`` where it cannot be measured.
        image: of ``host``, the largest image.
        device: of the accelerator, ``None`` without one.
    """

    host: int | None
    image: int
    device: int | None

    def __str__(self) -> str:
        parts = [f"the largest image {_gigabytes(self.image)}"]
        if self.host is not None:
            parts.insert(0, f"{_gigabytes(self.host)} at most, of which")
        if self.device is not None:
            parts.append(f"and {_gigabytes(self.device)} of the accelerator's")
        return f"memory: {' '.join(parts)}"


def memory_of_prediction(
    trained: TrainedDetector,
    paths: Sequence[Path],
    tiling: Tiling,
    *,
    device: torch.device,
    pictures: bool,
) -> Memory:
    """What `latentgnn.tasks.detection.prediction.predict_paths` will take at most.

    The model runs once, on a tile of noise: what that takes is measured. Images, masks of as many objects a tile as the
    detector may find, records and pictures are counted.

    Args:
        trained: a detector on ``device``.
        paths: image files, of which the headers are read.
        tiling: how images are divided.
        device: the model's.
        pictures: whether pictures are drawn.
    """
    images, tiles, tile = 0, 1, (1, 1)
    for path in paths:
        try:
            image = open_image(path, most_pixels=MOST_PIXELS_IN_TILES)
        except UserError:
            # It is told when its turn comes, and the others are done.
            continue
        with image:
            width, height = image.size
            each = _DECODED.get(image.mode, _SIXTEEN_BITS) + _DECODER.get(image.format or "", 0)
            each += _TURNED if _may_be_turned(image) else 0
        images = max(images, width * height * each)
        windows = tiling.windows(width, height)
        tiles = max(tiles, len(windows))
        tile = max(tile, (windows[0].height, windows[0].width), key=lambda sides: sides[0] * sides[1])
    model, config = trained.model, trained.config
    objects = config.model.detections_per_image
    masks = objects * tile[0] * tile[1] * _MASK if config.model.detector == "mask_rcnn" else 0
    records = objects * tiles * _RECORD
    drawn = _PICTURE_COPIES * 4 * _PICTURE_SIDE**2 if pictures else 0
    noise = torch.rand(3, *tile, generator=torch.Generator().manual_seed(0))
    on_cuda = device.type == "cuda"
    if on_cuda:
        torch.cuda.reset_peak_memory_stats(device)
    with torch.inference_mode():
        model([noise.to(device)])
    peak = _peak()
    host = images + records + max(drawn, 0 if on_cuda else masks)
    return Memory(
        host=None if peak is None else round(_MARGIN * (peak + host)),
        image=images,
        device=round(_MARGIN * (torch.cuda.max_memory_allocated(device) + masks)) if on_cuda else None,
    )


def _may_be_turned(image: Image.Image) -> bool:
    # To look for an orientation behind the pixels, Pillow would decode all of a PNG.
    if image.format == "PNG":
        return "exif" in image.info
    return image.getexif().get(ORIENTATION_TAG, 1) != 1


def _peak() -> int | None:
    """The most memory that this process has held so far, in bytes."""
    if sys.platform == "win32":
        return None
    import resource

    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024


def _gigabytes(number: int) -> str:
    return f"{number / 1e9:.1f} GB"
