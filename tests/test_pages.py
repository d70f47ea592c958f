"""The README's and the docs' programs run, and what they say of commands and files is so."""

import inspect
import json
import re
import runpy
import shutil
import tomllib
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from latentgnn import LatentGNN
from latentgnn.cli import COMMANDS, main
from latentgnn.cli.parsing import Overrides, Parser
from latentgnn.cli.settings import TASKS, configuration, split
from latentgnn.configuration.recipes import list_recipes, load_recipe, merge
from latentgnn.configuration.settings import options, parse_config
from latentgnn.errors import UserError
from latentgnn.norms import NORMS
from latentgnn.tasks.pointcloud.scans import RawScan, write_scan
from tests.pages import PAGES, ROOT, SHELL, blocks, commands

# Their programs take the paths that they take for a reader.
pytestmark = pytest.mark.small_inputs

RECIPES = set(list_recipes())
LANGUAGES = {*SHELL, "python", "python raises", "py", "yaml", "json", "bibtex", "{toctree}", "{eval-rst}"}
by_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))

# Small models, for the programs that load a run.
DETECTOR = """
extends: context
model: {blocks: {C4: 4}, fpn_channels: 16, min_size: [48], max_size: 64, rpn_pre_nms: [20, 20],
  rpn_post_nms: [10, 10], box_head_channels: 16, mask_head_layers: 1, mask_head_channels: 8, detections_per_image: 3,
  score_threshold: 0.0}
data: {embedded_train: 2, embedded_val: 2}
training: {steps: 1, batch_size: 2, workers: 0, accelerator: cpu, schedule: {name: constant, warmup_steps: 0}}
evaluation: {sample_pictures: 0}
"""
SEGMENTER = """
task: pointcloud
model: {widths: [8, 16], depths: [1, 1], grids: [1.0], neighbors: 6, blocks: {L1: 4}, block: {reduction: 4}}
data: {voxel: 0.3, crop: column, crop_size: 5.0, crops_per_scan: 2, classes: {2: ground, 6: building},
  features: [height]}
training: {steps: 1, batch_size: 2, workers: 0, accelerator: cpu, schedule: {name: constant, warmup_steps: 0}}
evaluation: {sample_pictures: 0}
"""


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the programs of the pages take to be there: two runs, a photograph and a scan."""
    folder = tmp_path_factory.mktemp("pages")
    random = np.random.default_rng(0)
    Image.fromarray(random.integers(0, 255, (48, 64, 3), dtype=np.uint8)).save(folder / "photo.jpg")
    for name in ("train/a.laz", "val/b.laz"):
        points = random.random((400, 3)) * [6, 6, 0.1]
        (folder / "tiles" / name).parent.mkdir(parents=True)
        write_scan(
            folder / "tiles" / name, RawScan(points=points, columns={}, classes=np.where(points[:, 0] > 3, 6, 2))
        )
    shutil.copy(folder / "tiles" / "val" / "b.laz", folder / "new.laz")
    (folder / "detector.yaml").write_text(DETECTOR)
    (folder / "segmenter.yaml").write_text(SEGMENTER)
    out = {name: str(folder / "runs" / name) for name in ("mine/with_blocks", "tiles")}
    assert main(["train", "--config", str(folder / "detector.yaml"), "--out", out["mine/with_blocks"]]) == 0
    argv = ["train", "--config", str(folder / "segmenter.yaml"), "--data.root", str(folder / "tiles")]
    assert main([*argv, "--out", out["tiles"]]) == 0
    return folder


@by_page
def test_every_block_is_of_a_kind_that_is_tested(page: Path) -> None:
    unknown = [(block.line, block.language) for block in blocks(page) if block.language not in LANGUAGES]
    assert not unknown


@pytest.mark.parametrize(
    "page",
    [page for page in PAGES if any(block.language.startswith("py") for block in blocks(page))],
    ids=lambda page: str(page.relative_to(ROOT)),
)
@pytest.mark.filterwarnings("default:::torch.onnx", "default::DeprecationWarning")  # its exporter's own
def test_python_blocks_run_in_order(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    """All of a page in one scope; a block that raises gives the message that is quoted before it.

    A block of the language ``py`` needs several processes, or data that are not here: it is compiled and does not run.
    """
    programs = [block for block in blocks(page) if block.language.startswith("py")]
    if any(block.language == "python" and "load_run(" in block.code for block in programs):
        shutil.copytree(request.getfixturevalue("runs"), tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)  # some of them save files
    scope: dict[str, object] = {}
    for block in programs:
        code = compile("\n" * block.line + block.code, str(page), "exec")
        if block.language == "py":
            continue
        if block.language == "python":
            exec(code, scope)
            continue
        with pytest.raises((TypeError, ValueError, RuntimeError)) as raised:
            exec(code, scope)
        assert block.quote in str(raised.value), f"line {block.line}"


def _understands(of: type, overrides: Overrides) -> bool:
    try:
        parse_config(of, {}, overrides)
    except UserError:
        return False
    return True


@by_page
def test_every_command_is_understood(page: Path) -> None:
    """By the parser of the command, and by its recipe's settings."""
    for argv in commands(page, "latentgnn"):
        if not argv or argv[0].startswith("-") or argv[0].isupper():
            continue
        command = COMMANDS[argv[0]]
        parser = Parser(f"latentgnn {argv[0]}")
        command.arguments(parser)
        own, overrides = split(argv[1:], parser, command)
        if own == ["--help"]:
            continue
        recipe = getattr(parser.parse_args(own), "config", None)
        if recipe in RECIPES:
            configuration(recipe, overrides)
        elif overrides:
            names = {name for name, _ in overrides}
            classes = [task.settings.config for task in TASKS.values()]
            # A setting of the same name may take other values in another task: one of them must understand it.
            assert any(_understands(of, overrides) for of in classes if names <= set(options(of))), argv


