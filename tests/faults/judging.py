"""What is wrong after a fault: read with the libraries that the files' formats come from, and nothing of ours."""

import csv
import hashlib
import json
import zipfile
from pathlib import Path
from typing import Any

import torch
import yaml
from PIL import Image
from torch import Tensor

_CHECKPOINTS = ("last.ckpt", "previous.ckpt", "best.ckpt")
# What tells of the machine, the time or the way, and is another in each run.
_OF_ITS_OWN = (
    *("environment.json", "data.json", "report.html", "log.txt", ".lock"),
    *("previous.ckpt", "earlier-best.ckpt"),
)


def snapshot(folder: Path) -> dict[str, tuple[int, str]]:
    """Every file of a folder: the time of its last change, and a digest of its content."""
    return {
        str(path.relative_to(folder)): (path.stat().st_mtime_ns, hashlib.sha256(path.read_bytes()).hexdigest())
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def touched(before: dict[str, tuple[int, str]], now: dict[str, tuple[int, str]]) -> list[str]:
    """What was added, removed or changed between two snapshots."""
    return [f"{name} of the user's was touched" for name in sorted(dict(before.items() ^ now.items()))]


def partial_files(run: Path) -> list[str]:
    """The files under their own names that are not whole."""
    problems = []
    for path in sorted(run.rglob("*")):
        if path.is_file() and not any(part.endswith((".tmp", ".damaged")) for part in path.relative_to(run).parts):
            try:
                _read(path)
            except Exception as error:
                # Whatever the format's own library says.
                problems.append(f"{path.relative_to(run)} is not whole: {type(error).__name__}: {error}")
    return problems


def newest_step(run: Path, *, damaged: str = "") -> int:
    """The step of the newest checkpoint that is sound; 0 where there is none.

    Args:
        run: its folder.
        damaged: the name of one that was damaged, wherever in it.
    """
    steps = [0]
    for name in set(_CHECKPOINTS) - {damaged}:
        try:
            steps.append(_read(run / "checkpoints" / name)["latentgnn"]["step"])
        except Exception:
            # Of any kind: a damaged one is no checkpoint.
            continue
    return max(steps)


def final_state(run: Path) -> dict[str, Any]:
    """All that a finished run holds and another one of the same settings must hold too."""
    state: dict[str, Any] = {}
    for path in sorted(run.rglob("*")):
        name = str(path.relative_to(run))
        if not path.is_file() or path.name in _OF_ITS_OWN or name.startswith(("tensorboard/", "data/")):
            continue
        if path.suffix == ".ckpt":
            content = _read(path)
            weights = {"weights": content["state_dict"], "optimizer": content["optimizer"]}
            state[name] = {"step": content["latentgnn"]["step"], **weights}
        elif path.name == "metrics.csv":
            state[name] = [row["step"] for row in csv.DictReader(path.read_text().splitlines())]
        elif path.name == "config.yaml":
            state[name] = {name: value for name, value in yaml.safe_load(path.read_text()).items() if name != "data"}
        else:
            state[name] = path.read_bytes()
    return state


def differences(expected: dict[str, Any], found: dict[str, Any]) -> list[str]:
    """Where the final state of a run is not, bit for bit, that of the uninterrupted one."""
    absent = [f"{name} is missing at the end" for name in expected if name not in found]
    strange = [f"{name} is left at the end" for name in found if name not in expected and not name.endswith(".damaged")]
    common = [name for name in expected if name in found]
    others = [f"{name} is another at the end" for name in common if not same(expected[name], found[name])]
    return absent + strange + others


def same(a: Any, b: Any) -> bool:
    """Equality bit for bit of nested data with tensors."""
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return torch.equal(a, b) if isinstance(a, Tensor) else bool(a == b)


def _read(path: Path) -> Any:
    if path.suffix == ".ckpt":
        with zipfile.ZipFile(path) as archive:
            if (bad := archive.testzip()) is not None:
                raise ValueError(f"{bad} in it is damaged")
        return torch.load(path, weights_only=True)
    if path.suffix in (".yaml", ".csv") and not path.read_bytes().endswith(b"\n"):
        raise ValueError("its last line is cut")
    if path.suffix == ".json":
        return json.loads(path.read_bytes())
    if path.suffix == ".yaml":
        content = yaml.safe_load(path.read_bytes())
        if "training" not in content:
            raise ValueError("no training in it")
        return content
    if path.suffix == ".png":
        with Image.open(path) as image:
            image.load()
        return None
    if path.suffix == ".csv":
        rows = list(csv.reader(path.read_text().splitlines()))
        if {len(row) for row in rows} != {len(rows[0])}:
            raise ValueError("its rows have different lengths")
    return None
