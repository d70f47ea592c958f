"""A tiny run of each task: the data, as a user would have them, and the command that trains on them."""

from dataclasses import dataclass
from pathlib import Path

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
        return self.user / "data" / "train"

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
        task: ``detection`` or ``pointcloud``.
        user: the folder for them.
    """
    data = user / "data"
    if task == "detection":
        write_context_set(data, train=6, val=4, size=64)
    else:
        for split, count in (("train", 3), ("val", 2)):
            for number in range(count):
                write_town(data / split / f"{split}{number}.npz", number + 10 * count, points=900)
        (data / "dataset.yaml").write_text(TOWN)
    (user / "recipe.yaml").write_text(_RECIPES[task])
    (user / "notes.txt").write_text("what has nothing to do with any run\n")
    return Job(task, user)
