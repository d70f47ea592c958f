"""Memory and time of opening COCO-format annotations, and memory of loading processes, by number of images.

python -m benchmarks.annotations [--images 10000,100000,1000000] [--beside FOLDER/src]
"""

import json
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from benchmarks.child import run_child
from benchmarks.memory import private_bytes, process_bytes
from benchmarks.options import header, positive, positives, program, result_stem, run, save_results, write_results
from benchmarks.report import header_block, markdown_table

OBJECTS = 5
"""Objects per image."""
CORNERS = 14
"""Corners of an object's polygon; half of COCO's polygons have fewer."""
SIZE = (160, 120)
"""Width and height of the images. They are small because their cost is not what is measured."""
FILES = 64
"""Image files; the images of a set share them."""
STARTS = ("fork", "spawn")
WORKERS, BATCH, BATCHES = 2, 8, 40


def write_set(folder: Path, images: int) -> Path:
    """Write a made-up set of one split, with objects in random order, and return its annotation file.

    Args:
        folder: an empty one.
        images: how many.
    """
    generator = np.random.default_rng(0)
    for number in range(FILES):
        pixels = generator.integers(0, 255, (*SIZE[::-1], 3), np.uint8)
        Image.fromarray(pixels).save(folder / f"{number:03}.jpg", quality=50)
    path = folder / "annotations.json"
    with path.open("w") as file:
        file.write('{"info": {"description": "made up"}, "images": [')
        file.writelines(_separated(_images(images)))
        file.write('], "annotations": [')
        file.writelines(_separated(_objects(images, generator)))
        file.write('], "categories": ')
        json.dump([{"id": id, "name": f"category {id}"} for id in range(1, 81)], file)
        file.write("}")
    return path


def _images(number: int) -> Iterator[str]:
    for id in range(1, number + 1):
        name = f"{id % FILES:03}.jpg"
        yield json.dumps({"id": id, "file_name": name, "width": SIZE[0], "height": SIZE[1], "license": 1})


def _objects(images: int, generator: np.random.Generator) -> Iterator[str]:
    angles = np.linspace(0, 2 * np.pi, CORNERS, endpoint=False)
    circle = np.stack([np.cos(angles), np.sin(angles)], axis=1)
    for id, image in enumerate(generator.permutation(images * OBJECTS).tolist(), 1):
        middle, radius = generator.uniform(30, 90, 2), generator.uniform(5, 25, 2)
        polygon = (middle + circle * radius).round(2)
        (left, top), (right, bottom) = polygon.min(0).tolist(), polygon.max(0).tolist()
        yield json.dumps(
            {
                "id": id,
                "image_id": 1 + image // OBJECTS,
                "category_id": 1 + id % 80,
                "bbox": [left, top, round(right - left, 2), round(bottom - top, 2)],
                "area": round(float(np.pi * radius.prod()), 2),
                "iscrowd": 0,
                "segmentation": [polygon.ravel().tolist()],
            }
        )


def _separated(texts: Iterator[str]) -> Iterator[str]:
    for number, text in enumerate(texts):
        yield f", {text}" if number else text


def measure(path: Path, start: str) -> dict[str, Any]:
    """Open a set in this process, and load from it in other processes.

    Args:
        path: of `write_set`.
        start: how processes start, a name that `multiprocessing` knows.

    Returns:
        ``open_seconds``, processor time to open the set; ``first_batch_seconds``, wall-clock time from then to the
        first batch; and in bytes: ``opened``, memory that the set takes in this process, ``peak``, the most while
        opening it, and ``worker``, the most memory that a loading process shares with no other.
    """
    from latentgnn.tasks.detection.coco import CocoTrainingSet
    from latentgnn.tasks.detection.config import AugmentConfig
    from latentgnn.tasks.detection.sound_sets import load_split
    from latentgnn.training.loading import batches, make_loader

    before = process_bytes("VmRSS")
    began = time.process_time()
    annotations = load_split(path, path.parent)
    training_set = CocoTrainingSet(annotations, augment=AugmentConfig(), seed=0)
    opened = time.process_time()
    held = process_bytes("VmRSS") - before
    peak = process_bytes("VmHWM") - before
    keys = np.random.default_rng(0).integers(0, len(training_set), (BATCHES, BATCH))
    order = [[(0, index) for index in batch] for batch in keys.tolist()]
    loader = make_loader(
        training_set, list, workers=WORKERS, seed=0, batch_sampler=order, multiprocessing_context=start
    )
    loading = time.perf_counter()
    with batches(loader) as loaded:
        next(loaded)
        first = time.perf_counter()
        for _ in range(BATCHES - 2 - 2 * WORKERS):
            next(loaded)
        # Before the last batches: a process that has none left to load has ended.
        workers = [private_bytes(process) for process in _children()]
        for _ in loaded:
            pass
    return {
        "file_bytes": path.stat().st_size,
        "open_seconds": opened - began,
        "first_batch_seconds": first - loading,
        "opened": held,
        "peak": peak,
        "worker": max(workers),
    }


