"""A trained segmenter for use in a program: the network, its classes, and the transform from images to its input."""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from PIL import Image
from torch import Tensor, nn

from latentgnn.errors import UserError
from latentgnn.saved import files_of, save_folder
from latentgnn.tasks.classes import class_names, first_ids
from latentgnn.tasks.images import read_image, to_tensor
from latentgnn.tasks.saving import shared_record
from latentgnn.tasks.segmentation.config import SegmentationConfig
from latentgnn.tasks.segmentation.model import build_segmenter
from latentgnn.tasks.segmentation.prediction import network_input, predict_image
from latentgnn.training.checkpoints import Checkpoint


class TrainedSegmenter(NamedTuple):
    """A trained segmenter of a run.

    Args:
        model: the network in evaluation mode, on the CPU; returns ``{"out": logits}``.
        class_names: class names in the order of the model's scores.
        class_ids: the id of each class in label pictures.
        transform: converts an image to the model's input, (1, 3, h, w).
        config: the run's configuration.
    """

    model: nn.Module
    class_names: tuple[str, ...]
    class_ids: tuple[int, ...]
    transform: Callable[[Image.Image | Path | str], Tensor]
    config: SegmentationConfig

    def predict(self, image: Image.Image | Path | str) -> Tensor:
        """Return the class of every pixel of an image, as an index into ``class_names``; int64 (height, width).

        Args:
            image: an image or an image file.

        Raises:
            UserError: if the file cannot be read.
        """
        return predict_image(self.model, _pixels(image), self.config)

    def save_pretrained(self, folder: Path | str, *, overwrite: bool = False) -> None:
        """Write ``config.json`` and ``model.safetensors`` into a folder that `latentgnn.load_run` accepts.

        Args:
            folder: the folder; created if it does not exist.
            overwrite: replace files of these names.

        Raises:
            UserError: if such files exist already.
        """
        save_folder(folder, files_of(shared_record(self.config), self.model.state_dict()), overwrite=overwrite)


def load_segmenter(config: SegmentationConfig, checkpoint: Checkpoint) -> TrainedSegmenter:
    """Load the network of a checkpoint.

    Args:
        config: the configuration stored in the checkpoint.
        checkpoint: see `latentgnn.training.commands.trained_weights`.

    Raises:
        UserError: if the configuration has no class names, or the weights do not fit it.
    """
    if config.data.classes is None:
        raise UserError(f"the configuration of {checkpoint.path} names no classes, as that of a trained model does")
    names = class_names(config.data.classes)
    model = build_segmenter(
        config.model, num_classes=len(names), auxiliary=config.loss.auxiliary > 0, download=False
    ).eval()
    checkpoint.load_into(model)

    def transform(image: Image.Image | Path | str) -> Tensor:
        return network_input(_pixels(image).to(next(model.parameters()).device), config)

    return TrainedSegmenter(model, names, first_ids(config.data.classes), transform, config)


def _pixels(image: Image.Image | Path | str) -> Tensor:
    return to_tensor(image.convert("RGB") if isinstance(image, Image.Image) else read_image(image))
