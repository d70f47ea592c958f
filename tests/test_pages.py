"""The README's and the docs' programs run, and what they say of commands and files is so."""

import inspect
import re
import runpy
from pathlib import Path

import pytest

from latentgnn import LatentGNN
from latentgnn.cli import COMMANDS, main
from latentgnn.norms import NORMS

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


@pytest.mark.parametrize("page", [page.relative_to(ROOT) for page in PAGES if "```python" in page.read_text()], ids=str)
def test_python_blocks_run_in_order(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # some of them save files
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), re.DOTALL)
    scope: dict[str, object] = {}
    for block in blocks:
        exec(compile(block, str(page), "exec"), scope)
    assert {"layer", "logits"} & set(scope)


@pytest.mark.parametrize("page", [page.relative_to(ROOT) for page in PAGES], ids=str)
def test_links_and_pictures_are_there(page: Path) -> None:
    targets = re.findall(r"\]\(([^)#]+)\)", (ROOT / page).read_text())
    missing = [t for t in targets if not t.startswith("http") and not ((ROOT / page).parent / t).exists()]
    assert missing == []


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
    """Each once: modules and folders of the package, and modules of the core."""
    tables = (ROOT / "CONTRIBUTING.md").read_text().split("| in `")[1:]
    assert tables[0].startswith("src/latentgnn/`")
    assert tables[1].startswith("core/`")
    package = ROOT / "src" / "latentgnn"
    for table, folder in zip(tables, (package, package / "core"), strict=True):
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
