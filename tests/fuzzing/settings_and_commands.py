"""Recipes, and the command line."""

from pathlib import Path
from typing import Any

import yaml
from hypothesis import strategies as st

from latentgnn.cli import COMMANDS
from latentgnn.configuration.recipes import load_recipe
from latentgnn.configuration.settings import options
from latentgnn.tasks.detection.config import DetectionConfig
from latentgnn.tasks.pointcloud.config import PointCloudConfig
from tests.fuzzing.child import command
from tests.fuzzing.strategies import ODD_TEXTS, damaged, mutated

SETTINGS = sorted({*options(DetectionConfig), *options(PointCloudConfig)})
RECIPES = [load_recipe(name) for name in ("context", "nuclei_small", "mask_rcnn_r50_c345", "lidar_small")]
BOMB = "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n"
BOMB += "\n".join(f"a{level}: &a{level} [{', '.join([f'*a{level - 1}'] * 10)}]" for level in range(1, 9))
TEXTS = [
    *(BOMB, "[" * 100_000, "- " * 3000, "a: &a [*a]", "extends: recipe.yaml", "extends: [context, lidar_small]"),
    *("%YAML 1.99999\n---\na: 1", "a: !!python/name:os.system x", "training: {seed: " + "9" * 5000 + "}", "? [1]\n: 2"),
    *("training: {steps: 0x" + "f" * 3000 + "}", "model: {blocks: {C4: 2020-99-99}}", "<<: *a", 'a: "\\UFFFFFFFF"'),
]


class Dumper(yaml.SafeDumper):
    """Without aliases for what is there twice."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _text(values: Any) -> bytes:
    return yaml.dump(values, Dumper=Dumper, sort_keys=False).encode("utf-8", "surrogatepass")


def recipes_files() -> st.SearchStrategy[bytes]:
    """Recipes with wrong values, with damaged text, and texts that mean harm."""
    sound = [_text(recipe) for recipe in RECIPES]
    changed = st.sampled_from(RECIPES).flatmap(mutated).map(_text)
    return st.one_of(changed, changed, damaged(sound), st.sampled_from(TEXTS).map(str.encode), st.binary(max_size=60))


def recipes(content: bytes, folder: Path) -> None:
    """What is taken is printed in full, and what is printed means the same."""
    (folder / "recipe.yaml").write_bytes(content)
    code, printed = command("recipes", "recipe.yaml")
    assert code in (0, 2)
    if code == 0:
        assert isinstance(yaml.safe_load(printed), dict)
        (folder / "printed.yaml").write_text(printed, encoding="utf-8")
        assert command("recipes", "printed.yaml") == (0, printed)


@st.composite
def command_lines(draw: st.DrawFn) -> list[str]:
    """Commands with options and settings of any values, on data that are not there."""
    name = draw(st.sampled_from([*COMMANDS, *COMMANDS, "trian", "", "--help"]))
    values = st.one_of(
        st.sampled_from([text for text in ODD_TEXTS if "\x00" not in text] + TEXTS),
        st.sampled_from(("1", "-1", "0", "1.5", "true", "[1]", "[1, 2, 3]", "{C4: 5}", "{C4: 1000000000}", "9" * 23)),
        st.text(st.characters(exclude_characters="\x00", exclude_categories=("Cs",)), max_size=10),
    )
    own = ("--config", "--out", "--resume", "--compare", "--results", "--score-threshold", "--no-pictures", "--help")
    cost = ("--channels", "--size", "--latents", "--batch", "--reduction", "--groups", "--symmetric", "--graph-conv")
    argv = [name]
    for _ in range(draw(st.integers(0, 4))):
        option = draw(st.sampled_from([*(f"--{setting}" for setting in SETTINGS), *own * 3, *cost, "--", "-x"]))
        if draw(st.booleans()):
            argv.append(f"{option}={draw(values)}")
        else:
            argv += [option, draw(values)]
    if draw(st.booleans()):
        argv.append(draw(values))
    if name in ("train", "check-data", "evaluate") and not any(token.startswith("--data.root") for token in argv):
        argv[1:1] = ["--data.root", "absent"]
    return argv


def lines(argv: list[str], folder: Path) -> None:
    """No command line does harm; those that name no data end without any."""
    command(*argv)


PROPERTIES = (
    (recipes, recipes_files(), 1.0),
    (lines, command_lines(), 2.0),
)
