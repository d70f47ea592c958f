"""The embedded set with the block, with one vector of global context in its place, and without either.

python -m benchmarks.embedded --runs FOLDER [--sides latentgnn,none] [--seeds 0,1] [--steps 300] [--threads 2]

The detector of the recipe ``context``, from scratch. With the same seed, every side starts from the same weights and
sees the same images in the same order. What follows C4 is attached as `latentgnn.insert` attaches a block. Each
training is a run in FOLDER; started again, the program continues with those that are missing. Prints all finished runs,
and writes ``embedded-DATE.json`` and ``.md``.
"""

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.contexts import GlobalContext
from benchmarks.options import header, names_from, numbers, positive, program, result_stem, run, write_results
from benchmarks.report import detection_title, markdown_table
from benchmarks.runs import run_folder
from latentgnn.attachment import attach
from latentgnn.configuration.recipes import load_recipe
from latentgnn.configuration.settings import parse_config, plain_data
from latentgnn.tasks.detection.config import DetectionConfig
from latentgnn.tasks.detection.context_set import write_context_set
from latentgnn.tasks.detection.model import build_detector
from latentgnn.tasks.detection.sets import DetectionSet
from latentgnn.tasks.detection.sound_sets import load
from latentgnn.tasks.detection.task import DetectionTask
from latentgnn.training.loop import fit
from latentgnn.training.runs import RunFolder

# The host of C4 in the recipe's backbone, and its channels.
HOST, CHANNELS = "layer3", 192
# What is attached in place of the block, made from the number of channels.
SIDES: Mapping[str, Callable[[int], nn.Module] | None] = {
    "latentgnn": None,
    "none": None,
    "global context": GlobalContext,
}
FIGURES = ("bbox/AP", "bbox/AP50", "segm/AP", "segm/AP50")


def settings(side: str, *, seed: int, steps: int, data: Path) -> DetectionConfig:
    """The recipe ``context`` for one training, without blocks for every side but the block's."""
    config = parse_config(DetectionConfig, load_recipe("context"))
    return replace(
        config,
        model=config.model if side == "latentgnn" else replace(config.model, blocks={}),
        data=replace(config.data, root=str(data)),
        training=replace(config.training, seed=seed, steps=steps, accelerator="cpu", workers=0),
    )


def build(config: DetectionConfig, side: str) -> nn.Module:
    """The detector of a side; what is attached is initialized last, so that everything else starts the same."""
    torch.manual_seed(config.training.seed)
    model = build_detector(config.model, 2)
    if (make := SIDES[side]) is not None:
        attach(model.get_submodule(f"backbone.body.{HOST}"), make(CHANNELS), "child")
    return model


def train(side: str, *, seed: int, steps: int, folder: Path) -> None:
    """One run; resumed if it was started before."""
    recipe = parse_config(DetectionConfig, load_recipe("context")).data
    data = folder / "data"
    config = settings(side, seed=seed, steps=steps, data=data)
    write_context_set(data, train=recipe.embedded_train, val=recipe.embedded_val, size=recipe.embedded_size)
    sets = DetectionSet(config.data)
    train_set, val_set = (load(sets.reading(split), on_fault="stop", whole=True) for split in ("train", "val"))
    path = run_folder(folder, f"{side}-{seed}")
    path.mkdir(parents=True, exist_ok=True)
    run = RunFolder(path, plain_data(config))
    task = DetectionTask(build(config, side), config, train=train_set, val=val_set)
    with run.held():
        fit(task, config.training, run, resume=True)


def is_finished(run: Path, steps: int) -> bool:
    """Whether a run has been trained for so many steps."""
    metrics = RunFolder(run).metrics()
    return metrics is not None and metrics["step"] == steps


def finished(folder: Path, seeds: Sequence[int]) -> list[dict[str, Any]]:
    """The finished runs, each with its figures."""
    runs = []
    for side in SIDES:
        for seed in seeds:
            metrics = RunFolder(run_folder(folder, f"{side}-{seed}")).metrics()
            if metrics is not None:
                figures = {name: round(metrics["metrics"][name], 4) for name in FIGURES}
                runs.append({"side": side, "seed": seed, "steps": metrics["step"], **figures})
    return runs


def table(runs: Sequence[Mapping[str, Any]]) -> str:
    """A row a side, its seeds one after the other, in Markdown."""
    rows = []
    for side in SIDES:
        of_side = [run for run in runs if run["side"] == side]
        if of_side:
            seeds = ", ".join(str(run["seed"]) for run in of_side)
            rows.append([side, seeds, *(", ".join(f"{one[name]:.3f}" for one in of_side) for name in FIGURES)])
    return markdown_table(["", "seeds", *map(detection_title, FIGURES)], rows)


def main(argv: list[str]) -> None:
    """Train what is missing, and write the result files.

    Args:
        argv: command-line arguments.
    """
    parser = program("embedded", __doc__, out=True)
    parser.add_argument("--runs", type=Path, required=True, metavar="FOLDER", help="where the runs are kept")
    parser.add_argument("--sides", type=names_from(SIDES), default=list(SIDES), help="(all)")
    parser.add_argument("--seeds", type=numbers, default=(0, 1), metavar="N,N", help="(0,1)")
    parser.add_argument("--steps", type=positive, default=300, metavar="N", help="of each training (300)")
    parser.add_argument("--threads", type=positive, default=2, metavar="N", help="of torch (2)")
    given = parser.parse_args(argv)
    torch.set_num_threads(given.threads)
    command = ["--runs", "FOLDER", "--sides", ",".join(given.sides), "--seeds", ",".join(map(str, given.seeds))]
    command += ["--steps", str(given.steps), "--threads", str(given.threads)]
    head = header("benchmarks.embedded", command, device="cpu", dtype="float32", threads=given.threads)
    for seed in given.seeds:
        for side in given.sides:
            if not is_finished(run_folder(given.runs, f"{side}-{seed}"), given.steps):
                train(side, seed=seed, steps=given.steps, folder=given.runs)
    runs = finished(given.runs, given.seeds)
    print(table(runs))
    text = f"# The embedded set\n\nCommand: `{head['command']}`\n\n{table(runs)}\n"
    write_results(result_stem(given.out, "embedded", head), {**head, "runs": runs}, text)


if __name__ == "__main__":
    sys.exit(run(main))
