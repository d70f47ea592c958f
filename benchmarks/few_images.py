"""A small Mask R-CNN on few images of nuclei: from scratch, from a trained one, and from it with a new block.

python -m benchmarks.few_images FOLDER [--images 10,50] [--seeds 0,1,2] [--steps 150]

FOLDER is a COCO-format folder of the nuclei. The trained one first learns on the embedded set, which is generated
and has no nuclei. Each training is a process, ``latentgnn train`` as a user calls it, through the command in
``BENCHMARKS_THROUGH`` if that is set, such as ``nice``. Prints and writes ``few-images-DATE.json`` and ``.md``.
"""

import json
import os
import random
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks.options import header, numbers, positive, program, result_stem, run, write_results
from benchmarks.report import detection_title, header_block, markdown_table, mean_and_range
from benchmarks.runs import run_folder
from latentgnn.cli import main as latentgnn_main
from latentgnn.configuration.recipes import load_recipe, merge, to_yaml
from latentgnn.configuration.settings import parse_config, plain_data
from latentgnn.errors import UserError
from latentgnn.files.writing import write_json, write_text
from latentgnn.tasks.detection.coco import find_split
from latentgnn.tasks.detection.config import DetectionConfig

# The network of the recipe `context`, with anchors for both sets and without blocks: the first training does not have
# the block that is added later.
_NETWORK: dict[str, Any] = {
    "model": {"blocks": {}, "anchor_sizes": [8, 16, 32, 64, 128], "rpn_post_nms": [100, 100], "max_size": 512},
    "training": {"accelerator": "cpu", "workers": 0, "validate_every": None},
    "evaluation": {"sample_pictures": 0},
}
_NUCLEI: dict[str, Any] = {
    "model": {"min_size": [256], "detections_per_image": 200, "rpn_pre_nms": [500, 500], "rpn_post_nms": [300, 300]},
    "data": {
        "augment": {"horizontal_flip": 0.5, "vertical_flip": 0.5, "quarter_turns": True, "crop": 192, "invert": 0.1}
    },
    "evaluation": {"max_detections": [1, 10, 200]},
}
_SIDES: dict[str, dict[str, Any]] = {
    "from scratch": {},
    "from the trained one": {"weights": True},
    "from the trained one, with a block": {"weights": True, "blocks": {"C4": 16}},
}
_FIGURES = ("bbox/AP50", "bbox/AP", "segm/AP50", "segm/AP")


def settings(*changes: Mapping[str, Any]) -> DetectionConfig:
    """The recipe ``context`` with changes merged into it."""
    values: dict[str, Any] = load_recipe("context")
    for change in changes:
        values = merge(values, change)
    return parse_config(DetectionConfig, values)


def few(annotations: Path, count: int, seed: int, out: Path) -> Path:
    """Write an annotation file with some of another's images; the same images for all sides with a seed."""
    content = json.loads(annotations.read_text(encoding="utf-8"))
    images = sorted(content["images"], key=lambda image: int(image["id"]))
    if count > len(images):
        raise UserError(f"--images {count}: {annotations} has {len(images)}")
    chosen = random.Random(seed).sample(images, count)
    ids = {image["id"] for image in chosen}
    kept = [annotation for annotation in content["annotations"] if annotation["image_id"] in ids]
    path = out / f"few-{count}-{seed}.json"
    write_json(path, {**content, "images": chosen, "annotations": kept})
    return path


