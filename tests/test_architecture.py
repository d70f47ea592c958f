"""Which module may import which. Type hints count too: imports under ``TYPE_CHECKING`` are read like all others."""

import ast
from collections.abc import Iterable, Mapping
from pathlib import Path

import pytest

import latentgnn

PACKAGE = Path(latentgnn.__file__).parent

# Imports that close a circle today, as (importing module, imported module). Take an entry out once it is mended.
KNOWN_CIRCLES: frozenset[tuple[str, str]] = frozenset({})

# The layer from the top down: what is in a row imports from its own row or from one below it.
ROWS = (
    ("layer", "points"),
    ("running", "halves"),
    ("paths",),
    ("plain", "core", "kernels"),
    ("batch_statistics",),
    ("functional",),
    ("norms", "numerics", "launches"),
)

# What the modules of a part must not import; parts are packages or modules, and `LAYER` is all outside them.
TASKS, TRAINING, CONFIGURATION = "latentgnn.tasks", "latentgnn.training", "latentgnn.configuration"
COMMAND_LINE, INSERTION, LAYER = "latentgnn.cli", "latentgnn.insertion", "the layer"
PARTS = (TASKS, TRAINING, CONFIGURATION, COMMAND_LINE, INSERTION)
FORBIDDEN = {
    LAYER: PARTS,
    INSERTION: (COMMAND_LINE, TASKS, TRAINING, CONFIGURATION),
    CONFIGURATION: (COMMAND_LINE, TASKS, TRAINING),
    TRAINING: (COMMAND_LINE, TASKS),
    TASKS: (COMMAND_LINE,),
}

Imports = Mapping[str, set[str]]


def read_imports(package: Path) -> dict[str, set[str]]:
    """The modules of a package that each of its modules imports, anywhere in its file."""
    files: dict[str, Path] = {}
    for path in package.rglob("*.py"):
        parts = path.relative_to(package.parent).with_suffix("").parts
        files[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    imports: dict[str, set[str]] = {}
    for module, path in files.items():
        names: set[str] = set()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                names |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                assert node.level == 0, f"{path}, line {node.lineno}: relative imports are not read here"
                # `from package import module` names a module, `from module import name` something inside one.
                inside = {f"{node.module}.{alias.name}" for alias in node.names}
                names |= {name if name in files else str(node.module) for name in inside}
        imports[module] = names & files.keys()
    return imports


def circle(imports: Imports) -> list[str]:
    """The modules of one circle of imports, the first again at the end; empty where there is none."""
    done: set[str] = set()

    def visit(module: str, path: list[str]) -> list[str]:
        if module in path:
            return [*path[path.index(module) :], module]
        if module in done:
            return []
        for imported in sorted(imports[module]):
            if modules := visit(imported, [*path, module]):
                return modules
        done.add(module)
        return []

    return next((modules for module in sorted(imports) if (modules := visit(module, []))), [])


def without(imports: Imports, left_out: Iterable[tuple[str, str]]) -> Imports:
    """The imports but for some."""
    pairs = set(left_out)
    return {module: {name for name in names if (module, name) not in pairs} for module, names in imports.items()}


def part_of(module: str) -> str:
    return next((part for part in PARTS if module == part or module.startswith(f"{part}.")), LAYER)


@pytest.fixture(scope="module")
def imports() -> Imports:
    return read_imports(PACKAGE)


def test_imports_are_read(tmp_path: Path) -> None:
    package = tmp_path / "made"
    (package / "inner").mkdir(parents=True)
    texts = {
        "__init__.py": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from made.a import A\n",
        "a.py": "import os\nimport made.b\n",
        "b.py": "def f():\n    from made.inner import c\n",
        "inner/__init__.py": "",
        "inner/c.py": "from made import Anything\n",
    }
    for name, text in texts.items():
        (package / name).write_text(text)
    imports = read_imports(package)
    assert imports == {
        "made": {"made.a"},
        "made.a": {"made.b"},
        "made.b": {"made.inner.c"},
        "made.inner": set(),
        "made.inner.c": {"made"},
    }
    assert circle(imports) == ["made", "made.a", "made.b", "made.inner.c", "made"]
    assert circle(without(imports, [("made.b", "made.inner.c")])) == []


def test_imports_have_no_circle(imports: Imports) -> None:
    assert " -> ".join(circle(without(imports, KNOWN_CIRCLES))) == ""


def test_known_circles_are_still_there(imports: Imports) -> None:
    mended = [pair for pair in sorted(KNOWN_CIRCLES) if not circle(without(imports, KNOWN_CIRCLES - {pair}))]
    assert mended == [], "take these out of KNOWN_CIRCLES"


def test_arrows_point_downwards(imports: Imports) -> None:
    assert {part_of(module) for module in imports} == {LAYER, *PARTS}
    upwards = [
        f"{module} imports {name}"
        for module, names in imports.items()
        # The package itself gives the public names of all parts, and is a command.
        if module not in ("latentgnn", "latentgnn.__main__")
        for name in sorted(names)
        if part_of(name) in FORBIDDEN.get(part_of(module), ())
    ]
    assert upwards == []


def test_rows_of_the_layer_point_downwards(imports: Imports) -> None:
    def row_of(module: str) -> int | None:
        name = module.removeprefix("latentgnn.").partition(".")[0]
        return next((index for index, row in enumerate(ROWS) if name in row), None)

    assert {name for row in ROWS for name in row} <= {path.stem for path in PACKAGE.iterdir()}
    upwards = [
        f"{module} imports {name}"
        for module, names in imports.items()
        for name in sorted(names)
        if (own := row_of(module)) is not None and (other := row_of(name)) is not None and other < own
    ]
    assert upwards == []


def test_tasks_do_not_know_each_other(imports: Imports) -> None:
    # A folder without a task of its own, such as that of the explore page, is shared like a file.
    tasks = {path.parent.name for path in (PACKAGE / "tasks").glob("*/task.py")}
    assert {"detection", "pointcloud"} <= tasks

    def task_of(module: str) -> str | None:
        """The task that a module belongs to; none for what lies in ``tasks`` itself, which all tasks share."""
        names = module.removeprefix(TASKS).split(".")
        return names[1] if len(names) > 1 and names[1] in tasks else None

    across = [
        f"{module} imports {name}"
        for module, names in imports.items()
        if part_of(module) == TASKS
        for name in sorted(names)
        if task_of(name) not in (None, task_of(module))
    ]
    assert across == []
