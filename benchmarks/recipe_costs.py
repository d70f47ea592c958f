"""What the blocks of a recipe cost: parameters and operations of its network, with them and without.

python -m benchmarks.recipe_costs [--recipes context,camvid_small] [--out FOLDER]

The network is the one that `latentgnn export` exports, run on the program's first example input; of a detector, the
body, the pyramid and the dense heads. Writes ``recipe-costs-DATE.json`` and ``.md``.
"""

import sys
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from benchmarks.options import header, names_from, program, result_stem, run, write_results
from benchmarks.report import markdown_table
from benchmarks.study_costs import counted
from latentgnn.configuration.recipes import load_recipe
from latentgnn.configuration.settings import parse_config
from latentgnn.tasks.classes import class_names
from latentgnn.tasks.detection.model import build_detector
from latentgnn.tasks.detection.programs import detector_program
from latentgnn.tasks.exporting import Program
from latentgnn.tasks.pointcloud.features import feature_columns
from latentgnn.tasks.pointcloud.model import build_point_network
from latentgnn.tasks.pointcloud.programs import point_program
from latentgnn.tasks.segmentation.model import build_segmenter
from latentgnn.tasks.segmentation.programs import segmenter_program
from latentgnn.tasks.settings import settings_of, task_of

# Recipes with figures in docs/when.md; and the number of categories of the detectors' data, which is not in recipes.
RECIPES = ("context", "nuclei_small", "lidar_small", "camvid_small")
CATEGORIES = {"context": 2, "nuclei_small": 1}


def network(recipe: str, *, blocks: bool) -> tuple[nn.Module, Program]:
    """A recipe's network from random weights, and the program that is exported of it.

    Args:
        recipe: one of `RECIPES`.
        blocks: leave them in.
    """
    values = load_recipe(recipe)
    task = task_of(values, recipe)
    config: Any = parse_config(settings_of(task).config, values)
    if not blocks:
        config = replace(config, model=replace(config.model, blocks={}))
    torch.manual_seed(0)
    if task == "detection":
        detector = build_detector(config.model, CATEGORIES[recipe]).eval()
        return detector, detector_program(detector, config.model.detector)
    classes = len(class_names(config.data.classes))
    if task == "pointcloud":
        features = len(feature_columns(config.data.features))
        points = build_point_network(config.model, num_features=features, num_classes=classes).eval()
        return points, point_program(points)
    segmenter = build_segmenter(config.model, num_classes=classes, auxiliary=False, download=False).eval()
    return segmenter, segmenter_program(segmenter, config)


def costs(recipe: str, *, blocks: bool) -> dict[str, int]:
    """Parameters of a recipe's network, and operations of its program's first example; a multiply-add is two."""
    model, exported = network(recipe, blocks=blocks)
    with torch.no_grad():
        return counted(model, lambda: exported.network(**exported.samples[0]))


def table(report: dict[str, dict[str, dict[str, int]]]) -> str:
    """A row a recipe, in Markdown."""
    rows = []
    for recipe, sides in report.items():
        row = [recipe]
        for what in ("parameters", "operations"):
            bare, own = sides["without"][what], sides["with"][what]
            row += [f"{bare:,}", f"{own:,}", f"{own / bare - 1:+.1%}"]
        rows.append(row)
    return markdown_table(["recipe", "parameters", "with blocks", "", "operations", "with blocks", ""], rows)


def main(argv: list[str]) -> None:
    """Count, and write the result files.

    Args:
        argv: command-line arguments.
    """
    parser = program("recipe_costs", __doc__, out=True)
    parser.add_argument("--recipes", type=names_from(RECIPES), default=list(RECIPES), help="(all)")
    given = parser.parse_args(argv)
    head = header("benchmarks.recipe_costs", argv, device="cpu", dtype="float32", threads=None)
    report = {
        recipe: {side: costs(recipe, blocks=side == "with") for side in ("with", "without")} for recipe in given.recipes
    }
    print(table(report))
    text = f"# What blocks cost\n\nCommand: `{head['command']}`\n\n{table(report)}\n"
    write_results(result_stem(given.out, "recipe-costs", head), {**head, "recipes": report}, text)


if __name__ == "__main__":
    sys.exit(run(main))
