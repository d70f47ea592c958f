"""Label pictures, folders of them, and the lists and tables that sets of labelled images come with."""

import io
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from hypothesis import strategies as st
from PIL import Image

from latentgnn.errors import UserError
from latentgnn.tasks.segmentation.check import load_set
from latentgnn.tasks.segmentation.config import AugmentConfig, DataConfig
from latentgnn.tasks.segmentation.datasets import TrainingImages
from latentgnn.tasks.segmentation.labels import read_ids
from latentgnn.tasks.segmentation.layouts import resolve
from tests.fuzzing.child import command, outcome
from tests.fuzzing.strategies import damaged

_IDS = np.random.default_rng(0).integers(0, 3, (16, 20), np.uint8)
_COLORS = {0: (0, 0, 0), 1: (128, 0, 0), 2: (0, 128, 0)}
CONFIG = DataConfig(
    classes={0: "sky", 1: "road"},
    ignored=(2, 255),
    colors=_COLORS,
    augment=AugmentConfig(crop=(16, 24)),
)
SETTINGS = (
    *("--config", "camvid_small", "--data.classes", "{0: sky, 1: road}", "--data.ignored", "[2, 255]"),
    *("--data.colors", "{0: [0, 0, 0], 1: [128, 0, 0], 2: [0, 128, 0]}", "--data.layout", "null"),
)


def _picture(kind: str, array: Any, mode: str | None = None, **options: Any) -> bytes:
    buffer = io.BytesIO()
    picture = Image.fromarray(array)
    (picture if mode is None else picture.convert(mode)).save(buffer, kind, **options)
    return buffer.getvalue()


def _palette() -> bytes:
    picture, buffer = Image.fromarray(_IDS), io.BytesIO()
    picture.putpalette([part for color in _COLORS.values() for part in color])
    picture.save(buffer, "PNG")
    return buffer.getvalue()


_COLOURED = np.array(list(_COLORS.values()), np.uint8)[_IDS]
LABELS = [
    _picture("PNG", _IDS),
    _picture("PNG", _IDS.astype(np.uint16)),
    _picture("PNG", _COLOURED),
    _picture("PNG", _COLOURED, "RGBA"),
    _picture("PNG", _IDS > 0),
    _picture("PNG", _IDS, "LA"),
    _palette(),
    _picture("TIFF", _IDS.astype(np.int32)),
    _picture("TIFF", _IDS.astype(np.float32)),
    _picture("TIFF", _IDS, compression="tiff_lzw"),
    _picture("BMP", _IDS),
    _picture("GIF", _IDS),
    _picture("WEBP", _COLOURED, lossless=True),
    _picture("JPEG", _IDS),
    _picture("JPEG", _COLOURED, "CMYK"),
]
IMAGE = _picture("PNG", np.random.default_rng(1).integers(0, 255, (16, 20, 3), np.uint8))


def _can_be_trained_on(folder: Path, on_fault: Any) -> bool:
    """Whether both splits load; what loads gives sound samples."""
    try:
        config = resolve(replace(CONFIG, root=str(folder), on_fault=on_fault))
        images = load_set(config, "train")
        load_set(config, "val")
    except UserError:
        return False
    samples = TrainingImages(images, seed=0)
    for index in range(len(samples)):
        sample = samples[(0, index)]
        assert sample.image.shape == (3, 16, 24)
        assert torch.isfinite(sample.image).all()
        assert sample.labels.shape == (16, 24)
        assert set(sample.labels.unique().tolist()) <= set(range(-1, len(images.class_names)))
    return True


def _checked(folder: Path) -> None:
    """What the check lets pass can be trained on, and what it does not let pass cannot."""
    code, _ = command("check-data", "--data.root", str(folder), *SETTINGS)
    assert _can_be_trained_on(folder, "stop") == (code == 0)
    _can_be_trained_on(folder, "skip")


def _write(folder: Path, files: dict[str, bytes]) -> None:
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)


def label_pictures(content: bytes, folder: Path) -> None:
    """What is read are ids of 16 bits, one a pixel."""
    sound = {f"{kind}/val/b.png": content for kind, content in (("images", IMAGE), ("labels", LABELS[0]))}
    _write(folder, {"images/train/a.png": IMAGE, "labels/train/a.png": content, **sound})
    ids = outcome(lambda path: read_ids(path, CONFIG), folder / "labels" / "train" / "a.png")
    if ids is not None:
        assert ids.dtype == np.int64
        assert ids.ndim == 2
        assert 0 <= ids.min() <= ids.max() <= 65_535
    _checked(folder)


_NAMES = ("a.png", "A.PNG", "a.jpg", "b.png", "b.c.png", ".png", "deep/a.png", "a", "a.txt", "\u00e9.png", "a b.tif")
_PLACES = ("images/train", "labels/train", "images/val", "labels/val", "annotations/training", "JPEGImages", ".")


@st.composite
def _folders(draw: st.DrawFn) -> dict[str, bytes | None]:
    """Files of sets and others, by their paths; ``None`` is a folder."""
    names = st.builds("{}/{}".format, st.sampled_from(_PLACES), st.sampled_from(_NAMES))
    content = st.sampled_from((IMAGE, LABELS[0], LABELS[2], b"", None))
    files: dict[str, bytes | None] = draw(st.dictionaries(names, content, max_size=6))
    sound = {f"{kind}/{split}/s{split}.png": LABELS[0] for kind in ("images", "labels") for split in ("train", "val")}
    left_out = draw(st.sampled_from((None, None, None, *sound)))
    return {**{name: content for name, content in sound.items() if name != left_out}, **files}


def folders(files: dict[str, bytes | None], folder: Path) -> None:
    """A folder is a set of a layout, or refused."""
    for name, content in files.items():
        path = folder / name
        if content is None:
            path.mkdir(parents=True, exist_ok=True)
        elif not path.is_dir():
            _write(folder, {name: content})
    _checked(folder)


def lists(content: bytes, folder: Path) -> None:
    """Pascal VOC's list of a split, whose names may be those of no file."""
    _write(folder, {"JPEGImages/a.jpg": IMAGE, "SegmentationClass/a.png": LABELS[0]})
    _write(folder, {f"ImageSets/Segmentation/{split}.txt": content for split in ("train", "val")})
    _checked(folder)


def tables(content: bytes, folder: Path) -> None:
    """ADE20K's table of names."""
    _write(folder, {f"{kind}/{split}/a.png": IMAGE for kind in ("images",) for split in ("training", "validation")})
    _write(folder, {f"annotations/{split}/a.png": LABELS[0] for split in ("training", "validation")})
    _write(folder, {"objectInfo150.txt": content})
    code, _ = command("check-data", "--data.root", str(folder), *SETTINGS[:2], "--data.classes", "null")
    assert code in (0, 1)


_TABLE = b"Idx\tRatio\tTrain\tVal\tName\n1\t0.1\t1\t1\twall\n2\t0.1\t1\t1\tbuilding, edifice\n"
PROPERTIES = (
    (label_pictures, damaged(LABELS), 0.5),
    (folders, _folders(), 0.25),
    (lists, damaged([b"a\n", b"a\nb\n", b"../a\n", b"a\x00b\n", b"a" * 300 + b"\n"]), 0.15),
    (tables, damaged([_TABLE]), 0.15),
)
