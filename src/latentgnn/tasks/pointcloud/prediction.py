"""Runs a point network on whole scans: overlapping crops vote, and every original point gets a class."""

import hashlib
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from latentgnn.configuration.settings import plain_data
from latentgnn.errors import UserError
from latentgnn.files.outputs import Results
from latentgnn.machine import memory_bytes
from latentgnn.tasks.class_scores import Predicted
from latentgnn.tasks.inputs import expand_inputs, in_their_order, noted, raise_faults, result_names
from latentgnn.tasks.pointcloud.config import DataConfig
from latentgnn.tasks.pointcloud.datasets import ScanSet
from latentgnn.tasks.pointcloud.las import CHUNK
from latentgnn.tasks.pointcloud.model import PointNetwork
from latentgnn.tasks.pointcloud.pictures import draw_scan, drawn_points
from latentgnn.tasks.pointcloud.scans import SUFFIXES, Scan, coordinate_fault, scan_chunks, write_classes
from latentgnn.tasks.pointcloud.tiles import predict_in_tiles
from latentgnn.tasks.pointcloud.voting import predict_scan
from latentgnn.training.locks import sole_use
from latentgnn.training.processes import Processes

# Formats that are not written as they were read.
_WRITTEN_AS = {".las": ".laz", ".bin": ".label"}

# Bytes per point of a scan that is read whole, with few features and classes (benchmarks/results/large-scans-*).
_BYTES_WHOLE = 150


@dataclass(frozen=True, kw_only=True)
class Tiles:
    """How scans larger than memory are predicted.

    Args:
        side: side of a tile in metres.
        on_points: called with the scan, the current operation, the points done, and the total number of points.
        say: prints lines for the user.
    """

    side: float
    on_points: Callable[[Path, str, int, int], None] = lambda path, doing, done, total: None
    say: Callable[[str], None] = lambda line: None


def expand_scans(inputs: Sequence[str | Path]) -> list[Path]:
    """Expand files, folders and patterns to scan files (see `latentgnn.tasks.inputs.expand_inputs`)."""
    return expand_inputs(inputs, suffixes=SUFFIXES, kind="scan", check=_check_suffix)


def predict_files(
    model: PointNetwork,
    paths: Sequence[Path],
    *,
    config: DataConfig,
    out: Path,
    overwrite: bool = False,
    votes: int = 1,
    tiles: Tiles | None = None,
    pictures: bool = True,
    on_scan: Callable[[Predicted], None] | None = None,
    processes: Processes | None = None,
) -> list[Predicted]:
    """Predict scan files one after the other, and rewrite each with the predicted classes.

    LAS and LAZ files are written as LAZ, with all their other values; SemanticKITTI's ``.bin`` as ``.label``; others
    keep their format. File names are those of `latentgnn.tasks.inputs.result_names`. A file that cannot be read or
    written does not stop the others; the error is raised after all of them.

    Args:
        model: the network in evaluation mode.
        paths: scan files.
        config: configuration with classes, features and crops.
        out: output folder, new or empty, for the scans and, with ``pictures``, ``pictures/``.
        overwrite: replace the results of an earlier command in ``out``.
        votes: see `predict_scan`.
        tiles: read scans in tiles (see `latentgnn.tasks.pointcloud.tiles.predict_in_tiles`). If that is interrupted,
            the same call continues with the remaining tiles and scans.
        pictures: draw each scan.
        on_scan: called after each scan, in the first process.
        processes: processes that share the scans; each writes its own.

    Returns:
        The predictions; in the first process those of all files.

    Raises:
        UserError: if files could not be read or written, which it lists; or ``out`` cannot be used for results (see
            `latentgnn.files.outputs.Results`).
    """
    results_of = result_names(paths)
    targets = [
        name.with_name(f"{name.name}{_WRITTEN_AS.get(path.suffix.lower(), path.suffix.lower())}")
        for path, name in zip(paths, results_of, strict=True)
    ]
    drawn = [Path("pictures") / f"{name}.png" for name in results_of]
    scans = ScanSet.of_files(paths, config)
    processes = processes or Processes()
    if tiles is not None and processes.world > 1:
        raise UserError("--tiles works with one process only")
    ids = np.array(scans.class_ids, np.int64)
    task = None if tiles is None else _task(model, paths, config, tiles, votes=votes, pictures=pictures)
    done: list[Predicted] = []
    faults: dict[int, list[str]] = {}

    def predicted_by_scan(results: Results) -> Iterator[Predicted | None]:
        for index in processes.mine(len(paths)):
            path, predicted = paths[index], None
            if results.has(targets[index]) and (not pictures or results.has(drawn[index])):
                assert tiles is not None
                tiles.say(f"{path}: done before, in {out / targets[index]}")
                yield None
                continue
            with noted(faults.setdefault(index, []), path):
                if tiles is None:
                    _check_memory(path)
                    found = _whole(model, _sound(scans.scan(index), path), config, ids, votes)
                else:
                    folder = results.unfinished() / str(index)
                    found = _in_tiles(model, path, config, ids, votes, tiles, folder)
                if not results.has(targets[index]):
                    write_classes(results.place(targets[index]), found.classes, source=path)
                predicted = Predicted(path, out / targets[index], found.counts)
                if pictures and not results.has(drawn[index]):
                    labels = _labels(found.classes[found.drawn], ids)
                    results.write(drawn[index], draw_scan(found.points, scans.class_names, predicted=labels))
                # Some systems cannot remove a file that is mapped.
                del found
                if tiles is not None:
                    shutil.rmtree(folder)
            yield predicted

    with ExitStack() as stack:
        names = [*targets, *(drawn if pictures else ())]
        results = stack.enter_context(
            Results(out, names, reads=paths, overwrite=overwrite, first=processes.is_first, task=task)
        )
        if tiles is not None:
            stack.enter_context(sole_use(results.unfinished()))
        if processes.world > 1 and processes.is_first:
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


