"""Commands on sets of data: ``check-data``, ``convert``."""

import argparse
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from latentgnn.cli.parsing import Overrides, json_argument, output, overwrite_argument
from latentgnn.cli.settings import DEFAULT_RECIPE, TASKS, configuration, with_settings
from latentgnn.errors import require
from latentgnn.files.outputs import say_next


def check_data_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--config", metavar="RECIPE", help=f"the recipe, or YAML file, that the data should fit ({DEFAULT_RECIPE})"
    )
    json_argument(parser)
    parser.add_argument(
        "--out", type=Path, metavar="FOLDER", help="write pictures of samples and summary.json (detection)"
    )
    overwrite_argument(parser)


def check_data(arguments: argparse.Namespace, overrides: Overrides) -> int:
    source = DEFAULT_RECIPE if arguments.config is None else arguments.config
    task, config = configuration(source, overrides)
    with output(as_json=arguments.json) as give:
        told = task.commands.check_data(config, recipe=source, out=arguments.out, overwrite=arguments.overwrite)
        say_next(_after_check(source, overrides, told))
        give(lambda: told)
    return 0 if told["faultless"] else 1


def _after_check(source: str, overrides: Overrides, told: Mapping[str, Any]) -> str:
    """The command that may follow a check, with the same settings."""
    given = "".join(f" --{name} {shlex.quote(text)}" for name, text in (("config", source), *overrides))
    if not told["faultless"]:
        return f"latentgnn check-data{given}   # when the faults are mended"
    if "val" not in told["splits"]:
        given += " --data.val_fraction 0.2"
    note = "   # with changes for what does not fit" if told.get("misfits") else ""
    return f"latentgnn train{given}{note}"


def convert_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", metavar="SOURCE", help="the folder of the set, of any format")
    parser.add_argument(
        "--out", type=Path, required=True, metavar="FOLDER", help="a new or empty folder for a COCO-format set"
    )
    overwrite_argument(parser)
    parser.add_argument("--no-images", action="store_true", help="write the annotations alone")


def convert(arguments: argparse.Namespace, overrides: Overrides) -> int:
    require("yaml", extra="train")
    task = TASKS["detection"]
    config = with_settings(task, {"data": {"root": arguments.source}}, overrides)
    from latentgnn.tasks.detection import convert as conversion

    conversion.convert(config, out=arguments.out, overwrite=arguments.overwrite, with_images=not arguments.no_images)
    return 0
