"""Recipes: YAML files with settings, which can extend other recipes and override some of their settings."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from latentgnn.configuration.settings import nearest
from latentgnn.errors import UserError, require
from latentgnn.files.reading import read_yaml
from latentgnn.files.yaml_loader import SCIENTIFIC

# Mappings that are replaced, not merged: a recipe that lists blocks or classes means exactly these.
REPLACED = frozenset({"model.blocks", "data.classes"})

_MOST_STEPS = 16  # maximum length of a chain of recipes that extend one another


@dataclass(frozen=True)
class Recipe:
    """One recipe, resolved.

    Args:
        name: its name in the list of recipes, or the path that it was read from.
        description: its line in the list of recipes.
        values: the nested configuration; only settings given in the recipe and in those that it extends.
    """

    name: str
    description: str
    values: dict[str, Any]


def list_recipes() -> dict[str, str]:
    """Return name and description of every packaged recipe; files that begin with ``_`` are parts and omitted."""
    names = sorted(name for name in _packaged() if not name.startswith("_"))
    return {name: read_recipe(name).description for name in names}


def load_recipe(name_or_path: str | Path) -> dict[str, Any]:
    """Return the configuration of a recipe, merged with everything that it extends.

    Mappings are merged, except ``model.blocks`` and ``data.classes``; these, lists and scalars are replaced. A later
    recipe in the list of extended ones overrides earlier ones, and the file itself overrides all of them.

    Args:
        name_or_path: a packaged recipe's name, or a YAML file.

    Raises:
        UserError: if the name is unknown, the file is not YAML, or a recipe extends itself through others.
    """
    return read_recipe(name_or_path).values


def read_recipe(name_or_path: str | Path) -> Recipe:
    """Like `load_recipe`, with name and description."""
    values = dict(_resolve(_find(str(name_or_path), Path()), (), {}))
    description = values.pop("description", "")
    return Recipe(str(name_or_path), str(description), values)


def merge(base: Mapping[str, Any], over: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Merge ``over`` into ``base``: mappings are merged, everything else is replaced."""
    merged = dict(base)
    for key, value in over.items():
        path, old = f"{prefix}{key}", merged.get(key)
        if isinstance(value, Mapping) and isinstance(old, Mapping) and path not in REPLACED:
            value = merge(old, value, f"{path}.")
        merged[key] = value
    return merged


def to_yaml(values: Mapping[str, Any], *, description: str = "") -> str:
    """Return YAML that `latentgnn.files.reading.read_yaml` can read."""
    yaml = require("yaml", extra="train")
    head = {"description": description} if description else {}
    text: str = yaml.dump(
        {**head, **values}, Dumper=_dumper(), sort_keys=False, default_flow_style=None, width=110, allow_unicode=True
    )
    return text


def _packaged() -> dict[str, Path]:
    """The recipes of all tasks, found by their location: this package knows no task."""
    folder = Path(__file__).parents[1] / "tasks"
    return {path.stem: path.resolve() for path in folder.glob("*/recipes/*.yaml")}


def _find(name: str, folder: Path) -> Path:
    """Find a packaged recipe by name, or a file by its path relative to ``folder``."""
    packaged = _packaged()
    if name in packaged:
        return packaged[name]
    path = folder / Path(name).expanduser()
    # Not `Path.is_file`, which raises an error if the name is too long.
    if os.path.isfile(path):
        return path.resolve()
    if path.suffix in (".yaml", ".yml") or "/" in name:
        raise UserError(f"there is no configuration file {path} (`latentgnn recipes` lists the packaged ones)")
    known = [recipe for recipe in packaged if not recipe.startswith("_")]
    raise UserError(f"no recipe is named {name!r} (`latentgnn recipes` lists all){nearest(name, known)}")


def _resolve(path: Path, below: Sequence[Path], known: dict[Path, dict[str, Any]]) -> dict[str, Any]:
    """The settings of a file and everything that it extends; each file is read only once."""
    if path in below:
        circle = " -> ".join(step.name for step in (*below[below.index(path) :], path))
        raise UserError(f"these recipes extend each other in a circle: {circle}")
    if len(below) == _MOST_STEPS:
        raise UserError(f"{path}: more than {_MOST_STEPS} recipes extend one another")
    if path in known:
        return known[path]
    own = read_yaml(path)
    parents = own.pop("extends", [])
    if isinstance(parents, str):
        parents = [parents]
    if not isinstance(parents, list) or not all(isinstance(parent, str) for parent in parents):
        raise UserError(f"{path}: 'extends' takes a recipe's name or file, or a list of them; got {parents!r}")
    values: dict[str, Any] = {}
    for parent in parents:
        try:
            parent_path = _find(parent, path.parent)
        except UserError as error:
            raise UserError(f"{path}: 'extends': {error}") from None
        inherited = _resolve(parent_path, (*below, path), known)
        # A description is not inherited.
        values = merge(values, {name: value for name, value in inherited.items() if name != "description"})
    known[path] = merge(values, own)
    return known[path]


def _dumper() -> Any:
    """PyYAML's safe dumper; it also quotes strings that `read_yaml` would parse as numbers."""
    yaml = require("yaml", extra="train")

    class Dumper(yaml.SafeDumper):  # type: ignore[misc, name-defined]
        pass

    Dumper.add_implicit_resolver(*SCIENTIFIC)
    return Dumper
