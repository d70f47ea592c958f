import os
import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image
from PIL.PngImagePlugin import PngImageFile

from latentgnn.errors import UserError
from latentgnn.tasks.images import MOST_PIXELS_IN_TILES, open_image, read_image, to_tensor

ORIENTATION = 0x0112


def _photo(width=12, height=8):
    """A picture without any symmetry: a wrong turn or flip changes it."""
    pixels = np.zeros((height, width, 3), np.uint8)
    pixels[: height // 2, : width // 2] = (255, 0, 0)
    pixels[height // 2 :, : width // 2] = (0, 255, 0)
    pixels[: height // 2, width // 2 :] = (0, 0, 255)
    return pixels


@pytest.mark.parametrize("mode", ["1", "L", "LA", "RGB", "RGBA", "P", "CMYK"])
def test_every_mode_becomes_the_same_rgb(tmp_path, mode):
    gray = np.zeros((6, 4, 3), np.uint8)
    gray[:3] = 255
    path = tmp_path / ("image.tif" if mode == "CMYK" else "image.png")
    Image.fromarray(gray).convert(mode).save(path)
    image = read_image(path)
    assert image.mode == "RGB"
    assert np.array_equal(np.asarray(image), gray)


def test_alpha_is_dropped_and_colours_are_kept(tmp_path):
    pixels = np.full((3, 5, 4), (10, 200, 30, 0), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "clear.png")
    assert np.array_equal(np.asarray(read_image(tmp_path / "clear.png")), pixels[..., :3])


def test_palette_with_transparency(tmp_path):
    image = Image.fromarray(np.array([[0, 1], [1, 0]], np.uint8)).convert("P")
    image.putpalette([10, 20, 30, 200, 100, 50])
    image.save(tmp_path / "palette.png", transparency=bytes([0, 128]))
    assert read_image(tmp_path / "palette.png").getpixel((1, 0)) == (200, 100, 50)


def test_sixteen_bits_are_scaled_not_clipped(tmp_path):
    values = np.array([[0, 255, 256], [32768, 65279, 65535]], np.uint16)
    Image.fromarray(values).save(tmp_path / "deep.png")
    red = np.asarray(read_image(tmp_path / "deep.png"))[..., 0]
    assert np.array_equal(red, np.rint(values / 65535 * 255).astype(np.uint8))


def test_float_images_are_refused(tmp_path):
    Image.fromarray(np.ones((2, 2), np.float32)).save(tmp_path / "float.tif")
    with pytest.raises(UserError, match=r"float\.tif.*floating-point"):
        read_image(tmp_path / "float.tif")


# How a camera must have turned the upright picture for each EXIF orientation to put it right.
STORED = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.transpose(1, 0, 2),
    6: lambda a: np.rot90(a),
    7: lambda a: a.transpose(1, 0, 2)[::-1, ::-1],
    8: lambda a: np.rot90(a, -1),
}


@pytest.mark.parametrize("orientation", STORED)
def test_exif_orientation_is_applied(tmp_path, orientation):
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    path = tmp_path / "turned.png"
    Image.fromarray(np.ascontiguousarray(STORED[orientation](_photo()))).save(path, exif=exif)
    assert np.array_equal(np.asarray(read_image(path)), _photo())
    assert np.array_equal(np.asarray(read_image(path, size=(12, 8))), _photo())


def test_annotations_of_the_stored_pixels_keep_them(tmp_path):
    exif = Image.Exif()
    exif[ORIENTATION] = 6
    path = tmp_path / "stored.png"
    Image.fromarray(_photo()).save(path, exif=exif)
    assert read_image(path).size == (8, 12)
    assert np.array_equal(np.asarray(read_image(path, size=(12, 8))), _photo())
    with pytest.raises(UserError, match=r"stored\.png.*8 x 12.*for 30 x 20"):
        read_image(path, size=(30, 20))


def test_unreadable_files_are_named(tmp_path):
    with pytest.raises(UserError, match=r"absent\.png: there is no such image"):
        read_image(tmp_path / "absent.png")
    (tmp_path / "text.png").write_text("no image")
    with pytest.raises(UserError, match=r"text\.png: not an image"):
        read_image(tmp_path / "text.png")
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    for suffix in ("png", "jpg"):
        path = tmp_path / f"cut.{suffix}"
        Image.fromarray(noise).save(path)
        path.write_bytes(path.read_bytes()[:1500])
        with pytest.raises(UserError, match=rf"cut\.{suffix}: the image cannot be read"):
            read_image(path)


def test_tensor_is_channels_first_in_zero_to_one():
    tensor = to_tensor(Image.fromarray(_photo()))
    assert tensor.shape == (3, 8, 12)
    assert tensor.dtype == torch.float32
    assert tensor.is_contiguous()
    assert tensor[:, 0, 0].tolist() == [1, 0, 0]
    assert tensor[:, 7, 0].tolist() == [0, 1, 0]
    assert tensor[:, 0, 11].tolist() == [0, 0, 1]


def _png_of(width, height):
    """A PNG file that claims a size and holds no pixel."""
    chunks = (b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0), b"IDAT" + zlib.compress(b""))
    parts = [struct.pack(">I", len(chunk) - 4) + chunk + struct.pack(">I", zlib.crc32(chunk)) for chunk in chunks]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("bomb.png", _png_of(50_000, 50_000), "50,000 x 50,000 pixels; expected at most 134,217,728: cut"),
        (
            "wide.png",
            _png_of(20_000, 10_000),
            "20,000 x 10,000 pixels; .*: predict takes it by tiles .--tiles",
        ),
        ("line.png", _png_of(20_000, 1), "20000 x 1 pixels are too oblong"),
        # Pillow would run Ghostscript on it.
        ("eps.png", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n", "not an image"),
    ],
    ids=["bomb", "wide", "line", "eps"],
)
def test_what_images_claim(tmp_path, name, content, message):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(UserError, match=rf"{name}: .*{message}"):
        read_image(path)


def test_what_is_no_file_is_not_opened(tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    for path in (tmp_path / "pipe.png", "/dev/zero"):
        with pytest.raises(UserError, match=r"expected a file; this is a (pipe|device)"):
            read_image(path)


def test_large_images_are_opened_without_pillows_warning_and_its_limit_stays(tmp_path):
    """Pillow warns from 89 million pixels on, and refuses from 179 million on."""
    limit = Image.MAX_IMAGE_PIXELS
    (tmp_path / "large.png").write_bytes(_png_of(10_000, 10_000))
    (tmp_path / "larger.png").write_bytes(_png_of(32_768, 32_768))
    with open_image(tmp_path / "large.png") as image:
        assert image.size == (10_000, 10_000)
    with open_image(tmp_path / "larger.png", most_pixels=MOST_PIXELS_IN_TILES) as image:
        assert image.size == (32_768, 32_768)
    assert limit == Image.MAX_IMAGE_PIXELS


def test_an_image_that_needs_no_change_is_read_without_copies(tmp_path):
    """Of 10,000 x 10,000 pixels, each copy takes 400 MB; the decoded pixels themselves come back."""
    Image.new("RGB", (8, 6), (1, 2, 3)).save(tmp_path / "a.png")
    image = read_image(tmp_path / "a.png")
    assert isinstance(image, PngImageFile)
    assert image.getpixel((7, 5)) == (1, 2, 3)
