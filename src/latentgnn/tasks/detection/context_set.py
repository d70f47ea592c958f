"""The embedded set: an object's category cannot be told from its surroundings, only from a key at the other end.

An image is twice as wide as high. At one end is the key, a tall banner in a white frame that is blue or orange. At the
other end, more than the image's height away, are discs, squares, triangles and diamonds of other colours. All of them
are ``cool`` if the key is blue, and ``warm`` if it is orange.

Every scene appears twice, once with a key of each colour. The two images are equal in every pixel outside the key, and
every object that is ``cool`` in one of them is ``warm`` in the other. So whatever a detector sees of an object and its
surroundings, excluding the key, occurs with each category in exactly half of the cases.
"""

import json
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from latentgnn.errors import UserError
from latentgnn.files.reading import UnreadableError, read_json
from latentgnn.files.writing import temporary_name, write_json, write_text

CATEGORIES = ("cool", "warm")
KEY_COLOURS = {"blue": (62, 132, 222), "orange": (232, 138, 44)}
COLOURS = {"green": (104, 176, 100), "rose": (206, 96, 140), "violet": (148, 112, 204), "grey": (182, 184, 186)}
SHAPES = ("disc", "square", "triangle", "diamond")
MANIFEST = "context_set.json"

_SMALLEST = 64
_SAMPLES = 4  # samples per pixel along each axis: a shape's coverage of a pixel is counted in sixteenths
_WHITE = np.array((238, 238, 232))

_Pixels = NDArray[np.int64]
_Mask = NDArray[np.bool_]


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """The parameters that a folder's set was generated from.

    Args:
        train: number of training images.
        val: number of validation images.
        size: height of an image.
        seed: seed of everything that is drawn.
        version: version of the drawing code.
    """

    train: int
    val: int
    size: int
    seed: int
    version: int = 1


