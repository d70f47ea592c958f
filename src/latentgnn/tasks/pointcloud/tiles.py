"""Segments a scan that is larger than memory, tile by tile.

A tile is read with all points of the crops that overlap it, so that its points get the votes of the same crops as in a
scan that is read whole.
"""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from latentgnn.errors import UserError
from latentgnn.files.writing import append_text
from latentgnn.tasks.pointcloud.cells import Run
from latentgnn.tasks.pointcloud.config import DataConfig
from latentgnn.tasks.pointcloud.features import features_of
from latentgnn.tasks.pointcloud.las import CHUNK
from latentgnn.tasks.pointcloud.model import PointNetwork
from latentgnn.tasks.pointcloud.raw import RawScan
from latentgnn.tasks.pointcloud.sorting import OnPoints, SortedScan, sort_scan
from latentgnn.tasks.pointcloud.voting import Part, predict_scan

_SIDE = 8
"""Number of cells along a tile: the margin around a tile is a whole number of cells."""

_DONE = "done.txt"

# Margin, relative to the crop's size, so that rounding does not omit a point at the edge of a crop.
_SLACK = 1e-6
_FARTHEST = 1e9
"""Metres; larger than the distance between any two points."""


class Need(NamedTuple):
    """What a scan needs, reported before its tiles are segmented.

    Args:
        tiles: number of tiles.
        points: number of points of the largest tile with its surroundings.
        memory: upper bound in bytes, in addition to what the process held before and what the network needs for a crop.
        disk: bytes that are used until the scan is done.
    """

    tiles: int
    points: int
    memory: int
    disk: int

    def __str__(self) -> str:
        return (
            f"memory: {self.memory / 1e9:.1f} GB for the largest of {self.tiles:,} tiles ({self.points:,} points with "
            f"those around it), besides the network's; disk: {self.disk / 1e9:.1f} GB until it is done"
        )


def predict_in_tiles(
    model: PointNetwork,
    path: Path,
    config: DataConfig,
    *,
    side: float,
    ids: NDArray[np.int64],
    votes: int,
    folder: Path,
    chunk: int = CHUNK,
    on_points: OnPoints = lambda doing, done, total: None,
    on_need: Callable[[Need], None] = lambda need: None,
) -> SortedScan:
    """Predict classes for every point of a scan of any size, as `latentgnn.tasks.pointcloud.voting.predict_scan` does.

    Args:
        model: the network in evaluation mode; it runs on its own device.
        path: a scan file. LAS and LAZ are read chunk by chunk, others whole.
        config: configuration with features and crops; whole scans as crops do not work, as a tile does not contain one.
        side: side of a tile in metres.
        ids: the id in files of each of the model's classes, shape (K,).
        votes: see ``predict_scan``.
        folder: new; or as left by the same call that was interrupted, which then continues with the remaining tiles.
        chunk: number of points that are read at once.
        on_points: called after each chunk, and after each crop and each tile.
        on_need: called before the first tile.

    Raises:
        UserError: if the scan cannot be read, lacks a feature, or is too large for the disk.
    """
    assert config.crop != "scan"
    scan = sort_scan(path, config, edge=side / _SIDE, ids=ids, folder=folder, chunk=chunk, on_points=on_points)
    margin = math.ceil(min(_reach(config) * (1 + _SLACK), _FARTHEST) / scan.cells.edge)
    tiles = {tile: scan.cells.runs(tile, side=_SIDE, margin=margin) for tile in scan.cells.squares(_SIDE)}
    on_need(_need(list(tiles.values()), scan, model, config))
    done, before = _done(folder), 0
    for tile, runs in tiles.items():
        number = sum(run.outer - run.inner for run in runs)

        def on_share(share: float, before: int = before, number: int = number) -> None:
            on_points("segmenting", before + int(share * number), scan.cells.number)

        if tile not in done:
            records, wanted = scan.points.read(runs)
            labels = _labels(model, scan, config, votes, records, wanted, on_share)
            scan.classes[records["index"][wanted]] = ids[labels]
            # The classes are on disk before the tile is recorded as done.
            if isinstance(scan.classes, np.memmap):
                scan.classes.flush()
            append_text(folder / _DONE, f"{tile[0]} {tile[1]}\n")
        before += number
        on_share(1.0)
    return scan


def _labels(
    model: PointNetwork,
    scan: SortedScan,
    config: DataConfig,
    votes: int,
    records: NDArray[Any],
    wanted: NDArray[np.bool_],
    on_crop: Callable[[float], None],
) -> NDArray[np.int64]:
    """Labels of the wanted points."""
    points = np.ascontiguousarray(records["point"])
    columns = {name: records[name] for name in scan.kind.names or () if name not in ("index", "point")}
    features = features_of(scan.path, RawScan(points=points, columns=columns), config, low=scan.cells.bounds.low)
    if not np.isfinite(features).all():
        raise UserError(f"{scan.path}: it has features that are not finite numbers")
    part = Part(scan.cells.bounds, wanted)
    return predict_scan(model, points, features, config, votes=votes, part=part, on_crop=on_crop).argmax(axis=1)


def _reach(config: DataConfig) -> float:
    """Distance in metres from a point within which all points are that influence its class."""
    # The farthest point of a crop that contains the point may be a crop's size away; its height depends on its
    # surroundings.
    return config.crop_size + (1.25 * config.height_radius if "height" in config.features else 0)


def _done(folder: Path) -> set[tuple[int, int]]:
    if not (folder / _DONE).exists():
        return set()
    lines = (folder / _DONE).read_text(encoding="utf-8").splitlines(keepends=True)
    # The last line of an interrupted process may be truncated.
    return {(int(line.split()[0]), int(line.split()[1])) for line in lines if line.endswith("\n")}


def _need(tiles: list[list[Run]], scan: SortedScan, model: PointNetwork, config: DataConfig) -> Need:
    points = max(sum(run.end - run.begin for run in runs) for runs in tiles)
    # Sorting the records takes twice their size. Add coordinates and features, again in crops, indices along two axes
    # and their order, and a sum for every class.
    each = 2 * scan.kind.itemsize + 24 + 4 * (2 * model.num_features + model.num_classes) + 100
    return Need(len(tiles), points, points * each, scan.disk)
