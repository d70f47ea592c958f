"""A point network on whole scans: overlapping crops vote, and every original point gets a class."""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from latentgnn.errors import UserError
from latentgnn.outputs import Results
from latentgnn.tasks.inputs import expand_inputs, in_their_order, noted, raise_faults, result_names
from latentgnn.tasks.pointcloud.config import DataConfig
from latentgnn.tasks.pointcloud.datasets import ScanSet
from latentgnn.tasks.pointcloud.model import PointNetwork
from latentgnn.tasks.pointcloud.neighbors import Hierarchy, Level, build_hierarchy
from latentgnn.tasks.pointcloud.pictures import draw_scan
from latentgnn.tasks.pointcloud.scans import SUFFIXES, Scan, coordinate_fault, write_classes
from latentgnn.tasks.pointcloud.voxels import crops, recentre, voxelize
from latentgnn.training.processes import Processes

T = TypeVar("T")

# Keeps the votes' random stream apart from that of the training crops.
_VOTES = 0x766F746573


# What is not written in the format that it was read in.
_WRITTEN_AS = {".las": ".laz", ".bin": ".label"}


class Predicted(NamedTuple):
    """The prediction for a file.

    Args:
        source: the file.
        path: what was written: the scan with the predicted classes.
        counts: points taken for each class, shape (K,).
    """

    source: Path
    path: Path
    counts: NDArray[np.int64]


def expand_scans(inputs: Sequence[str | Path]) -> list[Path]:
    """The scan files that files, folders and patterns name (see `latentgnn.tasks.inputs.expand_inputs`)."""
    return expand_inputs(inputs, suffixes=SUFFIXES, kind="scan", check=_check_suffix)


def predict_scan(
    model: PointNetwork,
    points: NDArray[np.float64],
    features: NDArray[np.float32],
    config: DataConfig,
    *,
    votes: int = 1,
) -> NDArray[np.float32]:
    """Probabilities of the classes for every point of a scan.

    The scan is cut into overlapping crops, each crop thinned out by voxels; a point takes the probabilities of the
    point that was kept of its voxel, and their mean over the crops that hold it.

    Args:
        model: in evaluation mode; it runs where it is.
        points: metres, float64, shape (N, 3).
        features: shape (N, F).
        config: ``crop``, ``crop_size``, ``overlap`` and ``voxel``.
        votes: times that all crops are predicted, each time with other points kept.

    Returns:
        Float32, shape (N, K).
    """
    device = next(model.parameters()).device
    total = np.zeros((len(points), model.num_classes), np.float32)
    with torch.inference_mode():
        for crop in _ahead(_prepared(model, points, features, config, votes)):
            hierarchy = tuple(Level(*(tensor.to(device) for tensor in level)) for level in crop.hierarchy)
            scores = model(torch.from_numpy(crop.features).to(device), hierarchy)
            total[crop.inside] += scores.float().softmax(dim=1).cpu().numpy()[crop.kept_of_point]
    # Every point is in a crop, so no sum is zero.
    total /= total.sum(axis=1, keepdims=True)
    return total


