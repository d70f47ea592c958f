"""A tiny run of each task: the data, as a user would have them, and the command that trains on them."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from latentgnn.tasks.detection.context_set import write_context_set
from tests.tasks.tiny_runs import DETECTOR_HEADS, NETWORK, TOWN, write_town

STEPS = 6

_TRAINING = f"""
training:
  steps: {STEPS}
  batch_size: 2
  workers: 0
  accelerator: cpu
  log_every: 1
  checkpoint_every: 2
  validate_every: 3
  optimizer: {{name: adamw, learning_rate: 0.001}}
  schedule: {{name: constant, warmup_steps: 0}}
evaluation: {{sample_pictures: 1}}
"""

_RECIPES = {
    "detection": f"""
model:
  backbone: timm/test_resnet
  weights_backbone: null
  max_size: 96{DETECTOR_HEADS}"""
    + _TRAINING,
    "pointcloud": NETWORK
    + "data: {voxel: 0.3, crop: column, crop_size: 5.0, overlap: 0.5, crops_per_scan: 4, cached_points: 0}\n"
    + _TRAINING,
    "segmentation": """
task: segmentation
model:
  backbone: test_resnet
  blocks: {backbone.network.layer3: 4}
  block: {norm: batch_norm, gamma_init: 0.5, node_scale: mean}
loss: {auxiliary: 0.4}
data:
  classes: {3: ground, 7: sky}
  ignored: [255]
  class_weighting: 0.5
  augment: {scale: [0.8, 1.2], crop: [32, 48]}
"""
    # Adam's steps are as large as the rate also where a gradient is nothing but rounding.
    + _TRAINING.replace("name: adamw, learning_rate: 0.001", "name: sgd, learning_rate: 0.05"),
}


@dataclass(frozen=True)
class Job:
    """A run of a task.

    Args:
        task: its name.
        user: the folder with all that is the user's: ``data``, the recipe, a file of another kind.
        settings: more of the command line.
    """

    task: str
    user: Path
    settings: tuple[str, ...] = ()

    @property
    def training_files(self) -> Path:
        """The folder of the images or scans that training reads."""
        return self._files("train")

    @property
    def validation_files(self) -> Path:
        """The folder of those that the run is scored on."""
        return self._files("val")

    def _files(self, split: str) -> Path:
        return self.user / "data" / ("images" if self.task == "segmentation" else "") / split

    def begin(self, run: Path, *, own_data: bool = False) -> list[str]:
        """The command that begins a run in a folder; with ``own_data`` the run makes the same data for itself."""
        data = ["--data.root", str(self.user / "data")]
        if own_data:
            data = ["--data.embedded_train", "6", "--data.embedded_val", "4", "--data.embedded_size", "64"]
        return ["train", "--config", str(self.user / "recipe.yaml"), *data, *self.settings, "--out", str(run)]

    def resume(self, run: Path) -> list[str]:
        """The command that goes on."""
        return ["train", "--resume", str(run), *self.settings]


def make_job(task: str, user: Path) -> Job:
    """Write the data and the recipe of a task.

    Args:
        task: ``detection``, ``pointcloud`` or ``segmentation``.
        user: the folder for them.
    """
    data = user / "data"
    if task == "detection":
        write_context_set(data, train=6, val=4, size=64)
    elif task == "segmentation":
        for split, count in (("train", 4), ("val", 3)):
            for number in range(count):
                _write_view(data, split, f"{split}{number}", seed=number + 10 * count)
    else:
        for split, count in (("train", 3), ("val", 2)):
            for number in range(count):
                write_town(data / split / f"{split}{number}.npz", number + 10 * count, points=900)
        (data / "dataset.yaml").write_text(TOWN)
    (user / "recipe.yaml").write_text(_RECIPES[task])
    (user / "notes.txt").write_text("what has nothing to do with any run\n")
    return Job(task, user)


def _write_view(data: Path, split: str, name: str, *, seed: int) -> None:
    """A bright sky above dark ground, some of it without a label; sizes differ."""
    rng = np.random.default_rng(seed)
    height, width = rng.integers(48, 72, 2)
    ids = np.full((height, width), 3, np.uint8)
    ids[: int(rng.integers(16, 32))] = 7
    pixels = np.where(ids == 7, 200, 80)[..., None] + rng.integers(-40, 40, (height, width, 3))
    ids[:4, :6] = 255
    for kind, values in (("images", pixels.astype(np.uint8)), ("labels", ids)):
        (data / kind / split).mkdir(parents=True, exist_ok=True)
        Image.fromarray(values).save(data / kind / split / f"{name}.png")
