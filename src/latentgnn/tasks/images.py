"""Image files as networks see them: RGB, 8 bits, upright. Training and prediction both read images through here."""

import io
import threading
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from latentgnn.errors import UserError, system_error, told
from latentgnn.files.reading import regular_file
from latentgnn.tasks.tars import file_of, open_file

IMAGE_SUFFIXES = frozenset({".bmp", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"})
"""Suffixes in lower case by which images are found in a folder."""

# Only these: some of Pillow's readers run other programs, or trust what a file claims.
_FORMATS = ("BMP", "DIB", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "TIFF", "WEBP")
# Registers all readers once, because threads would do it concurrently.
Image.init()

MOST_PIXELS = 2**27
"""Maximum for an image that is processed whole: larger than photographs; 1.5 GiB as float32."""

MOST_PIXELS_IN_TILES = 2**30
"""Maximum for an image that is processed in tiles: 4 GiB as Pillow decodes it."""

ORIENTATION_TAG = 0x0112
_QUARTER_TURNED = (5, 6, 7, 8)

# A detector limits the longer side, and something must be left of the shorter one.
_MOST_OBLONG = 50


def read_image(path: Path | str, *, size: tuple[int, int] | None = None, most_pixels: int = MOST_PIXELS) -> Image.Image:
    """Read an image file of any mode as an upright RGB image.

    Gray, palette and CMYK images are converted, 16-bit gray is scaled to 8 bits, and transparency is dropped. The EXIF
    orientation is applied unless only the stored image has the annotated ``size``: some annotation tools ignore the
    orientation, and their boxes refer to the stored pixels.

    Args:
        path: the file.
        size: (width, height) according to the annotations, if there are any.
        most_pixels: maximum number of pixels; larger images are refused.

    Raises:
        UserError: if the file is missing, damaged, not a file or not an image, has too many pixels, is more than 50
            times as long as wide, has a mode that cannot be converted to RGB, or does not have ``size``.
    """
    try:
        with open_image(path, most_pixels=most_pixels) as image:
            image.load()
            oriented = upright(image, size)
            if size is not None and oriented.size != size:
                raise UserError(
                    f"{path}: the image is {oriented.width} x {oriented.height} pixels (width x height), but its "
                    f"annotations are for {size[0]} x {size[1]}; mend the record or the file"
                )
            return _to_rgb(oriented, path)
    except UserError:
        raise
    except Exception as error:
        raise _unreadable(path, error) from error


def open_image(path: Path | str, *, most_pixels: int = MOST_PIXELS) -> Image.Image:
    """Open an image file or a member of a tar file, reading only its header; the caller must close it.

    Raises:
        UserError: if it is not an image, or has a size that is not read.
    """
    # Pillow closes files that it has opened itself, and in-memory files need no closing.
    source = open_file(path) if file_of(Path(path)) != Path(path) else regular_file(path, "image")
    try:
        with _own_limit:
            image = Image.open(source, formats=_FORMATS)
    except UnidentifiedImageError:
        raise UserError(f"{path}: not an image, or one in a format other than {', '.join(_FORMATS)}") from None
    except Exception as error:
        raise _unreadable(path, error) from error
    if (fault := size_fault(*image.size, most_pixels=most_pixels)) is not None:
        image.close()
        raise UserError(f"{path}: {fault}")
    return image


def png_bytes(picture: Image.Image) -> bytes:
    """Return a picture as the content of a PNG file."""
    stream = io.BytesIO()
    picture.save(stream, format="PNG")
    return stream.getvalue()


def upright_size(path: Path | str) -> tuple[int, int]:
    """Return the (width, height) of an image file after its EXIF orientation is applied, from its header.

    Raises:
        UserError: see `open_image`.
    """
    with open_image(path) as image:
        return image.size[::-1] if is_quarter_turned(image) else image.size


def is_quarter_turned(image: Image.Image) -> bool:
    """Whether the EXIF orientation of an image swaps its sides.

    Raises:
        UserError: if the EXIF data are damaged.
    """
    try:
        return image.getexif().get(ORIENTATION_TAG) in _QUARTER_TURNED
    except Exception as error:  # decoders raise all kinds of errors
        raise UserError(f"the image's EXIF data cannot be read ({error})") from error


def size_fault(width: int, height: int, *, most_pixels: int = MOST_PIXELS) -> str | None:
    """Return what is wrong with the size of an image, or ``None``."""
    if width * height > most_pixels:
        advice = "cut it up"
        if most_pixels < width * height <= MOST_PIXELS_IN_TILES:
            advice = "predict takes it by tiles (--tiles 1024); for training, cut it up"
        return f"an image of {width:,} x {height:,} pixels; expected at most {most_pixels:,}: {advice}"
    if max(width, height) > _MOST_OBLONG * min(width, height):
        return f"{width} x {height} pixels are too oblong; expected sides of 1 : {_MOST_OBLONG} at most"
    return None


def _unreadable(path: Path | str, error: Exception) -> UserError:
    if (fault := system_error(error)) is not None:
        return UserError(told(fault, path))
    # For damaged files decoders raise all kinds of errors, including out of memory if a header claims too much.
    return UserError(f"{path}: the image cannot be read ({str(error) or type(error).__name__})")


class _OwnLimit:
    """Replaces Pillow's own limit for large images, which applies to the whole process, by `size_fault`.

    Several threads may be inside at once: the first one lifts Pillow's limit, and the last one restores it.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._inside = 0
        self._limit: int | None = None

    def __enter__(self) -> None:
        with self._lock:
            if not self._inside:
                self._limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
            self._inside += 1

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._inside -= 1
            if not self._inside:
                Image.MAX_IMAGE_PIXELS = self._limit


_own_limit = _OwnLimit()


def upright(image: Image.Image, size: tuple[int, int] | None = None) -> Image.Image:
    """Return the image with its EXIF orientation applied, or as stored if only that has this (width, height)."""
    # Pillow would copy even an image without orientation, 400 MB for 10,000 x 10,000 pixels.
    turned = image if image.getexif().get(ORIENTATION_TAG, 1) == 1 else ImageOps.exif_transpose(image)
    if size is not None and turned.size != size and image.size == size:
        return image
    return turned


def to_tensor(image: Image.Image) -> Tensor:
    """Return an RGB image as float32 (3, height, width) in 0..1."""
    pixels_HWC = torch.from_numpy(np.array(image))
    return pixels_HWC.permute(2, 0, 1).to(torch.float32).div(255).contiguous()


def _to_rgb(image: Image.Image, path: Path | str) -> Image.Image:
    if image.mode == "F":
        raise UserError(f"{path}: a 32-bit floating-point image has no defined white; save it with 8 or 16 bits")
    if image.mode.startswith("I"):
        values = np.asarray(image).astype(np.int64)
        if values.min() < 0 or values.max() > 65535:
            raise UserError(f"{path}: gray values {values.min()}..{values.max()} exceed 16 bits; save it with 8 or 16")
        # Pillow's own conversion clips at 255 instead of scaling.
        image = Image.fromarray(((values * 255 + 32767) // 65535).astype(np.uint8))
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")
    return image if image.mode == "RGB" else image.convert("RGB")
