"""Pictures of detections: masks, boxes, names and scores drawn over an image."""

import colorsys
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from faster_coco_eval.core import mask as coco_mask
from PIL import Image, ImageChops, ImageDraw, ImageFilter, ImageFont

from latentgnn.tasks.detection.segmentations import to_rle
from latentgnn.tasks.detection.windows import Window, cut_mask

Colour = tuple[int, int, int]
Names = Sequence[tuple[int, str]]

_GOLDEN = (math.sqrt(5) - 1) / 2
INK: Colour = (24, 26, 30)
PAPER: Colour = (250, 250, 248)
_MASK_OPACITY = 0.38
# With more objects than this, a label must not be much wider than its object, as labels would hide other objects.
_FEW = 20


def colour_of(index: int) -> Colour:
    """Return a bright colour for an index from 0; fixed, and different from those of neighbouring indices."""
    # Steps of the golden ratio never come close to a recent hue; saturation and value separate hues that do recur.
    hue = (0.56 + index * _GOLDEN) % 1
    saturation, value = ((0.80, 0.98), (0.60, 1.0), (0.90, 0.82))[index % 3]
    red, green, blue = colorsys.hsv_to_rgb(hue, saturation, value)
    return round(red * 255), round(green * 255), round(blue * 255)


def draw_detections(
    image: Image.Image,
    detections: Sequence[Mapping[str, Any]],
    names: Names,
    *,
    score_threshold: float = 0.0,
    min_side: int = 800,
    max_side: int = 4096,
) -> Image.Image:
    """Draw objects over an image: annotations or detections, in COCO form.

    Colours distinguish categories, or objects if there is only one category. Where objects are crowded, labels that
    would hide each other or small objects are shortened to the score or omitted, lowest scores first.

    Args:
        image: RGB; it is not modified.
        detections: records with ``bbox`` (x, y, width, height), ``category_id`` and optionally ``score`` and
            ``segmentation``.
        names: id and name of every category; they also determine the colours.
        score_threshold: detections that score less are omitted.
        min_side: an image whose longer side is below it is enlarged by a whole factor, so that labels are legible.
        max_side: an image whose longer side is above it is scaled down to it.

    Returns:
        The picture: of the image's size, a whole multiple of it, or smaller.

    Raises:
        ValueError: if a record's category is not in ``names``.
    """
    index_of = {category_id: index for index, (category_id, _) in enumerate(names)}
    drawn = [d for d in detections if d.get("score", 1.0) >= score_threshold]
    if unknown := {d["category_id"] for d in drawn} - set(index_of):
        raise ValueError(f"categories {sorted(unknown)} are not among the names, which are of {sorted(index_of)}")
    # Sorted by score, so that an object's colour does not depend on the records' order; stable if there are no scores.
    drawn.sort(key=lambda d: -d.get("score", 1.0))
    one_category = len(names) == 1
    objects = [
        _Object(
            box=tuple(d["bbox"]),
            colour=colour_of(rank if one_category else index_of[d["category_id"]]),
            labels=_labels(names[index_of[d["category_id"]]][1], d),
            segmentation=d.get("segmentation") or None,
        )
        for rank, d in enumerate(drawn)
    ]

    longer = max(image.size)
    factor = max_side / longer if longer > max_side else max(1, math.ceil(min_side / longer))
    size = max(1, round(image.width * factor)), max(1, round(image.height * factor))
    # Scaled down first, so that the later copies are smaller.
    picture = image.resize(size, Image.Resampling.BICUBIC).convert("RGB")
    width = max(1, round(max(picture.size) / 600))
    # Large ones first, so that objects on top of them stay visible.
    for item in sorted(objects, key=lambda item: -item.box[2] * item.box[3]):
        if item.segmentation is not None:
            _draw_mask(picture, item, image.size, factor, width)
    draw = ImageDraw.Draw(picture)
    for item in sorted(objects, key=lambda item: -item.box[2] * item.box[3]):
        _draw_box(draw, item, factor, width)
    _draw_labels(draw, objects, factor, picture.size)
    return picture


def side_by_side(
    image: Image.Image,
    truth: Sequence[Mapping[str, Any]],
    predictions: Sequence[Mapping[str, Any]],
    names: Names,
    *,
    score_threshold: float = 0.5,
) -> Image.Image:
    """Draw ground truth and predictions side by side, under captions with the number of objects.

    Args:
        image: RGB.
        truth: COCO annotations of the image.
        predictions: COCO-results records of the image.
        names: id and name of every category.
        score_threshold: predictions that score less are omitted.
    """
    shown = [d for d in predictions if d["score"] >= score_threshold]
    panels = [draw_detections(image, truth, names), draw_detections(image, shown, names)]
    captions = [f"ground truth ({len(truth)})", f"predictions ({len(shown)})"]
    width, height = panels[0].size
    size = _text_size(panels[0].size)
    margin, strip = size, round(2.4 * size)
    sheet = Image.new("RGB", (2 * width + 3 * margin, height + strip + margin), PAPER)
    draw = ImageDraw.Draw(sheet)
    for column, (panel, caption) in enumerate(zip(panels, captions, strict=True)):
        left = margin + column * (width + margin)
        sheet.paste(panel, (left, strip))
        draw.text((left, strip / 2), caption, fill=INK, font=ImageFont.load_default(1.15 * size), anchor="lm")
    return sheet


