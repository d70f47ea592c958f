"""Scans larger than memory: resident memory and points per second of `latentgnn predict --tiles`.

python -m benchmarks.large_scans FOLDER [--points 1000000,10000000] [--tiles 200] [--scratch FOLDER] [SETTINGS]

FOLDER has LAZ files of adjacent tiles of 50 m, which are repeated side by side until there are enough points. The
network is that of ``lidar_small`` with random weights, which are as fast as trained ones; SETTINGS such as
``--data.voxel 1`` change the recipe. Each scan is predicted in a process of its own, by tiles and, up to
``--whole-up-to`` points, whole; then both files must be equal. Prints and writes ``large-scans-DATE.json`` and ``.md``.
"""

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import laspy
import numpy as np
import torch

from benchmarks.child import run_child
from benchmarks.memory import process_bytes
from benchmarks.options import header, positives, program, result_stem, run, write_results
from benchmarks.report import markdown_table, table_row
from latentgnn.configuration.recipes import load_recipe
from latentgnn.configuration.settings import parse_config, plain_data
from latentgnn.errors import UserError
from latentgnn.tasks.classes import class_names
from latentgnn.tasks.pointcloud.config import PointCloudConfig
from latentgnn.tasks.pointcloud.features import feature_columns
from latentgnn.tasks.pointcloud.model import PointNetwork, build_point_network
from latentgnn.tasks.pointcloud.prediction import Tiles, predict_files

TITLES = (
    *("points", "read", "peak, MB", "of it before, MB", "seconds", "of all cores"),
    *("points a second", "of these"),
)
NUMBERS = [title for title in TITLES if title not in ("read", "of these")]


def write_repeated(path: Path, sources: Sequence[Path], points: int) -> None:
    """Write a LAZ file of adjacent files, repeated side by side on a square.

    Args:
        path: to write.
        sources: LAZ files that are adjacent, of one point format.
        points: of the new file.
    """
    parts = [laspy.read(source) for source in sources]
    records = np.concatenate([part.points.array for part in parts])
    head = parts[0].header
    if any((part.header.scales != head.scales).any() or (part.header.offsets != head.offsets).any() for part in parts):
        raise UserError(f"the scans in {sources[0].parent} have several scales or offsets")
    period = [int(np.ptp(records[axis])) + 1 for axis in "XY"]
    across = int(np.ceil(np.sqrt(points / len(records) * period[1] / period[0])))
    header = laspy.LasHeader(point_format=head.point_format, version=head.version)
    header.scales, header.offsets = head.scales, head.offsets
    with laspy.open(path, mode="w", header=header) as file:
        for number, first in enumerate(range(0, points, len(records))):
            copy = records[: points - first].copy()
            copy["X"] += number % across * period[0]
            copy["Y"] += number // across * period[1]
            file.write_points(laspy.ScaleAwarePointRecord(copy, head.point_format, head.scales, head.offsets))


def predict(path: Path, out: Path, config: PointCloudConfig, *, tiles: float | None) -> dict[str, Any]:
    """Predict a scan in this process.

    Args:
        path: the scan.
        out: a new folder.
        config: of the network, which gets random weights, and of the data.
        tiles: side in metres, ``None`` to read the scan whole.

    Returns:
        Seconds of each step and of all, the processor's seconds over all cores, and the process's peak of resident
        memory, in bytes, before and after.
    """
    model = _network(config)
    before, start, busy = process_bytes("VmHWM"), time.perf_counter(), time.process_time()
    ended: dict[str, float] = {}
    lines: list[str] = []

    def note(scan: Path, doing: str, done: int, total: int) -> None:
        ended[doing] = time.perf_counter()

    how = (
        None
        if tiles is None
        else Tiles(side=tiles, on_points=note, say=lambda line: lines.append(line.partition(": ")[2]))
    )
    predict_files(model, [path], config=config.data, out=out, tiles=how, pictures=False)
    end = time.perf_counter()
    marks = [start, *ended.values(), end]
    steps = dict(zip((*ended, "writing"), np.diff(marks).tolist(), strict=True)) if ended else {}
    return {
        "seconds": end - start,
        "processor_seconds": time.process_time() - busy,
        "steps": steps,
        "peak_before": before,
        "peak": process_bytes("VmHWM"),
        "said": lines,
    }


