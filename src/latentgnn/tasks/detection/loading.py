"""A trained detector for use in a program: the model, its categories, and the transform from images to its input."""

from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn

from latentgnn.errors import UserError
from latentgnn.saved import files_of, save_folder
from latentgnn.tasks.detection.config import DetectionConfig
from latentgnn.tasks.detection.model import build_detector
from latentgnn.tasks.images import read_image, to_tensor
from latentgnn.tasks.saving import shared_record
from latentgnn.training.checkpoints import Checkpoint

AnyImage = Path | str | Image.Image | NDArray[np.uint8]


class ImageTransform:
    """Converts an image to a detector's input; the detector itself normalises and resizes.

    Args:
        model: the detector; tensors are put on its device.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model

    def __call__(self, image: AnyImage) -> Tensor:
        """Return the image as float32 (3, H, W) in 0..1.

        Args:
            image: a file, a Pillow image, or an RGB array, uint8 (H, W, 3).

        Raises:
            UserError: if the file cannot be read.
            TypeError: if it is none of these.
            ValueError: if the array has another shape or dtype.
        """
        if isinstance(image, str | Path):
            image = read_image(image)
        if isinstance(image, np.ndarray):
            if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
                raise ValueError(f"expected an RGB array, uint8 (H, W, 3); got {image.dtype} {image.shape}")
            image = Image.fromarray(image)
        if not isinstance(image, Image.Image):
            raise TypeError(f"expected a file, an image of Pillow's or an array; got {type(image).__name__}")
        return to_tensor(image.convert("RGB")).to(next(self._model.parameters()).device)


class TrainedDetector(NamedTuple):
    """A trained detector of a run.

    Args:
        model: the detector in evaluation mode, on the CPU; ``model([tensor, ...])`` returns a dict per image, as in
            torchvision.
        categories: id and name of each category; label 1 is the first.
        transform: converts an image to the model's input.
        config: the run's configuration.
    """

    model: nn.Module
    categories: tuple[tuple[int, str], ...]
    transform: ImageTransform
    config: DetectionConfig

    def predict(self, image: AnyImage) -> dict[str, Tensor]:
        """Return the detections in an image.

        Args:
            image: see `ImageTransform`.

        Returns:
            ``boxes`` (n, 4) as x1, y1, x2, y2 in pixels of the image, ``labels`` (n,), ``scores`` (n,) and, for a Mask
            R-CNN, ``masks`` (n, 1, H, W) in 0..1; all on the CPU.

        Raises:
            UserError: if the file cannot be read, or the run processes images in tiles.
        """
        tensor, tiles = self.transform(image), self.config.evaluation.tiles
        if tiles and max(tensor.shape[1:]) > tiles:
            height, width = tensor.shape[1:]
            raise UserError(
                f"this run looks at images by tiles of {tiles} pixels (evaluation.tiles), and this one is {width} x "
                f"{height}: `latentgnn predict` does so; `model([transform(image)])` looks at the whole image at once"
            )
        with torch.inference_mode():
            (found,) = self.model([tensor])
        return {name: value.cpu() for name, value in found.items()}

    def save_pretrained(self, folder: Path | str, *, overwrite: bool = False) -> None:
        """Write ``config.json`` and ``model.safetensors`` into a folder that `latentgnn.load_run` accepts.

        ``latentgnn export`` writes the same files and a model card with the run's own figures.

        Args:
            folder: the folder; created if it does not exist.
            overwrite: replace files of these names.

        Raises:
            UserError: if such files exist already.
        """
        save_folder(folder, files_of(shared_record(self.config), self.model.state_dict()), overwrite=overwrite)


def load_detector(config: DetectionConfig, checkpoint: Checkpoint) -> TrainedDetector:
    """Load the detector of a checkpoint.

    Args:
        config: the configuration stored in the checkpoint.
        checkpoint: see `latentgnn.training.commands.trained_weights`.

    Raises:
        UserError: if the configuration has no categories, or the weights do not fit it.
    """
    categories = config.data.categories
    if categories is None:
        raise UserError(f"the configuration of {checkpoint.path} names no categories, as that of a trained model does")
    # The checkpoint has all weights: pretrained ones need not be downloaded again.
    model = build_detector(replace(config.model, weights_backbone=None), len(categories))
    checkpoint.load_into(model)
    model.eval()
    if config.training.channels_last:
        model.to(memory_format=torch.channels_last)
    return TrainedDetector(model=model, categories=categories, transform=ImageTransform(model), config=config)