@dataclass(frozen=True)
class _Object:
    box: tuple[float, ...]
    colour: Colour
    labels: tuple[str, ...]
    segmentation: Any


def _labels(name: str, detection: Mapping[str, Any]) -> tuple[str, ...]:
    """Candidates for an object's label, most complete first."""
    if "score" in detection:
        return f"{name} {detection['score']:.2f}", f"{detection['score']:.2f}"
    return (f"{name} (crowd)" if detection.get("iscrowd") else name,)


def _draw_mask(picture: Image.Image, item: _Object, size: tuple[int, int], factor: float, width: int) -> None:
    rle = to_rle(item.segmentation, size[1], size[0])
    x, y, w, h = (int(value) for value in coco_mask.toBbox(rle))
    if not w or not h:
        return
    # Work only on the surroundings of the mask; two pixels of margin leave room for its smoothed edge.
    margin = math.ceil(2 / min(factor, 1))
    left, top, right, bottom = (
        max(x - margin, 0),
        max(y - margin, 0),
        min(x + w + margin, size[0]),
        min(y + h + margin, size[1]),
    )
    # The picture's pixels within them, and their position in the image: whole numbers if it is enlarged.
    place = (
        math.ceil(left * factor),
        math.ceil(top * factor),
        min(math.floor(right * factor), picture.width),
        min(math.floor(bottom * factor), picture.height),
    )
    if place[0] >= place[2] or place[1] >= place[3]:
        return
    source = (place[0] / factor - left, place[1] / factor - top, place[2] / factor - left, place[3] / factor - top)
    part = Image.fromarray(cut_mask(rle, Window(left, top, right, bottom)) * 255)
    how = Image.Resampling.NEAREST if factor >= 1 else Image.Resampling.BOX
    mask = part.resize((place[2] - place[0], place[3] - place[1]), how, box=source)
    if factor < 1:
        # A pixel is set if an eighth of it is covered; otherwise thin objects would disappear.
        mask = mask.point([0] * 32 + [255] * 224)
    if factor > 1:
        # Rounds the corners of the enlarged pixels; a wider blur would lose objects of one pixel.
        mask = mask.filter(ImageFilter.GaussianBlur(0.45 * factor)).point([0] * 128 + [255] * 128)
    inner = mask.filter(ImageFilter.MinFilter(2 * width + 1))
    opacity = inner.point([0] * 255 + [round(255 * _MASK_OPACITY)])
    opacity = ImageChops.lighter(opacity, ImageChops.subtract(mask, inner))
    picture.paste(item.colour, place, opacity)


def _draw_box(draw: ImageDraw.ImageDraw, item: _Object, factor: float, width: int) -> None:
    x, y, w, h = (value * factor for value in item.box)
    left, top = max(round(x), 0), max(round(y), 0)
    right = max(min(round(x + w), draw.im.size[0]) - 1, left)
    bottom = max(min(round(y + h), draw.im.size[1]) - 1, top)
    draw.rectangle((left, top, right, bottom), outline=item.colour, width=width)


def _draw_labels(draw: ImageDraw.ImageDraw, objects: Sequence[_Object], factor: float, size: tuple[int, int]) -> None:
    text_size = _text_size(size)
    font = ImageFont.load_default(text_size)
    pad = max(2, round(text_size / 5))
    height = round(1.2 * text_size) + pad
    boxes = [tuple(value * factor for value in item.box) for item in objects]
    # A label may hide neither another label nor an object as small as itself.
    taken = [(round(x), round(y), round(x + w), round(y + h)) for x, y, w, h in boxes if max(w, h) < 3 * height]
    for item, (x, y, w, h) in zip(objects, boxes, strict=True):
        for label in item.labels:
            width = math.ceil(font.getlength(label)) + 2 * pad
            if len(objects) > _FEW and width > 1.2 * w:
                continue
            # Above the box, otherwise inside its upper edge, otherwise below it.
            left = max(min(round(x), size[0] - width), 0)
            tops = [top for top in (round(y) - height, round(y), round(y + h)) if 0 <= top <= size[1] - height]
            places = [(left, top, left + width, top + height) for top in tops]
            place = next((p for p in places if not any(_overlap(p, other) for other in taken)), None)
            if place is not None:
                taken.append(place)
                draw.rounded_rectangle((place[0], place[1], place[2] - 1, place[3] - 1), pad, fill=item.colour)
                draw.text((left + pad, place[1] + height / 2), label, fill=_ink_on(item.colour), font=font, anchor="lm")
                break


def _overlap(a: tuple[int, int, int, int], b: tuple[int, int, int, int]) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def _ink_on(colour: Colour) -> Colour:
    """Dark or light text colour, whichever has more contrast."""
    luminance = 0.299 * colour[0] + 0.587 * colour[1] + 0.114 * colour[2]
    return INK if luminance > 120 else (255, 255, 255)


def _text_size(size: tuple[int, int]) -> int:
    return max(14, round(max(size) / 65))
