"""Image segmentation as a task of the training loop: a network, its images and their scores."""

import os
from collections.abc import Collection, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from latentgnn.errors import UserError
from latentgnn.tasks.class_losses import class_weights, cross_entropy
from latentgnn.tasks.class_scores import Result, Scores, confusion_matrix
from latentgnn.tasks.explaining import spread
from latentgnn.tasks.segmentation.config import SegmentationConfig
from latentgnn.tasks.segmentation.datasets import LabelledImages, Sample, TrainingImages, padded
from latentgnn.tasks.segmentation.prediction import normalise, predict_image
from latentgnn.training.fingerprint import Fingerprint, Record
from latentgnn.training.large_models import units
from latentgnn.training.task import TrainingSet, ValidationSet

UNIT = "pixels"
"""What is counted."""


class Batch(NamedTuple):
    """Training images of one size.

    Args:
        names: names of the images.
        images: float32 (B, 3, H, W) in 0..1.
        labels: classes or `latentgnn.tasks.classes.IGNORE`, int64 (B, H, W).
    """

    names: list[str]
    images: Tensor
    labels: Tensor


class SegmentationTask:
    """A `latentgnn.training.task.TrainingTask` on labelled images.

    Args:
        model: from `latentgnn.tasks.segmentation.model.build_segmenter`.
        config: the run's configuration.
        train: the training set.
        val: the validation set.
        trained: names of the parameters that started from trained weights.

    Attributes:
        scores: scores of the last validation in this process; ``None`` before it.
        predicted: predicted classes of all pixels of the images that pictures are made of, by image index.
        confusions: the confusion matrix of each image, by image index.
    """

    def __init__(
        self,
        model: nn.Module,
        config: SegmentationConfig,
        *,
        train: LabelledImages,
        val: LabelledImages,
        trained: Collection[str] = (),
    ) -> None:
        self.model = model
        self.monitor = "mIoU"
        self.trained = trained
        self.training_set: TrainingSet = TrainingImages(train, seed=config.training.seed)
        self.validation_set: ValidationSet = val
        self.scores: Scores | None = None
        self.predicted: dict[int, NDArray[np.int64]] = {}
        self.confusions: dict[int, NDArray[np.int64]] = {}
        self._config = config
        self._sets = {"training set": train, "validation set": val}
        self._class_names = val.class_names
        self._weights = _class_weights(train)
        self._shown = {*spread(len(val), config.evaluation.sample_pictures)}
        # Its pooled branch has one value per channel and image, for which batch norm refuses a single image.
        self._needs_two = config.model.architecture == "deeplabv3"

    def units(self) -> list[nn.Module]:
        """Return the modules that the backbone repeats."""
        return units(self.model.get_submodule("backbone"))

    def collate(self, samples: list[Any]) -> Any:
        """Pad training images to one size and stack them; return images to score on unchanged."""
        if isinstance(samples[0], Sample):
            return samples
        if len(samples) == 1 and self._needs_two:
            # Two copies of the same image have the same statistics.
            samples = samples * 2
        return Batch([sample.name for sample in samples], *padded(samples))

    def sample_ids(self, batch: Batch) -> list[Any]:
        """Return the names of the images."""
        return list(batch.names)

    def losses(self, batch: Batch) -> dict[str, Tensor]:
        """Return the cross entropy, and that of the auxiliary head."""
        outputs = self.model(normalise(batch.images, self._config.model))
        loss = self._config.loss
        weights = None if self._weights is None else self._weights.to(batch.labels.device)

        def entropy(name: str) -> Tensor:
            return cross_entropy(outputs[name].float(), batch.labels, weights, label_smoothing=loss.label_smoothing)

        losses = {"cross_entropy": entropy("out")}
        if loss.auxiliary:
            losses["auxiliary"] = loss.auxiliary * entropy("aux")
        return losses

    def predict(self, batch: Sequence[Sample]) -> list[Result]:
        """Return confusion matrices of images."""
        count = len(self._class_names)
        return [score_image(self.model, one, self._config, count, keep=one.number in self._shown) for one in batch]

    def score(self, results: Sequence[Result]) -> dict[str, float]:
        """Return the figures over all pixels of all images."""
        self.predicted = {result.number: result.predicted for result in results if result.predicted is not None}
        self.confusions = {result.number: result.confusion for result in results}
        confusion = np.sum(list(self.confusions.values()), axis=0)
        self.scores = Scores(class_names=self._class_names, confusion=confusion, unit=UNIT)
        return self.scores.metrics

    def fingerprints(self) -> dict[str, Fingerprint]:
        """Return fingerprints of images and label pictures, with the total number of pixels of each class."""
        return {name: _fingerprint(images) for name, images in self._sets.items()}


def _class_weights(train: LabelledImages) -> Tensor | None:
    """Weights (K,) of the classes in the cross entropy; ``None`` if all pixels have the same weight."""
    given = train.config.class_weighting
    if not isinstance(given, tuple):
        return class_weights(train.counts, given) if given else None
    if len(given) != len(train.class_names):
        raise UserError(
            f"data.class_weighting has {len(given)} weights; expected {len(train.class_names)}, in the order of the "
            f"classes {', '.join(train.class_names)}"
        )
    return torch.tensor(given)


def _fingerprint(images: LabelledImages) -> Fingerprint:
    root = images.config.root or ""
    records = (
        Record(name=source.name, files=[path for path in source[1:] if path is not None]) for source in images.sources
    )
    totals = {f"pixels of {name}": n for name, n in zip(images.class_names, images.counts.tolist(), strict=True)}
    return Fingerprint.of(os.path.expanduser(root), records, totals=totals)


def score_image(
    model: nn.Module, sample: Sample, config: SegmentationConfig, num_classes: int, *, keep: bool
) -> Result:
    """Predict an image and compare with its labels, at its original size.

    Args:
        model: the network in evaluation mode.
        sample: the image with its labels.
        config: how images are processed.
        num_classes: K.
        keep: whether the result includes the predictions.
    """
    predicted = predict_image(model, sample.image, config)
    labels = sample.labels.cpu().numpy().ravel()
    confusion = confusion_matrix(labels, predicted.numpy().ravel(), num_classes)
    return Result(sample.number, confusion, predicted.to(torch.int64).numpy() if keep else None)