@by_page
def test_every_program_and_extra_that_a_command_names_exists(page: Path) -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    for argv in [*commands(page, "pip"), *commands(page, "pip3")]:
        for group in re.findall(r"\[([\w,]+)\]", " ".join(argv)):
            assert set(group.split(",")) <= set(extras), argv
    for argv in [*commands(page, "python"), *commands(page, "python3")]:
        if argv[:1] == ["-m"] and not argv[1].startswith(("benchmarks", "tests")):
            continue  # another's program
        place = argv[1].replace(".", "/") + ".py" if argv[0] == "-m" else argv[0]
        source = (ROOT / place).read_text() + (ROOT / "benchmarks" / "options.py").read_text()
        unknown = [word for word in argv if word.startswith("--") and f'"{word.split("=")[0]}"' not in source]
        assert not unknown, argv


@by_page
def test_yaml_and_json_blocks_are_read(page: Path) -> None:
    for block in blocks(page):
        if block.language == "json":
            json.loads(block.code)
        if block.language == "yaml":
            content = yaml.safe_load(block.code)
            if "extends" in content:
                base = load_recipe(content.pop("extends"))
                parse_config(TASKS[base.get("task", "detection")].settings.config, merge(base, content))


@by_page
def test_links_and_pictures_are_there(page: Path) -> None:
    """Pages, files, and the headings within a page that a link names."""
    text = re.sub(r"^( *)(`{3,}).*?^\1\2 *$", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    for target, _, anchor in (found.partition("#") for found in re.findall(r"\]\(([^)\s]+)\)", text)):
        if target.startswith("http"):
            continue
        path = (page.parent / target).resolve() if target else page
        assert path.exists(), target
        if anchor:
            assert anchor in anchors(path), f"{target}#{anchor}"


def anchors(page: Path) -> set[str]:
    """As GitHub and the site name them."""
    text = re.sub(r"^( *)(`{3,}).*?^\1\2 *$", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    titles = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def test_the_two_commands_stand_where_the_ci_script_finds_them() -> None:
    text = (ROOT / "README.md").read_text()
    for pattern in re.findall(r"-E '(\^[^']+)'", (ROOT / ".ci" / "run").read_text()):
        assert len(re.findall(pattern, text, re.MULTILINE)) == 1


def test_every_option_the_pages_name_exists(capsys: pytest.CaptureFixture[str]) -> None:
    shown = ""
    for command in COMMANDS:
        assert main([command, "--help"]) == 0
        shown += capsys.readouterr().out
    known = set(re.findall(r"--[a-z][\w.-]+", shown))
    for page in PAGES:
        named = set(re.findall(r"latentgnn \w[^\n`]*?(--[a-z][\w.]+)|`(--[a-z][\w.]+)", page.read_text()))
        options = {option.rstrip(".") for pair in named for option in pair if option}
        unknown = {option for option in options if not any(name.startswith(option) for name in known)}
        assert not unknown, page


def test_every_recipe_the_pages_name_exists(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["recipes"]) == 0
    listed = capsys.readouterr().out.split()
    for page in PAGES:
        named = set(re.findall(r"\b(mask_rcnn_\w+|nuclei_\w+|lidar_\w+)\b", page.read_text()))
        assert named <= set(listed), page


@pytest.mark.parametrize("example", sorted((ROOT / "examples").glob("*.py")), ids=lambda path: path.stem)
def test_examples_run(example: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", [str(example)])
    runpy.run_path(str(example), run_name="__main__")
    assert capsys.readouterr().out


def test_contributing_names_every_module() -> None:
    """Each once: modules and folders of the package, and modules of the folders that have a table of their own."""
    tables = (ROOT / "CONTRIBUTING.md").read_text().split("| in `")[1:]
    package = ROOT / "src" / "latentgnn"
    folders = {"src/latentgnn/": package} | {
        f"{name}/": package / name for name in ("plain", "core", "kernels", "files")
    }
    assert [table.split("`")[0] for table in tables] == list(folders)
    for table, folder in zip(tables, folders.values(), strict=True):
        rows = [line.split("|")[1] for line in table.split("\n\n")[0].splitlines()[2:]]
        named = [name.rstrip("/") for row in rows for name in re.findall(r"`([^`]+)`", row)]
        there = [
            path.name
            for path in folder.iterdir()
            if not path.name.startswith("__") and (path.suffix == ".py" or path.is_dir())
        ]
        assert sorted(named) == sorted(there)


def test_the_equations_have_one_notation() -> None:
    """In the picture, on the page of the layer, in its docstring and in the functions."""
    picture = (ROOT / "docs" / "latentgnn.svg").read_text().replace("\u1d40", "^T")
    page, functions = (ROOT / "docs" / "layer.md").read_text(), (ROOT / "src/latentgnn/functional.py").read_text()
    for equation in ("Z = P V^T", "O = Y^T Q"):
        assert all(equation in text for text in (picture, page, str(LatentGNN.__doc__), functions)), equation
    for text in (picture, page, str(LatentGNN.__doc__)):
        assert "Y = softmax(z z^T) Z" in text
        assert "norm(U " in text


def test_the_page_of_the_layer_names_every_argument_and_norm() -> None:
    page = (ROOT / "docs" / "layer.md").read_text()
    rows = re.findall(r"^\| (`[^|]+) \|", page, re.MULTILINE)
    named = {name for row in rows for name in re.findall(r"`(\w+)`", row)}
    assert set(inspect.signature(LatentGNN).parameters) <= named
    assert all(f'"{name}"' in page for name in NORMS)