def cells(row: Mapping[str, Any]) -> list[str]:
    """The cells of a row; the last are the seconds of reading, sorting, segmenting and writing."""
    return [
        f"{row['points']:,}",
        row["read"],
        f"{row['peak'] / 1e6:,.0f}",
        f"{row['peak_before'] / 1e6:,.0f}",
        f"{row['seconds']:.0f}",
        f"{row['processor_seconds']:.0f}",
        f"{row['points'] / row['seconds']:,.0f}",
        ", ".join(f"{seconds:.0f}" for seconds in row["steps"].values()),
    ]


def main(argv: list[str]) -> None:
    """Measure, and write the result files.

    Args:
        argv: command-line arguments.
    """
    parser = program("large_scans", __doc__, out=True)
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="LAZ files of adjacent tiles")
    parser.add_argument(
        "--points", type=positives, default="1000000,10000000", metavar="N,N", help="(1000000,10000000)"
    )
    parser.add_argument("--tiles", type=float, default=200.0, metavar="METRES", help="side of a tile (200)")
    parser.add_argument("--whole-up-to", type=int, default=0, metavar="N", help="points that are also read whole (0)")
    parser.add_argument("--scratch", type=Path, metavar="FOLDER", help="for the scans and results (a temporary one)")
    parser.add_argument("--name", default="", metavar="NAME", help="added to the result files' names")
    parser.add_argument("--one", type=Path, nargs=2, metavar=("SCAN", "OUT"), help=argparse.SUPPRESS)
    given, settings = parser.parse_known_args(argv)
    config = _config(settings)
    if given.one:
        tiles = given.tiles or None
        print(json.dumps(predict(given.one[0], given.one[1], config, tiles=tiles)))
        return
    sources = sorted(given.folder.rglob("*.laz"))
    if not sources:
        raise UserError(f"{given.folder}: there are no LAZ files")
    rows = []
    with tempfile.TemporaryDirectory(dir=given.scratch, prefix="large-scans-") as scratch:
        for points in given.points:
            scan = Path(scratch) / f"{points}.laz"
            write_repeated(scan, sources, points)
            for row in _measured(scan, points, given, settings):
                rows.append(row)
                print(table_row(cells(row)), flush=True)
            scan.unlink()
    result = header("benchmarks.large_scans", argv, device="cpu", dtype="float32", threads=None)
    result |= {"data": plain_data(config.data), "tiles": given.tiles, "rows": rows}
    about = f"`{result['command']}`, {result['processor']}, torch {result['torch']}, {result['date'][:10]}"
    table = markdown_table(TITLES, [cells(row) for row in rows], right=NUMBERS)
    text = f"# Scans larger than memory\n\n{about}\n\n{table}\n"
    write_results(result_stem(given.out, "large-scans", result, given.name), result, text)


def _measured(scan: Path, points: int, given: argparse.Namespace, settings: Sequence[str]) -> Iterator[dict[str, Any]]:
    """Predict the scan by tiles and, if it is small enough, whole; both results must then be equal."""
    written: list[bytes] = []
    for side in (0.0, given.tiles) if points <= given.whole_up_to else (given.tiles,):
        with tempfile.TemporaryDirectory(dir=scan.parent) as out:
            child = [str(given.folder), "--tiles", str(side), "--one", str(scan), out, *settings]
            row = run_child("benchmarks.large_scans", child)
            (result,) = Path(out).glob("*.laz")
            if points <= given.whole_up_to:
                written.append(result.read_bytes())
        yield {"points": points, "read": "by tiles" if side else "whole", **row}
    if len(set(written)) > 1:
        raise UserError(f"{points:,} points: by tiles, the result is another than of the scan read whole")


def _config(settings: Sequence[str]) -> PointCloudConfig:
    pairs = [(name.removeprefix("--"), value) for name, value in zip(settings[::2], settings[1::2], strict=True)]
    return parse_config(PointCloudConfig, load_recipe("lidar_small"), pairs)


def _network(config: PointCloudConfig) -> PointNetwork:
    torch.manual_seed(0)
    names = class_names(config.data.classes)
    features = len(feature_columns(config.data.features))
    return build_point_network(config.model, num_features=features, num_classes=len(names)).eval()


if __name__ == "__main__":
    sys.exit(run(main))