def measure(
    data: Path, *, images: Sequence[int], seeds: Sequence[int], steps: int, first_steps: int, folder: Path, how: "How"
) -> dict[str, Any]:
    """Train every side on each number of images with each seed, and score it on all validation images.

    Args:
        data: a COCO-format folder.
        images: numbers of training images.
        seeds: seeds of the choice of images, the new layers, and the order.
        steps: steps of each training.
        first_steps: steps of the training on the embedded set.
        folder: for the runs.
        how: processes are started.
    """
    first = settings(_NETWORK, {"training": {"steps": first_steps}})
    report: dict[str, Any] = {
        "trained": {"steps": first_steps, **how.train(first, folder / "trained")},
        "steps": steps,
        "runs": [],
    }
    base = settings(
        _NETWORK, _NUCLEI, {"data": {"root": str(data.resolve())}, "training": {"steps": steps, "batch_size": 4}}
    )
    annotations, _ = find_split(base.data, "train")
    for count in images:
        for seed in seeds:
            chosen = few(annotations, count, seed, folder)
            for side, changes in _SIDES.items():
                model = replace(
                    base.model,
                    weights=str(folder / "trained") if changes.get("weights") else None,
                    blocks=changes.get("blocks", {}),
                    # Among trained layers, a block starts as an identity.
                    block=replace(base.model.block, gamma_init=0.0),
                )
                config = replace(
                    base,
                    model=model,
                    data=replace(base.data, train_annotations=str(chosen)),
                    training=replace(base.training, seed=seed),
                )
                figures = how.train(config, run_folder(folder, f"{count}-{seed}-{side}"))
                report["runs"].append({"images": count, "seed": seed, "side": side, **figures})
                print(json.dumps(report["runs"][-1]), flush=True)
    return report


@dataclass(frozen=True)
class How:
    """How processes are started.

    Args:
        threads: of torch in each.
        through: a command to put before each, such as ``nice``.
    """

    threads: int
    through: Sequence[str] = ()

    def train(self, config: DetectionConfig, out: Path) -> dict[str, float]:
        """Train in a process of its own; its time and its figures.

        Raises:
            UserError: it failed.
        """
        file = out.with_name(f"{out.name}.yaml")
        write_text(file, to_yaml(plain_data(config)))
        command = [*self.through, sys.executable, "-m", "benchmarks.few_images", "--train", str(file), str(out)]
        environment = {**os.environ, "OMP_NUM_THREADS": str(self.threads)}
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        if done.returncode:
            raise UserError(f"{shlex.join(command)} failed: {done.stderr.strip()}")
        metrics = json.loads((out / "metrics.json").read_text(encoding="utf-8"))["metrics"]
        return {name: round(metrics[name], 4) for name in _FIGURES}


def table(report: Mapping[str, Any]) -> str:
    """Means over the seeds, with the least and the largest, in Markdown."""
    runs: dict[tuple[int, str], list[dict[str, Any]]] = {}
    for one in report["runs"]:
        runs.setdefault((one["images"], one["side"]), []).append(one)
    rows = [
        [str(count), side, *(mean_and_range([one[name] for one in of_side]) for name in _FIGURES)]
        for (count, side), of_side in runs.items()
    ]
    return markdown_table(["images", "", *map(detection_title, _FIGURES)], rows)


def main(argv: list[str]) -> None:
    """Measure, and write the result files.

    Args:
        argv: command-line arguments.
    """
    if argv[:1] == ["--train"]:
        sys.exit(latentgnn_main(["train", "--config", argv[1], "--out", argv[2]]))
    parser = program("few_images", __doc__, out=True)
    parser.add_argument("data", type=Path, metavar="FOLDER", help="nuclei in COCO format")
    parser.add_argument("--images", type=numbers, default=(10, 50), metavar="N,N", help="training images (10,50)")
    parser.add_argument("--seeds", type=numbers, default=(0, 1, 2), metavar="N,N", help="(0,1,2)")
    parser.add_argument("--steps", type=positive, default=150, metavar="N", help="of each training (150)")
    parser.add_argument("--first-steps", type=positive, default=300, metavar="N", help="of the first one (300)")
    parser.add_argument("--threads", type=positive, default=1, metavar="N", help="of each training (1)")
    given = parser.parse_args(argv)
    how = How(threads=given.threads, through=shlex.split(os.environ.get("BENCHMARKS_THROUGH", "")))
    report = header("benchmarks.few_images", argv, device="cpu", dtype="float32", threads=given.threads)
    with tempfile.TemporaryDirectory(prefix="few-images-") as folder:
        report |= measure(
            given.data,
            images=given.images,
            seeds=given.seeds,
            steps=given.steps,
            first_steps=given.first_steps,
            folder=Path(folder),
            how=how,
        )
    print(table(report))
    text = f"# Fine-tuning on few images\n\n{header_block(report, ['runs'])}\n\n{table(report)}\n"
    write_results(result_stem(given.out, "few-images", report), report, text)


if __name__ == "__main__":
    sys.exit(run(main))