def predict_files(
    model: PointNetwork,
    paths: Sequence[Path],
    *,
    config: DataConfig,
    out: Path,
    overwrite: bool = False,
    votes: int = 1,
    pictures: bool = True,
    on_scan: Callable[[Predicted], None] | None = None,
    processes: Processes | None = None,
) -> list[Predicted]:
    """Predict scan files one after the other, and write each again with the predicted classes.

    LAS and LAZ become LAZ, with all else that they hold; SemanticKITTI's ``.bin`` a
    ``.label``; others keep their format. Their names are those of
    `latentgnn.tasks.inputs.result_names`. A file that cannot be read or written does not stop the others; the error
    comes after all of them.

    Args:
        model: in evaluation mode.
        paths: scan files.
        config: with classes, features and crops.
        out: folder, new or empty, for the scans and, with ``pictures``, ``pictures/``.
        overwrite: replace the results of an earlier command in ``out``.
        votes: see `predict_scan`.
        pictures: draw each scan.
        on_scan: called after each scan, in the first process.
        processes: share the scans, and each writes its own.

    Returns:
        What was predicted, in the first process of all files.

    Raises:
        UserError: files could not be read or written, and it lists them; or ``out`` is not for results (see
            `latentgnn.outputs.Results`).
    """
    results_of = result_names(paths)
    targets = [
        name.with_name(f"{name.name}{_WRITTEN_AS.get(path.suffix.lower(), path.suffix.lower())}")
        for path, name in zip(paths, results_of, strict=True)
    ]
    drawn = [Path("pictures") / f"{name}.png" for name in results_of]
    scans = ScanSet.of_files(paths, config)
    class_ids = np.array(scans.class_ids, np.int64)
    processes = processes or Processes()
    done: list[Predicted] = []
    faults: dict[int, list[str]] = {}

    def predicted_by_scan(results: Results) -> Iterator[Predicted | None]:
        for index in processes.mine(len(paths)):
            path, predicted, told = paths[index], None, faults.setdefault(index, [])
            with noted(told, path):
                scan = _sound(scans.scan(index), path)
                labels = predict_scan(model, scan.points, scan.features, config, votes=votes).argmax(axis=1)
                target = results.place(targets[index])
                write_classes(target, class_ids[labels], source=path)
                predicted = Predicted(path, target, np.bincount(labels, minlength=scans.num_classes))
            # Told before the picture, which may fail.
            yield predicted
            if predicted is not None and pictures:
                with noted(told, path):
                    results.write(drawn[index], draw_scan(scan.points, scans.class_names, predicted=labels))

    names = [*targets, *(drawn if pictures else ())]
    with Results(out, names, reads=paths, overwrite=overwrite, first=processes.is_first) as results:
        if processes.is_first:
            others = processes.others(len(paths))
            results.announce(of[index] for index in others for of in ((targets, drawn) if pictures else (targets,)))
        processes.wait()
        for predicted in processes.in_order(predicted_by_scan(results), len(paths)):
            if predicted is not None:
                done.append(predicted)
                if on_scan is not None:
                    on_scan(predicted)
    listed = in_their_order(processes.gathered(faults))
    processes.done()
    raise_faults(listed, inputs=len(paths), kind="scan", out=out)
    return done


class _Crop(NamedTuple):
    inside: NDArray[np.int64]
    kept_of_point: NDArray[np.int64]
    features: NDArray[np.float32]
    hierarchy: Hierarchy


def _prepared(
    model: PointNetwork, points: NDArray[np.float64], features: NDArray[np.float32], config: DataConfig, votes: int
) -> Iterator[_Crop]:
    for vote in range(votes):
        # The first vote takes the points nearest to the middles of their voxels.
        rng = np.random.default_rng(np.random.SeedSequence([_VOTES, vote])) if vote else None
        for inside in crops(points, shape=config.crop, size=config.crop_size, overlap=config.overlap):
            voxels = voxelize(points[inside], config.voxel, rng)
            chosen = inside[voxels.kept]
            yield _Crop(
                inside=inside,
                kept_of_point=voxels.voxel_of_point,
                features=features[chosen],
                hierarchy=build_hierarchy(
                    recentre(points[chosen]), grids=model.grids, neighbors=model.neighbors, workers=-1
                ),
            )


def _ahead(items: Iterator[T]) -> Iterator[T]:
    """The same items, each next one made while the one before is in use."""
    with ThreadPoolExecutor(1) as pool:
        coming = pool.submit(next, items, None)
        while (item := coming.result()) is not None:
            coming = pool.submit(next, items, None)
            yield item


def _sound(scan: Scan, path: Path) -> Scan:
    if (fault := coordinate_fault(scan.points)) is not None:
        raise UserError(f"{path}: {fault}")
    if not np.isfinite(scan.features).all():
        raise UserError(f"{path}: it has features that are not finite numbers")
    return scan


def _check_suffix(path: Path) -> None:
    if path.suffix.lower() not in SUFFIXES:
        raise UserError(f"{path}: expected a scan that ends in {', '.join(SUFFIXES)}")
