"""Loads a trained model of any task for use in a program."""

from importlib import import_module
from pathlib import Path
from typing import Any, Protocol

from torch import nn

from latentgnn.configuration.settings import parse_config
from latentgnn.tasks.settings import settings_of, task_of


class Trained(Protocol):
    """The interface that the results of `load_run` have for every task; the rest depends on the task."""

    @property
    def model(self) -> nn.Module:
        """The model in evaluation mode."""

    @property
    def transform(self) -> Any:
        """Converts one image or scan to the model's input."""

    @property
    def config(self) -> Any:
        """The run's settings."""

    def predict(self, sample: Any, /) -> Any:
        """Return the model's result for one image or scan."""


def load_run(path: Path | str, *, device: str = "cpu", from_hub: bool = False, revision: str | None = None) -> Any:
    """Load the trained model of a run, or one that was saved from it.

    Args:
        path: a run's folder, for its best checkpoint, or the last if none is best; a checkpoint; what `save_pretrained`
            or ``latentgnn export --to safetensors`` wrote; or with ``from_hub`` a model's name on the Hugging Face hub.
        device: device for the model.
        from_hub: download the model; without this, the network is not used.
        revision: a branch, tag or commit on the hub.

    Returns:
        For a detector, `latentgnn.tasks.detection.loading.TrainedDetector`: ``model`` in evaluation mode,
        ``categories``, ``transform``, ``config`` and ``predict(image)``. For a point cloud's run,
        `latentgnn.tasks.pointcloud.loading.TrainedSegmenter`: likewise, with ``class_names`` and ``class_ids``. For a
        segmenter of images, `latentgnn.tasks.segmentation.loading.TrainedSegmenter`: the same names.

    Raises:
        UserError: if there is no run, it has no checkpoint yet, or that does not fit its configuration.
    """
    # Imported here, because this module is imported with the package without being used.
    from latentgnn.hub import find
    from latentgnn.training.commands import trained_weights
    from latentgnn.training.runs import recorded_config

    path = find(path, from_hub=from_hub, revision=revision)
    checkpoint = trained_weights(path)
    values = recorded_config(path) if path.is_dir() else checkpoint.config
    task = task_of(values, path)
    settings = settings_of(task)
    config: Any = parse_config(settings.config, values, recorded=True)
    trained: Trained = getattr(import_module(f"latentgnn.tasks.{task}.loading"), settings.loader)(config, checkpoint)
    trained.model.to(device)
    return trained
