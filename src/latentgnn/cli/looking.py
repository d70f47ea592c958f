"""Commands that look inside a trained model's blocks: ``explain``, ``diagnose``."""

import argparse
import shlex
from pathlib import Path

from latentgnn.cli.parsing import Overrides, UsageError, json_argument, output, overwrite_argument
from latentgnn.cli.settings import configuration_in_use

MOST_NODES = 6
"""Of a picture."""


def _place(text: str) -> tuple[float, float]:
    """``120,80``."""
    try:
        x, y = map(float, text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected x,y such as 120,80; got {text!r}") from None
    return x, y


def explain_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", type=Path, metavar="RUN_OR_CHECKPOINT", help="what train has written")
    parser.add_argument("inputs", nargs="+", metavar="INPUT", help="files, folders and globs")
    parser.add_argument(
        "--node",
        type=_place,
        action="append",
        default=[],
        metavar="X,Y",
        help="show what the node there takes in: column,row of a pixel, or x,y of a scan; may be given several times "
        "(the surest detections, and places spread over the input)",
    )
    parser.add_argument("--block", metavar="NAME", help="the block, or a part of its name (all)")
    parser.add_argument(
        "--out", type=Path, default=Path("explained"), metavar="FOLDER", help="a new or empty folder (explained)"
    )
    overwrite_argument(parser)


def explain(arguments: argparse.Namespace, overrides: Overrides) -> int:
    if len(arguments.node) > MOST_NODES:
        raise UsageError(f"--node: at most {MOST_NODES} nodes fit into a picture; got {len(arguments.node)}")
    task, config = configuration_in_use(arguments.model, overrides)
    nodes = [f"--node={x:g},{y:g}" for x, y in arguments.node]
    block = [] if arguments.block is None else ["--block", arguments.block]
    task.commands.explain(
        config,
        arguments.model,
        arguments.inputs,
        out=arguments.out,
        overwrite=arguments.overwrite,
        places=arguments.node,
        block=arguments.block,
        command=shlex.join(["latentgnn", "explain", str(arguments.model), *arguments.inputs, *nodes, *block]),
    )
    return 0


def diagnose_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", type=Path, metavar="RUN_OR_CHECKPOINT", help="what train has written")
    parser.add_argument(
        "--samples", type=int, default=50, metavar="N", help="images or scans, spread over the validation set (50)"
    )
    json_argument(parser)


def diagnose(arguments: argparse.Namespace, overrides: Overrides) -> int:
    if arguments.samples < 1:
        raise UsageError(f"--samples: expected 1 or more; got {arguments.samples}")
    task, config = configuration_in_use(arguments.model, overrides)
    with output(as_json=arguments.json) as give:
        found = task.commands.diagnose(config, arguments.model, samples=arguments.samples)
        if not arguments.json:
            print(found)
        give(found.to_dict)
    return 0
