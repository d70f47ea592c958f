"""Does a point network that starts from trained weights learn faster? The recipe `lidar_small` on a folder of tiles.

    python -m benchmarks.finetuning FOLDER --work runs/finetuning --out benchmarks/results/finetuning

For each seed, a network learns six classes from all training tiles but the last (by their names). A second
network, with the vegetation classes merged, then learns twice from the last tile alone, for the same few steps: from
random weights, and from those of the first network, with the rows of the classes that both have. Both are scored on the
validation tiles. Finished runs in the work folder are kept and stopped ones resume, so the same command can be run
again.
"""

import argparse
import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from statistics import mean

from benchmarks.options import program, run, write_results
from benchmarks.report import markdown_table
from benchmarks.runs import header_line, run_folder, runs_header, train

MERGED = "{2: ground, 3: vegetation, 4: vegetation, 5: vegetation, 6: building, 1: unclassified}"
SIDES = {"from scratch": (), "fine-tuned": ("--model.weights", "{pretrained}")}


def tiles(folder: Path) -> tuple[list[str], list[str]]:
    """The training tiles for the first network, and the one for the second."""
    names = sorted(f"train/{path.name}" for path in (folder / "train").iterdir() if path.suffix == ".laz")
    return names[:-1], names[-1:]


def figures(run: Path, options: Sequence[str]) -> dict[str, float]:
    """The figures of a run; it is trained first unless it is finished."""
    train(run, options)
    metrics: dict[str, float] = json.loads((run / "metrics.json").read_text())["metrics"]
    return metrics


def measure(arguments: argparse.Namespace, seed: int) -> dict[str, dict[str, float]]:
    """The figures of both sides for a seed, and of the pretrained network."""
    many, one = tiles(arguments.folder)
    common = ["--config", "lidar_small", "--data.root", str(arguments.folder), "--training.seed", str(seed)]
    common += ["--training.checkpoint_every", "10", "--evaluation.sample_pictures", "0", "--training.workers", "1"]

    def steps(number: int) -> list[str]:
        return ["--training.steps", str(number), "--training.schedule.warmup_steps", str(min(20, number // 4))]

    before = arguments.work / f"pretrained-{seed}"
    options = [*common, *steps(arguments.pretraining_steps), "--data.train", json.dumps(many)]
    found = {"pretrained": figures(before, options)}
    for title, start in SIDES.items():
        options = [*common, *steps(arguments.steps), "--data.train", json.dumps(one), "--data.classes", MERGED]
        options += [text.format(pretrained=before) for text in start]
        found[title] = figures(run_folder(arguments.work, f"{title}-{seed}"), options)
    return found


def table(results: Mapping[int, Mapping[str, Mapping[str, float]]], sides: Iterable[str]) -> str:
    """A row of means over the seeds per side; for the first figure also each seed's value, in brackets."""
    seeds = list(results)
    classes = [name for name in results[seeds[0]]["fine-tuned"] if name.startswith("IoU/")]
    head = [f"mIoU (seeds {', '.join(map(str, seeds))})", *(name.removeprefix("IoU/") for name in classes), "accuracy"]
    rows = []
    for side in sides:
        own = ", ".join(f"{results[seed][side]['mIoU']:.3f}" for seed in seeds)
        means = [mean(results[seed][side][name] for seed in seeds) for name in ("mIoU", *classes, "OA")]
        rows.append([side, f"{means[0]:.3f} ({own})", *(f"{value:.3f}" for value in means[1:])])
    return markdown_table(["", *head], rows)


def main(argv: list[str]) -> None:
    """Measure, print the table, and write it with all figures.

    Args:
        argv: command-line arguments.
    """
    parser = program("finetuning", __doc__)
    parser.add_argument("folder", type=Path, help="with LAZ tiles in train/ and val/, ASPRS classes 0 to 6")
    parser.add_argument("--work", type=Path, default=Path("runs/finetuning"), help="where the runs lie")
    parser.add_argument("--out", type=Path, required=True, help="the result files' name without its end")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--pretraining-steps", type=int, default=120)
    parser.add_argument("--steps", type=int, default=40)
    arguments = parser.parse_args(argv)
    results = {seed: measure(arguments, seed) for seed in arguments.seeds}
    shown = table(results, SIDES)
    print(shown)
    numbers = f"--pretraining-steps {arguments.pretraining_steps} --steps {arguments.steps}"
    command = f"python -m benchmarks.finetuning FOLDER --seeds {' '.join(map(str, arguments.seeds))} {numbers}"
    about = runs_header(command)
    write_results(arguments.out, {**about, "seeds": results}, f"{header_line(about)}\n\n{shown}\n")


if __name__ == "__main__":
    sys.exit(run(main))