def write_context_set(root: Path | str, *, train: int, val: int, size: int, seed: int = 0) -> None:
    """Write the set as a COCO-format folder, unless it exists already.

    Pixels and annotations depend only on the arguments, as drawing is integer arithmetic. A larger set begins with the
    images of a smaller one. The folder appears complete or not at all.

    Every image record names its ``key`` (``colour`` and ``bbox``) and its ``scene``, every annotation has
    ``attributes`` (``shape``, ``colour``), and masks are uncompressed run-length encodings.

    Args:
        root: the folder to create.
        train: number of training images; an even number, two per scene.
        val: number of validation images; an even number, two per scene.
        size: height of an image in pixels; it is twice as wide.
        seed: seed of everything that is drawn.

    Raises:
        UserError: if a number or the size is out of range, or the folder contains something else.
    """
    for name, count in (("embedded_train", train), ("embedded_val", val)):
        if count < 2 or count % 2:
            raise UserError(f"data.{name}: expected an even number of images, two for each scene; got {count}")
    if size < _SMALLEST:
        raise UserError(f"data.embedded_size: expected at least {_SMALLEST} pixels, got {size}")
    root = Path(root)
    manifest = Manifest(train=train, val=val, size=size, seed=seed)
    if _holds(root, manifest):
        return
    temporary = temporary_name(root)
    try:
        for split, (name, count) in enumerate((("train", train), ("val", val))):
            _write_split(temporary, name, [_Scene(size, (seed, split, scene)) for scene in range(count // 2)])
        write_json(temporary / MANIFEST, asdict(manifest))
        try:
            temporary.replace(root)
        except OSError:
            # Another process of the same run may have created it in the meantime.
            if not _holds(root, manifest):
                raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _holds(root: Path, manifest: Manifest) -> bool:
    """Whether the folder contains the set; false if there is no folder or it is empty."""
    if not root.exists() or (root.is_dir() and not any(root.iterdir())):
        return False
    try:
        present = read_json(root / MANIFEST)
    except UnreadableError as error:
        raise UserError(
            f"{root} is to hold the embedded set, but holds something else ({error}); take another folder"
        ) from error
    if present != asdict(manifest):
        raise UserError(
            f"{root} holds an embedded set made from {present}, not {asdict(manifest)}; take another folder"
        )
    return True


def _write_split(root: Path, split: str, scenes: "list[_Scene]") -> None:
    (root / split).mkdir(parents=True)
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for number, scene in enumerate(scenes):
        height, width = scene.pixels.shape[:2]
        for category_id, key_colour in enumerate(KEY_COLOURS, 1):
            image_id = len(images) + 1
            file_name = f"{image_id:06d}.png"
            picture = Image.fromarray(scene.picture(key_colour).astype(np.uint8))
            picture.save(root / split / file_name, compress_level=1)
            images.append(
                {
                    "id": image_id,
                    "file_name": file_name,
                    "width": width,
                    "height": height,
                    "scene": number,
                    "key": {"colour": key_colour, "bbox": scene.key},
                }
            )
            for item, mask in zip(scene.items, scene.masks, strict=True):
                annotations.append(
                    {
                        "id": len(annotations) + 1,
                        "image_id": image_id,
                        "category_id": category_id,
                        "bbox": _bounds(mask),
                        "area": int(mask.sum()),
                        "iscrowd": 0,
                        "segmentation": _run_lengths(mask),
                        "attributes": {"shape": item.shape, "colour": item.colour},
                    }
                )
    dataset = {
        "info": {"description": f"latentgnn's embedded set, {split}"},
        "images": images,
        "annotations": annotations,
        "categories": [{"id": id, "name": name} for id, name in enumerate(CATEGORIES, 1)],
    }
    write_text(root / "annotations" / f"instances_{split}.json", json.dumps(dataset))


@dataclass(frozen=True)
class _Item:
    """A shape at a position: its centre is a corner of pixels, and it extends by its radius to all sides."""

    shape: str
    colour: str
    x: int
    y: int
    radius: int

    def is_clear_of(self, other: "_Item", margin: int) -> bool:
        reach = self.radius + other.radius + margin
        return abs(self.x - other.x) >= reach or abs(self.y - other.y) >= reach


class _Scene:
    """Everything in an image except the colour of its key, and pixels with everything except the key."""

    def __init__(self, size: int, entropy: tuple[int, ...]) -> None:
        self._rng = np.random.Generator(np.random.PCG64(entropy))
        height, width = size, 2 * size
        mirrored = self._below(2) == 1

        def item(shape: str, colour: str, x: int, y: int, radius: int) -> _Item:
            return _Item(shape, colour, width - x if mirrored else x, y, radius)

        # Coordinates as if the key were at the left.
        key_width, key_left = size // 4, self._between(size // 64, size // 32)
        top, bottom = (self._between(size // 32, size // 10) for _ in range(2))
        self.key = [width - key_left - key_width if mirrored else key_left, top, key_width, height - top - bottom]
        nearest = key_left + key_width + size + size // 32
        self.items: list[_Item] = []
        for _ in range(self._between(3, 5)):
            # A limited number of tries: an object that hardly fits is left out.
            for _ in range(50):
                radius = self._between(size // 16, size // 9)
                candidate = item(
                    SHAPES[self._below(len(SHAPES))],
                    tuple(COLOURS)[self._below(len(COLOURS))],
                    self._between(nearest + radius, width - radius - 1),
                    self._between(radius + 1, height - radius - 1),
                    radius,
                )
                if all(candidate.is_clear_of(other, 2) for other in self.items):
                    self.items.append(candidate)
                    break

        self._frame = max(2, size // 64)
        self.pixels = self._background(height, width)
        self.masks: list[_Mask] = []
        for placed in self.items:
            fill = self._shade(COLOURS[placed.colour], 16)
            coverage = _draw(self.pixels, placed, placed.radius, (fill * 5 + 255) // 6)
            _draw(self.pixels, placed, placed.radius - self._frame, fill)
            mask = np.zeros((height, width), np.bool_)
            mask[_window(placed)] = 2 * coverage >= _SAMPLES**2
            self.masks.append(mask)
        self._key_fills = {name: self._shade(rgb, 10) for name, rgb in KEY_COLOURS.items()}
        self._noise = self._rng.integers(-2, 3, (height, width, 1))

    def picture(self, key_colour: str) -> _Pixels:
        """Return the scene with its key as RGB, (H, W, 3), in 0..255."""
        pixels = self.pixels.copy()
        left, top, width, height = self.key
        frame = self._frame
        pixels[top : top + height, left : left + width] = _WHITE
        pixels[top + frame : top + height - frame, left + frame : left + width - frame] = self._key_fills[key_colour]
        return np.clip(pixels + self._noise, 0, 255)

    def _background(self, height: int, width: int) -> _Pixels:
        """A dim wall that gets brighter towards one side, with faint shapes on it."""
        base = self._shade((58, 62, 72), 14)
        slope = self._between(-16, 16)
        ramp = slope * np.arange(width) // width + self._between(-10, 10) * np.arange(height)[:, None] // height
        pixels = base + ramp[:, :, None]
        for _ in range(14):
            radius = self._between(height // 16, height // 5)
            x, y = self._between(radius, width - radius), self._between(radius, height - radius)
            faint = _Item(SHAPES[self._below(len(SHAPES))], "", x, y, radius)
            _draw(pixels, faint, radius, base + self._between(-9, 14))
        return pixels

    def _below(self, end: int) -> int:
        return int(self._rng.integers(end))

    def _between(self, low: int, high: int) -> int:
        return int(self._rng.integers(low, high + 1))

    def _shade(self, colour: tuple[int, int, int], spread: int) -> _Pixels:
        return np.array(colour) + self._rng.integers(-spread, spread + 1, 3)


def _window(item: _Item) -> tuple[slice, slice]:
    return slice(item.y - item.radius, item.y + item.radius), slice(item.x - item.radius, item.x + item.radius)


def _draw(pixels: _Pixels, item: _Item, radius: int, colour: _Pixels) -> _Pixels:
    """Blend an item, at this radius, into the pixels; return how many samples of each pixel it covers."""
    # In units of half the distance between samples, from the centre.
    reach = 2 * _SAMPLES * radius
    u = np.arange(1 - 2 * _SAMPLES * item.radius, 2 * _SAMPLES * item.radius, 2)[None, :]
    v = u.T
    if item.shape == "disc":
        inside = u * u + v * v <= reach * reach
    elif item.shape == "square":
        inside = (abs(u) <= reach) & (abs(v) <= reach)
    elif item.shape == "triangle":
        inside = (2 * abs(u) <= v + reach) & (v <= reach)
    else:
        inside = abs(u) + abs(v) <= reach
    side = 2 * item.radius
    coverage = inside.reshape(side, _SAMPLES, side, _SAMPLES).sum((1, 3))
    window = pixels[_window(item)]
    whole = _SAMPLES**2
    window += (coverage[:, :, None] * (colour - window) + whole // 2) // whole
    return coverage


def _bounds(mask: _Mask) -> list[int]:
    """The smallest box around a mask, xywh."""
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    top, left = int(rows[0]), int(columns[0])
    return [left, top, int(columns[-1]) + 1 - left, int(rows[-1]) + 1 - top]


def _run_lengths(mask: _Mask) -> dict[str, list[int]]:
    """COCO's uncompressed encoding: lengths of runs down the columns, alternately outside and inside."""
    flat = mask.ravel(order="F")
    ends = np.flatnonzero(np.diff(flat)) + 1
    counts = np.diff(np.concatenate(([0], ends, [flat.size])))
    return {"size": list(mask.shape), "counts": ([0] if flat[0] else []) + counts.tolist()}
