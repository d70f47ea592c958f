"""Commands that look inside a trained model's blocks: ``explain``, ``diagnose``, ``explore``."""

import argparse
import shlex
import webbrowser
from pathlib import Path

from latentgnn.cli.parsing import Overrides, UsageError, json_argument, output, overwrite_argument
from latentgnn.cli.settings import DEFAULT_RECIPE, configuration, configuration_in_use, configuration_of_model
from latentgnn.errors import require

MOST_NODES = 6
"""Maximum number of nodes in a picture."""

EXAMPLE = Path("runs/explore")
"""Folder of the model that ``explore`` trains if none is given."""

# About a minute on two cores; then the block can tell most of the categories.
_SHORT = [
    ("training.steps", "120"),
    ("training.schedule.warmup_steps", "20"),
    ("data.embedded_train", "400"),
    ("data.embedded_val", "24"),
]


def _place(text: str) -> tuple[float, float]:
    """Parse ``120,80``."""
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


def explore_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "model",
        type=Path,
        nargs="?",
        metavar="RUN_OR_CHECKPOINT",
        help=f"what train has written (a small model on the embedded set, trained into {EXAMPLE} the first time)",
    )
    parser.add_argument("inputs", nargs="*", metavar="INPUT", help="files, folders and globs (the validation set)")
    parser.add_argument(
        "--host",
        default="127.0.0.1",
        metavar="ADDRESS",
        help="answer other machines too, under this address or, with 0.0.0.0, all; the link then holds a secret "
        "(127.0.0.1: this machine alone)",
    )
    parser.add_argument("--port", type=int, default=8765, help="0 takes a free one (8765)")
    parser.add_argument("--open", action="store_true", help="open the page in the browser")


def explore(arguments: argparse.Namespace, overrides: Overrides) -> int:
    require("starlette", extra="explore")
    require("uvicorn", extra="explore")
    from latentgnn.tasks.explore.server import serve

    source = _example() if arguments.model is None else arguments.model
    task, config = configuration_in_use(source, overrides)

    def say(link: str) -> None:
        print(f"look at {link} (Ctrl-C ends)", flush=True)
        if arguments.open:
            webbrowser.open(link)

    task.commands.explore(
        config,
        source,
        arguments.inputs,
        serve=lambda explorer: serve(explorer, host=arguments.host, port=arguments.port, say=say),
    )
    return 0


def _example() -> Path:
    """A run on the embedded set; it is trained now unless it exists, and an interrupted one is continued."""
    if not (EXAMPLE / "metrics.json").is_file():
        print(f"no run is named: training a small model on the embedded set, once, in {EXAMPLE}")
        goes_on = (EXAMPLE / "config.yaml").is_file()
        task, config = configuration_of_model(EXAMPLE, []) if goes_on else configuration(DEFAULT_RECIPE, _SHORT)
        task.commands.train(config, EXAMPLE, name=EXAMPLE.name, resume=goes_on)
    return EXAMPLE