def _children() -> list[int]:
    """The loading processes; Python's helper processes are not among them."""
    from multiprocessing import active_children

    return [process.pid for process in active_children() if process.pid is not None]


def markdown(report: Mapping[str, Any]) -> str:
    """A report for reading.

    Args:
        report: as written to JSON.
    """
    rows = [
        [
            f"{one['images']:,}",
            f"{one['file_bytes'] / 1e9:.2f} GB",
            one["side"],
            one["start"],
            f"{one['open_seconds']:.1f} s",
            f"{one['first_batch_seconds']:.1f} s",
            *(f"{one[key] / 1e6:,.0f} MB" for key in ("peak", "opened", "worker")),
        ]
        for one in report["measured"]
    ]
    titles = ["images", "file", "version", "start", "open", "first batch", "peak", "opened", "a worker"]
    return (
        "\n\n".join(
            [
                "# Annotations over the number of images",
                header_block(report, ["measured"]),
                f"{OBJECTS} objects an image. Open: the processor's time to read and check all records and image "
                f"files. First batch: from then to the first of {WORKERS} loading processes. Peak and opened: memory "
                "that the main process takes, at most and after opening, beyond what it had before. A worker: memory "
                "that a loading process shares with no other, libraries and all.",
                markdown_table(titles, rows),
            ]
        )
        + "\n"
    )


def main(argv: list[str]) -> None:
    """Measure, and write ``annotations-DATE`` as JSON and Markdown.

    Args:
        argv: command-line arguments.
    """
    parser = program("annotations", __doc__, out=True)
    parser.add_argument(
        "--images",
        type=positives,
        default=[10_000, 100_000, 1_000_000],
        metavar="N,..",
        help="images of the sets; a million take 2.5 GB of disk (10000,100000,1000000)",
    )
    parser.add_argument("--starts", default=",".join(STARTS), metavar="NAME,..", help="of processes (fork,spawn)")
    parser.add_argument("--beside", type=Path, metavar="FOLDER", help="src folder of another version to measure too")
    parser.add_argument(
        "--most-beside", type=positive, metavar="N", help="images of the largest set that the other version opens (all)"
    )
    parser.add_argument("--scratch", type=Path, metavar="FOLDER", help="for the sets, kept there (a temporary one)")
    parser.add_argument("--add-to", type=Path, metavar="FILE", help="put the measurements to those of this JSON file")
    parser.add_argument("--measure", nargs=2, metavar=("FILE", "START"), help="one measurement, as JSON, and no file")
    given = parser.parse_args(argv)
    if given.measure:
        print(json.dumps(measure(Path(given.measure[0]), given.measure[1])))
        return
    report = header("benchmarks.annotations", argv, device="cpu", dtype="float32", threads=None)
    report["measured"] = []
    if given.add_to is not None:
        earlier = json.loads(given.add_to.read_text())
        report |= {"before": [*earlier.get("before", []), earlier["command"]], "measured": earlier["measured"]}
    stem = result_stem(given.out, "annotations", report)
    scratch = given.scratch or Path(tempfile.mkdtemp(prefix="latentgnn-"))
    try:
        for images in given.images:
            path = scratch / str(images) / "annotations.json"
            if not path.exists():
                path.parent.mkdir(parents=True, exist_ok=True)
                write_set(path.parent, images)
            for start in given.starts.split(","):
                sides: dict[str, Path | None] = {"this": None}
                if given.beside is not None and images <= (given.most_beside or images):
                    sides["beside"] = given.beside
                for side, source in sides.items():
                    measured = run_child("benchmarks.annotations", ["--measure", str(path), start], source=source)
                    report["measured"].append({"images": images, "side": side, "start": start, **measured})
                    save_results(stem, report, markdown(report))
    finally:
        if given.scratch is None:
            shutil.rmtree(scratch)
    print(markdown(report))
    write_results(stem, report, markdown(report))


if __name__ == "__main__":
    sys.exit(run(main))
