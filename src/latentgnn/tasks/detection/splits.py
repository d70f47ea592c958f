"""Draws a validation split: a part of the images, in groups if images belong together."""

import hashlib
import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from latentgnn.errors import UserError
from latentgnn.files.reading import read_json
from latentgnn.files.writing import write_json
from latentgnn.tasks.detection.config import DataConfig

SPLIT_FILE = "split.json"
"""The file in a run's folder that stores its split."""
_SETTINGS = ("val_fraction", "val_seed", "val_groups")


def draw_split(names: Iterable[str], *, fraction: float, seed: int, groups: str | None = None) -> frozenset[str]:
    """Draw whole groups of images until the validation part is as close to the fraction as the groups allow.

    The order in which groups are drawn depends only on the seed and their names: a set that has grown keeps most of its
    split.

    Args:
        names: file names of all images.
        fraction: fraction of the images for validation.
        seed: seed of the order.
        groups: a regular expression that is searched in each name; its first parenthesised group, or the whole match,
            is the name of the image's group. ``None`` makes each image its own group.

    Returns:
        The names of the validation images.

    Raises:
        UserError: if a name has no group, or all images are in one.
    """
    members: dict[str, list[str]] = {}
    for name in dict.fromkeys(names):
        members.setdefault(_group(name, groups), []).append(name)
    if len(members) < 2:
        what = (
            f"all images are of one group, {next(iter(members))!r}" if groups and members else "there are no 2 images"
        )
        raise UserError(f"data.val_fraction: {what}, so that none can be set apart for validation")
    wanted = fraction * sum(map(len, members.values()))
    val: list[str] = []
    order = sorted(members, key=lambda group: hashlib.blake2b(f"{seed} {group}".encode()).digest())
    # At least one group in each split.
    for group in order[:-1]:
        if val and len(val) + len(members[group]) / 2 > wanted:
            break
        val += members[group]
    return frozenset(val)


def keep_split(folder: Path, config: DataConfig, *, train: Sequence[str], val: Sequence[str]) -> None:
    """Store a split, with the settings that it was drawn with, in a run's folder."""
    write_json(folder / SPLIT_FILE, {**_settings(config), "train": list(train), "val": list(val)})


def kept_split(folder: Path, config: DataConfig) -> frozenset[str] | None:
    """Return the names of the validation images stored in a run; ``None`` if there are none, or settings differ.

    Raises:
        UserError: if the file is damaged.
    """
    content = _content(folder)
    if content is None or _drawn_by(content) != _settings(config):
        return None
    return frozenset(content["val"])


def refuse_another_split(folder: Path, config: DataConfig) -> None:
    """Refuse settings with which a resumed run would draw another split than the stored one.

    Raises:
        UserError: if the settings do so, or the file is damaged.
    """
    content = _content(folder)
    if content is None or _drawn_by(content) == _settings(config):
        return
    name, was = next((name, was) for name, was in _drawn_by(content).items() if was != _settings(config)[name])
    raise UserError(
        f"data.{name} is {json.dumps(_settings(config)[name])}, but the run has drawn its split with "
        f"{json.dumps(was)} ({folder / SPLIT_FILE}): resume it without this setting, or begin a new run"
    )


def _content(folder: Path) -> dict[str, Any] | None:
    path = folder / SPLIT_FILE
    if not path.exists():
        return None
    content = read_json(path, "file of the split")
    names = content.get("val") if isinstance(content, dict) else None
    if not isinstance(names, list) or not names or not all(isinstance(name, str) for name in names):
        raise UserError(
            f"{path} is damaged (expected the names of the validation images); without it, the split is drawn again"
        )
    return dict(content)


def _drawn_by(content: dict[str, Any]) -> dict[str, Any]:
    return {name: content.get(name) for name in _SETTINGS}


def _settings(config: DataConfig) -> dict[str, Any]:
    return {name: getattr(config, name) for name in _SETTINGS}


def _group(name: str, groups: str | None) -> str:
    if groups is None:
        return name
    match = re.search(groups, name)
    if match is None:
        raise UserError(f"data.val_groups: the pattern {groups!r} is not found in the image's name {name!r}")
    return next((part for part in match.groups() if part is not None), match[0])
