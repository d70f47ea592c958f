"""A picture of a set: some of its images with annotations, in rows."""

import math

from PIL import Image, ImageDraw, ImageFont

from latentgnn.tasks.detection.coco import CocoAnnotations, ImageRecord
from latentgnn.tasks.detection.pictures import INK, PAPER, draw_detections
from latentgnn.tasks.images import read_image

_TILE = 480  # length in pixels of an image's longer side
_MARGIN = 12
_STRIP = 26
_COLUMNS = 4


def sample_sheet(annotations: CocoAnnotations, number: int) -> Image.Image:
    """Draw images spread over a set, those with objects first, with their names above.

    Args:
        annotations: a set of at least one image.
        number: maximum number of images.
    """
    filled = [image for image in annotations.images if annotations.annotations_of(image.id)]
    images = filled or annotations.images
    number = min(number, len(images))
    chosen = [images[place * len(images) // number] for place in range(number)]
    tiles = [_tile(annotations, image) for image in chosen]
    columns = min(_COLUMNS, len(tiles))
    rows = [tiles[start : start + columns] for start in range(0, len(tiles), columns)]
    heights = [max(tile.height for tile in row) + _STRIP + _MARGIN for row in rows]
    width = columns * (_TILE + _MARGIN) + _MARGIN
    sheet = Image.new("RGB", (width, sum(heights) + _MARGIN), PAPER)
    draw = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(14)
    top = 0
    names = iter(image.file_name for image in chosen)
    for row, height in zip(rows, heights, strict=True):
        for column, tile in enumerate(row):
            left = _MARGIN + column * (_TILE + _MARGIN)
            sheet.paste(tile, (left, top + _STRIP))
            draw.text((left, top + _STRIP / 2 + 4), _shortened(next(names), font), fill=INK, font=font, anchor="lm")
        top += height
    return sheet


def _tile(annotations: CocoAnnotations, image: ImageRecord) -> Image.Image:
    pixels = read_image(image.path, size=(image.width, image.height))
    picture = draw_detections(pixels, annotations.annotations_of(image.id), annotations.categories, min_side=_TILE)
    picture.thumbnail((_TILE, _TILE), Image.Resampling.LANCZOS)
    return picture


def _shortened(name: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> str:
    """The end of a name, cut to the width of a tile."""
    name = name.encode("ascii", "replace").decode()
    length = max(1, math.floor(len(name) * _TILE / max(1.0, font.getlength(name))))
    return name if len(name) <= length else f"...{name[-max(1, length - 3) :]}"
