"""Pascal VOC's, YOLO's and LabelMe's files of annotations, and VOC's pictures of masks."""

import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hypothesis import strategies as st

from latentgnn.errors import UserError
from latentgnn.tasks.detection.config import DataConfig
from latentgnn.tasks.detection.sets import DetectionSet
from latentgnn.tasks.detection.sound_sets import load
from tests.fuzzing.child import Case, command
from tests.fuzzing.images_and_annotations import can_be_trained_on
from tests.fuzzing.strategies import damaged, json_files
from tests.tasks.detection.tiny_sets import WRITERS


def _file_of(format: str, name: str) -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        WRITERS[format](Path(folder))
        return (Path(folder) / name).read_bytes()


def _case(format: str, name: str) -> Case:
    """A set of a format with one file that is another one."""

    def case(content: bytes, folder: Path) -> None:
        root = folder / "set"
        root.mkdir()
        WRITERS[format](root)
        (root / name).write_bytes(content)
        settings = ["--data.format", format]
        split = [] if format == "yolo" else ["--data.val_fraction", "0.5"]
        code, _ = command("check-data", "--data.root", str(root), *settings, *split)
        converted, _ = command("convert", str(root), "--out", str(folder / "coco"), *settings, *split)
        assert converted == code
        assert _trains(root, format, "stop") == (code == 0)
        _trains(root, format, "skip")

    case.__name__ = f"{format} {Path(name).name}"
    return case


def _trains(root: Path, format: Any, on_fault: Any) -> bool:
    config = DataConfig(root=str(root), format=format, val_fraction=None if format == "yolo" else 0.5)
    try:
        opened = DetectionSet(config)
        readings = [opened.reading("train"), opened.reading("val")] if opened.is_split else [opened.whole()]
        sets = [load(reading, on_fault) for reading in readings]
    except UserError:
        return False
    for annotations in sets:
        can_be_trained_on(annotations)
    return True


def _lines(draw: st.DrawFn) -> bytes:
    numbers = st.sampled_from(("0", "1", "2", "0.5", "0.25", "1.0", "-0.1", "nan", "1e400", "x", "-1", "0x1", "\u0661"))
    lines = draw(st.lists(st.lists(numbers, max_size=11).map(" ".join), max_size=4))
    return "\n".join(lines).encode()


_FILES: tuple[tuple[str, str, Callable[[bytes], st.SearchStrategy[bytes]]], ...] = (
    ("voc", "Annotations/a.xml", lambda sound: damaged([sound])),
    ("yolo", "labels/train/a.txt", lambda sound: damaged([sound]) | st.composite(_lines)()),
    ("yolo", "data.yaml", lambda sound: damaged([sound])),
    ("labelme", "a.json", lambda sound: json_files(json.loads(sound))),
    ("voc_masks", "SegmentationObject/a.png", lambda sound: damaged([sound])),
)
PROPERTIES = tuple((_case(format, name), make(_file_of(format, name)), 0.4) for format, name, make in _FILES)
