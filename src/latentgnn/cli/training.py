"""Commands that make runs: ``train``, ``report``."""

import argparse
from pathlib import Path

from latentgnn.cli.parsing import Overrides, UsageError
from latentgnn.cli.settings import DEFAULT_RECIPE, configuration, configuration_of_model
from latentgnn.errors import UserError


def train_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", metavar="RECIPE", help=f"a recipe's name or a YAML file ({DEFAULT_RECIPE})")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="the run's new folder (runs/RECIPE-DATE-TIME)")
    parser.add_argument(
        "--resume", type=Path, metavar="RUN", help="continue the run in this folder, as configured there"
    )
    parser.add_argument(
        "--compare", action="store_true", help="train the same model with blocks and without, and print both"
    )


def train(arguments: argparse.Namespace, overrides: Overrides) -> int:
    run: Path | None = arguments.resume
    if run is not None:
        if arguments.config is not None or arguments.out is not None:
            raise UsageError("--resume takes configuration and folder from the run; leave out --config and --out")
        task, config = configuration_of_model(run, overrides)
        name = run.name
    else:
        source = DEFAULT_RECIPE if arguments.config is None else arguments.config
        task, config = configuration(source, overrides)
        run, name = arguments.out, Path(source).stem
    if arguments.compare and not config.model.blocks:
        raise UsageError(
            "--compare trains with and without blocks, but model.blocks is empty: "
            "choose a recipe that has blocks, or add some, for example --model.blocks '{C4: 100}' in a detector"
        )
    action = task.commands.compare if arguments.compare else task.commands.train
    action(config, run, name=name, resume=arguments.resume is not None)
    return 0


def report_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", type=Path, metavar="RUN", help="a run's folder, finished or not, or a comparison's")


def report(arguments: argparse.Namespace, overrides: Overrides) -> int:
    if not arguments.run.is_dir():
        raise UserError(f"there is no run folder at {arguments.run}")
    task, _ = configuration_of_model(arguments.run, overrides)
    task.commands.report(arguments.run)
    return 0
