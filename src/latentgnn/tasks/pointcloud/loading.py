"""A trained point network for use in a program: the network, its classes, and the transform from scans to its input."""

from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from latentgnn.errors import UserError
from latentgnn.saved import files_of, save_folder
from latentgnn.tasks.classes import class_names, first_ids
from latentgnn.tasks.pointcloud.config import PointCloudConfig
from latentgnn.tasks.pointcloud.features import feature_columns, to_scan
from latentgnn.tasks.pointcloud.model import PointNetwork, build_point_network
from latentgnn.tasks.pointcloud.neighbors import Hierarchy, Level, build_hierarchy
from latentgnn.tasks.pointcloud.scans import RawScan, Scan, coordinate_fault, read_scan
from latentgnn.tasks.pointcloud.voting import predict_scan
from latentgnn.tasks.pointcloud.voxels import recentre, voxelize
from latentgnn.tasks.saving import shared_record
from latentgnn.training.checkpoints import Checkpoint


class ScanInput(NamedTuple):
    """The input of a point network, and the mapping of its output to the points of the scan.

    ``model(inputs.features, inputs.hierarchy)[inputs.voxel_of_point]`` has a row for every point of the scan.

    Args:
        features: features of the points that were kept, one per voxel, float32, shape (M, F).
        hierarchy: levels of these points.
        voxel_of_point: for each point of the scan, index of the kept point that represents it, int64, shape (N,).
    """

    features: Tensor
    hierarchy: Hierarchy
    voxel_of_point: Tensor


class ScanTransform:
    """Converts a whole scan to a point network's input: ordered features, one point per voxel, and the levels.

    For scans larger than those of the training, use `TrainedSegmenter.predict`, which cuts them into crops.

    Args:
        model: the network, which determines the levels and the device.
        config: features, voxels and classes.
    """

    def __init__(self, model: PointNetwork, config: PointCloudConfig) -> None:
        self._model = model
        self._config = config

    def __call__(self, scan: RawScan | Path | str) -> ScanInput:
        """Return the network's input.

        Args:
            scan: points with their values, or a scan file.

        Raises:
            UserError: if the file cannot be read, or the scan lacks a feature or has values that are not finite.
        """
        sound = self.scan(scan)
        device = next(self._model.parameters()).device
        voxels = voxelize(sound.points, self._config.data.voxel)
        hierarchy = build_hierarchy(
            recentre(sound.points[voxels.kept]), grids=self._model.grids, neighbors=self._model.neighbors, workers=-1
        )
        return ScanInput(
            features=torch.from_numpy(sound.features[voxels.kept]).to(device),
            hierarchy=tuple(Level(*(tensor.to(device) for tensor in level)) for level in hierarchy),
            voxel_of_point=torch.from_numpy(voxels.voxel_of_point).to(device),
        )

    def scan(self, scan: RawScan | Path | str) -> Scan:
        """Return a scan with the network's features, and with labels if classes are known."""
        path = Path("the scan") if isinstance(scan, RawScan) else Path(scan)
        raw = scan if isinstance(scan, RawScan) else read_scan(path)
        if (fault := coordinate_fault(raw.points)) is not None:
            raise UserError(f"{path}: {fault}")
        sound = to_scan(path, raw, self._config.data, unknown="ignore")
        if not np.isfinite(sound.features).all():
            raise UserError(f"{path}: it has features that are not finite numbers")
        return sound


class TrainedSegmenter(NamedTuple):
    """A trained point network of a run.

    Args:
        model: the network in evaluation mode, on the CPU.
        class_names: class names in the order of the model's scores.
        class_ids: the id of each class in files.
        transform: converts a scan to the model's input.
        config: the run's configuration.
    """

    model: PointNetwork
    class_names: tuple[str, ...]
    class_ids: tuple[int, ...]
    transform: ScanTransform
    config: PointCloudConfig

    def predict(self, scan: RawScan | Path | str, *, votes: int = 1) -> NDArray[np.float32]:
        """Return class probabilities for every point of a scan of any size, as ``latentgnn predict`` computes them.

        Args:
            scan: points with their values, or a scan file.
            votes: number of times that it is predicted, each time with other points kept in its voxels.

        Returns:
            Float32, shape (N, K).
        """
        sound = self.transform.scan(scan)
        return predict_scan(self.model, sound.points, sound.features, self.config.seen_by_crops, votes=votes)

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


def load_segmenter(config: PointCloudConfig, checkpoint: Checkpoint) -> TrainedSegmenter:
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
    model = build_point_network(
        config.model, num_features=len(feature_columns(config.data.features)), num_classes=len(names)
    )
    checkpoint.load_into(model)
    return TrainedSegmenter(
        model=model.eval(),
        class_names=names,
        class_ids=first_ids(config.data.classes),
        transform=ScanTransform(model, config),
        config=config,
    )