class _Found(NamedTuple):
    """The class id of every point, point counts per class, and indices and coordinates of points to draw."""

    classes: NDArray[np.integer[Any]]
    counts: NDArray[np.int64]
    drawn: NDArray[np.int64]
    points: NDArray[np.float64]


def _whole(model: PointNetwork, scan: Scan, config: DataConfig, ids: NDArray[np.int64], votes: int) -> _Found:
    labels = predict_scan(model, scan.points, scan.features, config, votes=votes).argmax(axis=1)
    drawn = drawn_points(len(labels))
    return _Found(ids[labels], np.bincount(labels, minlength=len(ids)), drawn, scan.points[drawn])


def _in_tiles(
    model: PointNetwork,
    path: Path,
    config: DataConfig,
    ids: NDArray[np.int64],
    votes: int,
    tiles: Tiles,
    folder: Path,
) -> _Found:
    scan = predict_in_tiles(
        model,
        path,
        config,
        side=tiles.side,
        ids=ids,
        votes=votes,
        folder=folder,
        on_points=partial(tiles.on_points, path),
        on_need=lambda need: tiles.say(f"{path}: {need}"),
    )
    counts = np.zeros(len(ids), np.int64)
    for first in range(0, len(scan.classes), CHUNK):
        counts += np.bincount(_labels(scan.classes[first : first + CHUNK], ids), minlength=len(ids))
    return _Found(scan.classes, counts, drawn_points(len(scan.classes)), scan.drawn)


def _labels(classes: NDArray[np.integer[Any]], ids: NDArray[np.int64]) -> NDArray[np.int64]:
    """Labels of class ids, all of which must be known."""
    order = np.argsort(ids)
    return order[np.searchsorted(ids, classes, sorter=order)]


def _task(
    model: PointNetwork, paths: Sequence[Path], config: DataConfig, tiles: Tiles, *, votes: int, pictures: bool
) -> dict[str, Any]:
    """Everything that the results depend on."""
    weights = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        weights.update(name.encode() + tensor.cpu().contiguous().numpy().tobytes())
    status = [path.stat() for path in paths]
    return {
        "command": "predict",
        "scans": [[str(path.resolve()), of.st_size, of.st_mtime_ns] for path, of in zip(paths, status, strict=True)],
        "data": plain_data(config),
        "weights": weights.hexdigest(),
        "neighbors": model.neighbors,
        "tiles": tiles.side,
        "votes": votes,
        "pictures": pictures,
    }


def _check_memory(path: Path) -> None:
    """Refuse a scan that does not fit into memory: otherwise the system would kill the process without a message."""
    if path.suffix.lower() not in (".las", ".laz"):
        return
    number, there = scan_chunks(path, CHUNK).number, memory_bytes()
    if there is not None and (needed := number * _BYTES_WHOLE) > there:
        raise UserError(
            f"{path}: its {number:,} points take about {needed / 1e9:.0f} GB when they are read whole, and this "
            f"machine has {there / 1e9:.0f} GB: read it by tiles, such as --tiles 200 (metres)"
        )


def _sound(scan: Scan, path: Path) -> Scan:
    if (fault := coordinate_fault(scan.points)) is not None:
        raise UserError(f"{path}: {fault}")
    if not np.isfinite(scan.features).all():
        raise UserError(f"{path}: it has features that are not finite numbers")
    return scan


def _check_suffix(path: Path) -> None:
    if path.suffix.lower() not in SUFFIXES:
        raise UserError(f"{path}: expected a scan that ends in {', '.join(SUFFIXES)}")
