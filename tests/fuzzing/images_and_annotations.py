"""Annotations, files of results, and images."""

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from hypothesis import strategies as st
from PIL import Image

from latentgnn.errors import UserError
from latentgnn.tasks.detection.coco import CocoAnnotations, CocoTrainingSet
from latentgnn.tasks.detection.config import AugmentConfig
from latentgnn.tasks.detection.sound_sets import load_split
from latentgnn.tasks.images import read_image
from tests.fuzzing.child import command, outcome
from tests.fuzzing.strategies import damaged, json_files

_PIXELS = np.random.default_rng(0).integers(0, 255, (16, 20, 3), np.uint8)


def _image(kind: str, mode: str = "RGB", **options: Any) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(_PIXELS).convert(mode).save(buffer, kind, **options)
    return buffer.getvalue()


def _annotation(id: int, image_id: int, segmentation: Any, **more: Any) -> dict[str, Any]:
    record = {"id": id, "image_id": image_id, "category_id": 4, "bbox": [2, 2, 6, 6], "area": 36.0, "iscrowd": 0}
    return record | {"segmentation": segmentation} | more


SQUARE = [[2.0, 2.0, 8.0, 2.0, 8.0, 8.0, 2.0, 8.0]]
SET = {
    "info": {"year": 2020},
    "images": [
        {"id": 10, "file_name": "a.png", "width": 20, "height": 16},
        {"id": 20, "file_name": "a.png", "width": 20, "height": 16},
    ],
    "annotations": [
        _annotation(1, 10, SQUARE),
        _annotation(2, 10, {"size": [16, 20], "counts": [34, 6, 10, 6, 264]}),
        _annotation(3, 20, {"size": [16, 20], "counts": "Y1`0O3d7"}, iscrowd=1),
        _annotation(4, 20, SQUARE, category_id=9),
    ],
    "categories": [{"id": 4, "name": "cat"}, {"id": 9, "name": "dog"}],
}
RESULTS = [
    {"image_id": 10, "category_id": 4, "bbox": [2.0, 2.0, 6.0, 6.0], "score": 0.9, "segmentation": SQUARE},
    {
        "image_id": 20,
        "category_id": 9,
        "score": 0.5,
        "segmentation": {"size": [16, 20], "counts": [34, 6, 10, 6, 264]},
    },
]
IMAGES = [
    *(_image("PNG", mode) for mode in ("RGB", "RGBA", "P", "L", "1")),
    *(_image("JPEG", mode) for mode in ("RGB", "L", "CMYK")),
    *(_image("TIFF", compression=compression) for compression in (None, "tiff_lzw", "tiff_deflate")),
    *(_image(kind) for kind in ("BMP", "GIF", "WEBP", "PPM")),
    b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n",
]


def _write_set(folder: Path, annotations: bytes) -> None:
    (folder / "annotations").mkdir()
    for split in ("train", "val"):
        (folder / "annotations" / f"instances_{split}.json").write_bytes(annotations)
        (folder / split).mkdir()
        (folder / split / "a.png").write_bytes(IMAGES[0])


def _loads(folder: Path, on_fault: Any) -> bool:
    """Whether a set loads; what loads can be trained on."""
    try:
        annotations = load_split(folder / "annotations" / "instances_train.json", folder / "train", on_fault)
    except UserError:
        return False
    can_be_trained_on(annotations)
    return True


def can_be_trained_on(annotations: CocoAnnotations) -> None:
    """What loads gives sound samples."""
    samples = CocoTrainingSet(annotations, augment=AugmentConfig(quarter_turns=True), seed=0)
    for index in range(len(samples)):
        image, target = samples[(0, index)]
        height, width = image.shape[1:]
        boxes = target["boxes"]
        assert torch.isfinite(image).all()
        assert torch.isfinite(boxes).all()
        assert (boxes[:, 2:] > boxes[:, :2]).all()
        assert (boxes >= 0).all()
        assert (boxes <= torch.tensor([width, height] * 2)).all()
        assert ((target["labels"] >= 1) & (target["labels"] <= len(annotations.categories))).all()
        if "masks" in target:
            assert target["masks"].flatten(1).any(dim=1).all()


def annotations(content: bytes, folder: Path) -> None:
    """What the check lets pass can be trained on, and what it does not let pass cannot."""
    _write_set(folder, content)
    code, _ = command("check-data", "--data.root", str(folder))
    assert _loads(folder, "stop") == (code == 0)
    _loads(folder, "skip")


def results(content: bytes, folder: Path) -> None:
    """What can be scored has figures from 0 to 1, or -1 where they are undefined."""
    _write_set(folder, json.dumps(SET).encode())
    (folder / "results.json").write_bytes(content)
    code, _ = command(
        "evaluate", "--results", "results.json", "--data.root", str(folder), "--out", str(folder / "scores")
    )
    assert (folder / "scores" / "metrics.json").exists() == (code == 0)
    if code == 0:
        figures = json.loads((folder / "scores" / "metrics.json").read_text())["metrics"]
        assert all(figure == -1 or 0 <= figure <= 1 for figure in figures.values())


def images(content: bytes, folder: Path) -> None:
    """What is read is RGB, and of a size that the rules allow."""
    path = folder / "image.png"
    path.write_bytes(content)
    image = outcome(read_image, path)
    if image is None:
        return
    assert image.mode == "RGB"
    assert image.width * image.height <= 2**27
    assert max(image.size) <= 50 * min(image.size)


def _files(sound: Any) -> st.SearchStrategy[bytes]:
    return json_files(sound)


PROPERTIES = (
    (annotations, _files(SET), 1.0),
    (results, _files(RESULTS), 1.0),
    (images, damaged(IMAGES), 3.0),
)
