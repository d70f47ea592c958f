"""Point cloud segmentation as a task of the training loop: a point network, its scans and their scores."""

import os
from collections.abc import Collection, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn

from latentgnn.tasks.class_losses import class_weights, cross_entropy, lovasz_softmax
from latentgnn.tasks.class_scores import Result, Scores, confusion_matrix
from latentgnn.tasks.explaining import spread
from latentgnn.tasks.pointcloud.config import PointCloudConfig
from latentgnn.tasks.pointcloud.datasets import ScanSet
from latentgnn.tasks.pointcloud.model import PointNetwork
from latentgnn.tasks.pointcloud.neighbors import Hierarchy, build_hierarchy, pack
from latentgnn.tasks.pointcloud.samples import Batch, Sample, TrainingCrops, collate
from latentgnn.tasks.pointcloud.voting import predict_scan
from latentgnn.training.fingerprint import Fingerprint, Record
from latentgnn.training.large_models import units
from latentgnn.training.task import TrainingSet, ValidationSet


class WholeScan(NamedTuple):
    """A labelled scan to score on, as arrays that stay on the CPU.

    Args:
        number: its index in its set.
        points: metres, float64, shape (N, 3).
        features: float32, shape (N, F).
        labels: classes or `IGNORE`, int64, shape (N,).
    """

    number: int
    points: NDArray[np.float64]
    features: NDArray[np.float32]
    labels: NDArray[np.int64]


class CropsWithNeighbors:
    """Training crops with the network's levels on them; see `TrainingCrops`."""

    def __init__(self, crops: TrainingCrops, model: PointNetwork) -> None:
        self._crops = crops
        self._grids = model.grids
        self._neighbors = model.neighbors

    def __len__(self) -> int:
        return len(self._crops)

    def group_of(self, index: int) -> int:
        """Return 0: crops of any sizes can share a batch."""
        return self._crops.group_of(index)

    def __getitem__(self, key: tuple[int, int], /) -> tuple[Sample, Hierarchy]:
        sample = self._crops[key]
        return sample, build_hierarchy(sample.coordinates.numpy(), grids=self._grids, neighbors=self._neighbors)


class WholeScans:
    """The scans of a set to score on."""

    def __init__(self, scans: ScanSet) -> None:
        self._scans = scans

    def __len__(self) -> int:
        return len(self._scans)

    def __getitem__(self, index: int, /) -> WholeScan:
        scan = self._scans.scan(index)
        assert scan.labels is not None
        return WholeScan(index, scan.points, scan.features, scan.labels)


class PointCloudTask:
    """A `latentgnn.training.task.TrainingTask` on scans.

    Args:
        model: the network.
        config: the run's configuration.
        train: the training set.
        val: the validation set.
        trained: names of the parameters that started from trained weights.

    Attributes:
        scores: scores of the last validation in this process; ``None`` before it.
        predicted: predicted classes of all points of the scans that pictures are made of, by scan index.
        confusions: the confusion matrix of each scan, by scan index.
    """

    def __init__(
        self,
        model: PointNetwork,
        config: PointCloudConfig,
        *,
        train: ScanSet,
        val: ScanSet,
        trained: Collection[str] = (),
    ) -> None:
        # The task's interface declares it as a module; prediction needs its own type.
        self._network = model
        self.model: nn.Module = model
        self.monitor = "mIoU"
        self.trained = trained
        self.training_set: TrainingSet = CropsWithNeighbors(
            TrainingCrops(train, config.data, seed=config.training.seed), model
        )
        self.validation_set: ValidationSet = WholeScans(val)
        self.scores: Scores | None = None
        self.predicted: dict[int, NDArray[np.int64]] = {}
        self.confusions: dict[int, NDArray[np.int64]] = {}
        self._config = config
        self._sets = {"training set": train, "validation set": val}
        self._class_names = val.class_names
        self._shown = {*spread(len(val), config.evaluation.sample_pictures)}
        self._weights: Tensor | None = None
        if config.data.class_weighting and train.counts is not None:
            self._weights = class_weights(train.counts, config.data.class_weighting)

    def units(self) -> list[nn.Module]:
        """Return the residual blocks of the encoder, and the levels of the decoder."""
        return units(self.model)

    def collate(self, samples: list[Any]) -> Any:
        """Pack training crops and their levels; return whole scans unchanged."""
        if isinstance(samples[0], WholeScan):
            return samples
        if len(samples) == 1 and len(samples[0][1][-1].coordinates) == 1:
            # Batch norm refuses a single row; two copies of the same crop have the same statistics.
            samples = samples * 2
        return collate([sample for sample, _ in samples]), pack([hierarchy for _, hierarchy in samples])

    def sample_ids(self, batch: tuple[Batch, Hierarchy]) -> list[Any]:
        """Return the names of the scans."""
        return list(batch[0].names)

    def losses(self, batch: tuple[Batch, Hierarchy]) -> dict[str, Tensor]:
        """Return the cross entropy and, if configured, the Lovasz loss."""
        crops, hierarchy = batch
        logits = self.model(crops.features, hierarchy).float()
        loss = self._config.loss
        weights = None if self._weights is None else self._weights.to(logits.device)
        losses = {"cross_entropy": cross_entropy(logits, crops.labels, weights, label_smoothing=loss.label_smoothing)}
        if loss.lovasz:
            losses["lovasz"] = loss.lovasz * lovasz_softmax(logits, crops.labels)
        return losses

    def predict(self, batch: Sequence[WholeScan]) -> list[Result]:
        """Return confusion matrices of whole scans."""
        return [score_scan(self._network, scan, self._config, keep=scan.number in self._shown) for scan in batch]

    def score(self, results: Sequence[Result]) -> dict[str, float]:
        """Return the figures over all points of all scans."""
        self.predicted = {result.number: result.predicted for result in results if result.predicted is not None}
        self.confusions = {result.number: result.confusion for result in results}
        confusion = np.sum(list(self.confusions.values()), axis=0)
        self.scores = Scores(class_names=self._class_names, confusion=confusion)
        return self.scores.metrics

    def fingerprints(self) -> dict[str, Fingerprint]:
        """Return fingerprints of the scans' files, with the total number of points of each class."""
        return {name: _fingerprint(scans) for name, scans in self._sets.items()}


def _fingerprint(scans: ScanSet) -> Fingerprint:
    root = scans.config.root or ""
    records = (Record(name=os.path.relpath(scan.path, root), files=scan.files) for scan in scans.sources)
    return Fingerprint.of(root, records, totals=_points(scans))


def _points(scans: ScanSet) -> dict[str, int]:
    if scans.counts is None:
        return {}
    return {f"points of {name}": n for name, n in zip(scans.class_names, scans.counts.tolist(), strict=True)}


def score_scan(model: PointNetwork, scan: WholeScan, config: PointCloudConfig, *, keep: bool) -> Result:
    """Predict a scan and compare with its labels.

    Args:
        model: the network in evaluation mode.
        scan: the scan with labels.
        config: how scans are cut, and how often they are predicted.
        keep: whether the result includes the predictions.
    """
    probabilities = predict_scan(model, scan.points, scan.features, config.seen_by_crops, votes=config.evaluation.votes)
    predicted = probabilities.argmax(axis=1)
    confusion = confusion_matrix(scan.labels, predicted, model.num_classes)
    return Result(scan.number, confusion, predicted if keep else None)
