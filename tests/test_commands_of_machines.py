"""The commands of docs/machines.md, as the command line, torchrun and the settings take them."""

import re
import shlex
from pathlib import Path

import pytest
from torch.distributed.run import get_args_parser

from latentgnn.cli import COMMANDS
from latentgnn.cli.parsing import Parser
from latentgnn.cli.settings import DEFAULT_RECIPE, configuration, split

PAGE = (Path(__file__).resolve().parents[1] / "docs" / "machines.md").read_text()
BLOCKS = re.findall(r"```\n(.*?)```", PAGE, re.DOTALL)
LINES = [line for block in BLOCKS for line in block.replace("\\\n", " ").splitlines()]


def test_there_are_commands() -> None:
    assert sum("latentgnn train" in line for line in LINES) > 5
    assert sum("torchrun" in line for line in LINES) > 2


@pytest.mark.parametrize("line", LINES)
def test_commands_are_understood(line: str) -> None:
    before, found, after = line.partition("latentgnn ")
    assert found, line
    if before.startswith("torchrun"):
        launcher = get_args_parser().parse_args([*shlex.split(before), "latentgnn"][1:])
        assert launcher.module
        assert launcher.training_script == "latentgnn"
    else:
        assert all(re.fullmatch(r"(MASTER_ADDR|MASTER_PORT|NODE_RANK)=\w+", word) for word in before.split())
    name, *argv = shlex.split(after)
    command, parser = COMMANDS[name], Parser(name)
    command.arguments(parser)
    own, overrides = split(argv, parser, command)
    arguments = parser.parse_args(own)
    # The settings have values of their types, and fit one another.
    configuration(getattr(arguments, "config", None) or DEFAULT_RECIPE, overrides)
