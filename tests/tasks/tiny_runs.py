"""Runs of a few steps on data of a few samples, as commands: the recipes, the data, and what is asked of every task."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from latentgnn.cli import main
from latentgnn.tasks.pointcloud.scans import RawScan, write_scan

DETECTOR_HEADS = """
  norm: batch_norm
  trainable_stages: 5
  blocks: {C4: 4}
  block: {norm: batch_norm, gamma_init: 0.5}
  fpn_channels: 16
  min_size: [48]
  anchor_sizes: [8, 16, 32, 64, 128]
  rpn_pre_nms: [50, 50]
  rpn_post_nms: [20, 20]
  box_batch_size: 8
  box_head_channels: 16
  mask_head_layers: 1
  mask_head_channels: 8
  score_threshold: 0.0
  detections_per_image: 10
"""
NETWORK = """
task: pointcloud
model:
  widths: [8, 16]
  depths: [1, 1]
  grids: [1.0]
  neighbors: 6
  blocks: {L1: 4}
  block: {norm: batch_norm, gamma_init: 0.5, reduction: 4, node_scale: mean}
loss: {lovasz: 1.0}
"""
_TRAINING = """
  batch_size: 2
  workers: 0
  accelerator: cpu
  log_every: 1
  schedule: {name: constant, warmup_steps: 0}
"""
DETECTION = f"""
model:
  backbone: resnet18
  max_size: 64{DETECTOR_HEADS}
evaluation: {{sample_pictures: 2}}
training:
  steps: 2
  optimizer: {{name: adamw, learning_rate: 0.001}}{_TRAINING}
"""
POINTCLOUD = f"""{NETWORK}
data: {{voxel: 0.3, crop: column, crop_size: 5.0, overlap: 0.5, crops_per_scan: 4, class_weighting: 0.5}}
evaluation: {{sample_pictures: 1}}
training:
  steps: 3
  optimizer: {{name: adamw, learning_rate: 0.01}}{_TRAINING}
"""
TOWN = """
classes: {2: ground, 6: building}
ignored: [0]
features: [log_intensity, height]
"""
"""The ``dataset.yaml`` of scans that `write_town` makes."""


def write_split(root: Path, split: str, count: int, *, masks: bool = True) -> None:
    """Bright squares on noise, of two categories with a gap between their ids."""
    random = np.random.default_rng(len(split))
    images, annotations = [], []
    (root / split).mkdir(parents=True)
    (root / "annotations").mkdir(exist_ok=True)
    for index in range(count):
        pixels = random.integers(0, 80, (48, 64, 3), dtype=np.uint8)
        for category in (3, 7):
            x, y = int(random.integers(0, 40)), int(random.integers(0, 28))
            pixels[y : y + 16, x : x + 16, category // 4] = 255
            annotation: dict[str, Any] = {"id": len(annotations) + 1, "image_id": index + 10, "category_id": category}
            annotation |= {"iscrowd": 0, "bbox": [x, y, 16, 16], "area": 256}
            if masks:
                annotation["segmentation"] = [[x, y, x + 16, y, x + 16, y + 16, x, y + 16]]
            annotations.append(annotation)
        Image.fromarray(pixels).save(root / split / f"{split}{index}.png")
        images.append({"id": index + 10, "file_name": f"{split}{index}.png", "width": 64, "height": 48})
    categories = [{"id": 7, "name": "blue"}, {"id": 3, "name": "red"}]
    content = {"images": images, "annotations": annotations, "categories": categories}
    (root / "annotations" / f"instances_{split}.json").write_text(json.dumps(content))


def write_town(path: Path, seed: int, *, points: int = 1500) -> None:
    """A plane with boxes on it."""
    rng = np.random.default_rng(seed)
    places = rng.random((points, 3)) * [12, 12, 0.1]
    classes = np.full(points, 2)
    for _ in range(3):
        x, y = rng.uniform(0, 9, 2)
        roof = (np.abs(places[:, :2] - [x + 1.5, y + 1.5]) < 1.5).all(axis=1)
        places[roof, 2] += 3
        classes[roof] = 6
    classes[:30] = 0
    columns = {"intensity": np.where(classes == 6, 400, 100).astype(np.uint16)}
    write_scan(path, RawScan(points=places + np.array([770_000, 6_277_000, 50]), columns=columns, classes=classes))


def write_recipe(folder: Path, text: str) -> Path:
    """A recipe as a file."""
    path = folder / "tiny.yaml"
    path.write_text(text)
    return path


def train(recipe: Path, data: Path, run: Path, *settings: str) -> Path:
    """A finished run."""
    assert main(["train", "--config", str(recipe), "--data.root", str(data), "--out", str(run), *settings]) == 0
    return run


def weights_of(run: Path) -> dict[str, Tensor]:
    """The weights of a run's last checkpoint."""
    weights: dict[str, Tensor] = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
    return weights


def stop(task: type, command: list[str], run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Train until the first checkpoint, as if it were interrupted then."""
    losses: Callable[..., Any] = task.losses  # type: ignore[attr-defined]

    def interrupted(self: Any, batch: Any) -> Any:
        if (run / "checkpoints" / "last.ckpt").exists():
            raise KeyboardInterrupt
        return losses(self, batch)

    with monkeypatch.context() as patch:
        patch.setattr(task, "losses", interrupted)
        assert main([*command, "--training.checkpoint_every", "1", "--out", str(run)]) == 1


def check_resumed(run: Path, whole: Path) -> None:
    """Resume a run, and compare its weights with those of one that was not stopped."""
    assert main(["train", "--resume", str(run)]) == 0
    expected, resumed = weights_of(whole), weights_of(run)
    assert expected.keys() == resumed.keys()
    assert all(torch.equal(value, resumed[name]) for name, value in expected.items())
