"""Commands that use a trained model: ``evaluate``, ``predict``, ``export``."""

import argparse
from pathlib import Path

from latentgnn.cli.parsing import Overrides, UsageError, json_argument, output, overwrite_argument
from latentgnn.cli.settings import Task, configuration_in_use, with_settings
from latentgnn.errors import require
from latentgnn.tasks.settings import task_of

FORMATS = ("safetensors", "torch", "onnx")


def evaluate_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", type=Path, nargs="?", metavar="RUN_OR_CHECKPOINT", help="what train has written")
    parser.add_argument("--results", type=Path, metavar="FILE", help="score this COCO-results file (detection)")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="where to write (evaluation/ inside the run)")
    overwrite_argument(parser)
    _tile_arguments(parser)
    json_argument(parser)


def evaluate(arguments: argparse.Namespace, overrides: Overrides) -> int:
    model: Path | None = arguments.model
    overrides = [*overrides, *_tile_settings(arguments)]
    if model is None and arguments.results is None:
        raise UsageError("evaluate needs a run's folder or a checkpoint, or --results FILE")
    if model is None:
        require("yaml", extra="train")
        task = Task(task_of(dict(overrides), "--task"))
        config = with_settings(task, {}, overrides)
        if config.data.root is None:
            raise UsageError("without a run's folder or a checkpoint, --results needs --data.root FOLDER")
    else:
        task, config = configuration_in_use(model, overrides)
    default = model / "evaluation" if model is not None and model.is_dir() else Path("evaluation")
    out = arguments.out or default
    with output(as_json=arguments.json) as give:
        scores = task.commands.evaluate(
            config, model, results=arguments.results, out=out, overwrite=arguments.overwrite
        )
        give(lambda: {"folder": str(out), **scores.to_json()})
    return 0


def _tile_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--tiles",
        metavar="SIZE",
        help="look at large images, or scans, by tiles of this side, in pixels or metres (--evaluation.tiles)",
    )
    parser.add_argument(
        "--overlap",
        metavar="FRACTION",
        help="overlap of neighbouring tiles (--evaluation.tile_overlap; 0.2; not for scans)",
    )


def _tile_settings(arguments: argparse.Namespace) -> Overrides:
    given = {"evaluation.tiles": arguments.tiles, "evaluation.tile_overlap": arguments.overlap}
    return [(name, value) for name, value in given.items() if value is not None]


def predict_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", type=Path, metavar="RUN_OR_CHECKPOINT", help="what train has written")
    parser.add_argument("inputs", nargs="+", metavar="INPUT", help="files, folders and globs")
    parser.add_argument(
        "--out", type=Path, default=Path("predictions"), metavar="FOLDER", help="a new or empty folder (predictions)"
    )
    overwrite_argument(parser)
    parser.add_argument(
        "--score-threshold", type=float, metavar="SCORE", help="leave out detections that score less (detection; 0.5)"
    )
    parser.add_argument("--no-pictures", action="store_true", help="write the results alone")
    _tile_arguments(parser)


def predict(arguments: argparse.Namespace, overrides: Overrides) -> int:
    if arguments.score_threshold is not None and not 0 <= arguments.score_threshold <= 1:
        raise UsageError(f"--score-threshold: expected a number from 0 to 1; got {arguments.score_threshold}")
    task, config = configuration_in_use(arguments.model, [*overrides, *_tile_settings(arguments)])
    task.commands.predict(
        config,
        arguments.model,
        arguments.inputs,
        out=arguments.out,
        overwrite=arguments.overwrite,
        score_threshold=arguments.score_threshold,
        pictures=not arguments.no_pictures,
    )
    return 0


def export_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", type=Path, metavar="RUN_OR_CHECKPOINT", help="what train has written")
    parser.add_argument(
        "--to",
        choices=FORMATS,
        required=True,
        help="safetensors: the whole model, for latentgnn.load_run; torch (.pt2) and onnx: a program (of a "
        "detector, only its dense part)",
    )
    parser.add_argument(
        "--out", type=Path, metavar="FOLDER", help="a new or empty folder (export/FORMAT inside the run)"
    )
    overwrite_argument(parser)


def export(arguments: argparse.Namespace, overrides: Overrides) -> int:
    model: Path = arguments.model
    task, config = configuration_in_use(model, overrides)
    out = arguments.out or (model if model.is_dir() else Path()) / "export" / arguments.to
    task.commands.export(config, model, to=arguments.to, out=out, overwrite=arguments.overwrite)
    return 0
