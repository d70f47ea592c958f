"""An estimate of the memory that prediction in tiles needs: partly computed, partly measured on a tile of noise."""

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

# Bytes per pixel that Pillow holds for an image of a mode, plus those of its RGB conversion.
_DECODED = {"RGB": 4, "L": 1 + 4, "P": 1 + 4, "1": 1 + 4, "RGBA": 4 + 4, "LA": 4 + 4, "CMYK": 4 + 4, "YCbCr": 4 + 4}
_SIXTEEN_BITS = 32  # 16-bit gray is scaled to 8 bits in 64-bit arithmetic
# Bytes per pixel that decoders hold in addition: coefficients of progressive JPEGs, frames of WebP and JPEG 2000.
_DECODER = {"JPEG": 6, "MPO": 6, "WEBP": 8, "JPEG2000": 16, "TIFF": 4}
_TURNED = 4  # EXIF orientations copy the image

# Torchvision pastes masks into the tile one by one as float32 and stacks them: two copies of each, and a boolean mask.
_MASK = 4 + 4 + 1
# Upper bound for a record with an object's mask, as text and as Python objects.
_RECORD = 4096
# Maximum side of a drawn picture; a few copies of one are held.
_PICTURE_SIDE = 4096
_PICTURE_COPIES = 5
_MARGIN = 1.1


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Upper bounds of memory in bytes.

    Args:
        host: memory of the process, including what it holds already; ``None`` if it cannot be measured.
        image: the part of ``host`` for the largest image.
        device: memory of the accelerator, ``None`` without one.
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
    """Estimate the maximum memory that `latentgnn.tasks.detection.prediction.predict_paths` will use.

    The model runs once, on a tile of noise, and its memory is measured. Memory for images, for the masks of as many
    objects per tile as the detector may find, for records and for pictures is computed.

    Args:
        trained: a detector on ``device``.
        paths: image files; only their headers are read.
        tiling: how images are divided.
        device: the model's device.
        pictures: whether pictures are drawn.
    """
    images, tiles, tile = 0, 1, (1, 1)
    for path in paths:
        try:
            image = open_image(path, most_pixels=MOST_PIXELS_IN_TILES)
        except UserError:
            # The error is reported when this image's turn comes.
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
    # To find an orientation stored after the pixels, Pillow would decode the whole PNG.
    if image.format == "PNG":
        return "exif" in image.info
    return image.getexif().get(ORIENTATION_TAG, 1) != 1


def _peak() -> int | None:
    """The peak memory of this process so far, in bytes."""
    if sys.platform == "win32":
        return None
    import resource

    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024


def _gigabytes(number: int) -> str:
    return f"{number / 1e9:.1f} GB"
