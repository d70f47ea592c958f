"""Commands that look things up: ``recipes``, ``cost``."""

import argparse
import json

from latentgnn.cli.parsing import Overrides, UsageError, json_argument
from latentgnn.cli.settings import DEFAULT_RECIPE, configuration
from latentgnn.configuration.recipes import list_recipes, read_recipe, to_yaml
from latentgnn.configuration.settings import plain_data
from latentgnn.files.outputs import say_next


def recipes_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", nargs="?", metavar="NAME", help="print this recipe with every setting it leads to")
    json_argument(parser)


def recipes(arguments: argparse.Namespace, overrides: Overrides) -> int:
    if arguments.name is not None:
        _, config = configuration(arguments.name, overrides)
        values = plain_data(config)
        description = read_recipe(arguments.name).description
        print(json.dumps(values, indent=2) if arguments.json else to_yaml(values, description=description).rstrip())
        return 0
    described = list_recipes()
    if arguments.json:
        listed = [{"name": name, "description": text} for name, text in described.items()]
        print(json.dumps({"default": DEFAULT_RECIPE, "recipes": listed}, indent=2))
        return 0
    width = max(map(len, described))
    for name, description in described.items():
        print(f"{name:{width}}  {description}{' (the default)' if name == DEFAULT_RECIPE else ''}")
    say_next("latentgnn train --config NAME", "latentgnn recipes NAME > mine.yaml   # to change it")
    return 0


def _counts(text: str) -> tuple[int, ...]:
    """Parse ``100x168`` or ``150,100``."""
    parts = text.replace("x", ",").split(",")
    if not all(part.isdecimal() and int(part) > 0 for part in parts):
        raise argparse.ArgumentTypeError(f"expected numbers from 1 on, such as 100x168 or 150,100; got {text!r}")
    return tuple(map(int, parts))


def cost_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--channels", type=int, required=True, metavar="C", help="channels of the input")
    parser.add_argument("--size", type=_counts, required=True, metavar="HxW", help="its nodes: N, HxW or DxHxW")
    parser.add_argument("--latents", type=_counts, required=True, metavar="D", help="latents, one number a kernel")
    parser.add_argument("--batch", type=int, default=1, metavar="B", help="(1)")
    parser.add_argument("--reduction", type=int, default=8, metavar="N", help="(8)")
    parser.add_argument("--groups", type=int, default=1, metavar="G", help="(1)")
    parser.add_argument("--symmetric", action="store_true", help="one assignment for gather and scatter")
    parser.add_argument("--graph-conv", action="store_true", help="a graph convolution after the scatter step")


def cost(arguments: argparse.Namespace, overrides: Overrides) -> int:
    from latentgnn.config import LatentGNNConfig
    from latentgnn.cost import table

    try:
        config = LatentGNNConfig(
            channels=arguments.channels,
            num_latents=arguments.latents,
            reduction=arguments.reduction,
            num_groups=arguments.groups,
            symmetric=arguments.symmetric,
            graph_conv=arguments.graph_conv,
        )
        print(table(config, (arguments.batch, arguments.channels, *arguments.size)))
    except ValueError as error:
        raise UsageError(str(error)) from None
    return 0
