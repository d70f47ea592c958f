"""The folder that a run writes: its configuration, its environment, its results."""

import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Mapping
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal

from latentgnn.configuration.recipes import load_recipe, to_yaml
from latentgnn.configuration.settings import plain_data
from latentgnn.errors import UserError
from latentgnn.files import write_json, write_text

_PACKAGES = (
    *("latentgnn", "torch", "torchvision", "timm", "lightning", "numpy", "safetensors", "faster-coco-eval"),
    *("scipy", "trimesh", "laspy"),
)
# Processes that Lightning starts for further devices run the same command, and find the first one's folder by it.
_INHERITED = "LATENTGNN_RUN"


class RunFolder:
    """One folder a run.

    ``config.yaml`` (resolved), ``environment.json``, ``log.txt``, ``metrics.csv`` (the course), ``validations.json``,
    ``metrics.json`` (the end), ``tensorboard/``, ``checkpoints/`` and ``pictures/``. Made by ``create`` or ``open``.
    Only the first process of a run writes into it; elsewhere the ``write_`` methods do nothing.

    Args:
        path: the folder.
        config: the resolved configuration, as plain data.
    """

    def __init__(self, path: Path, config: Mapping[str, Any] | None = None) -> None:
        self.path = path
        self.config: dict[str, Any] = dict(config or {})
        self.writes = is_first_process()

    @classmethod
    def create(cls, path: Path | str | None = None, *, task: str) -> "RunFolder":
        """A new run.

        Args:
            path: the folder, new or empty; ``None`` makes ``runs/<task>-<date>-<time>``.
            task: the first part of the folder's name.

        Raises:
            UserError: the folder holds something already.
        """
        if not is_first_process():
            shared = os.environ.get(_INHERITED) if path is None else path
            if shared is None:
                raise UserError("a run of several separately started processes needs a run folder that is named")
            return cls(Path(shared))
        if path is None:
            path = _new_name(task)
            os.environ[_INHERITED] = str(path)
        path = Path(path)
        if path.exists() and not path.is_dir():
            raise UserError(f"the run folder {path} is a file: name another")
        if path.is_dir() and any(path.iterdir()):
            if (path / "config.yaml").exists():
                raise UserError(f"{path} holds a run already: resume it, or name another folder")
            raise UserError(f"{path} is not empty and holds no run: name a new or an empty folder")
        path.mkdir(parents=True, exist_ok=True)
        return cls(path)

    @classmethod
    def open(cls, path: Path | str) -> "RunFolder":
        """The run in an existing folder.

        Raises:
            UserError: there is none.
        """
        path = Path(path)
        if not path.is_dir():
            raise UserError(f"there is no run folder {path}")
        file = path / "config.yaml"
        if not file.is_file():
            raise UserError(f"{path} is not a run's folder: it has no config.yaml")
        return cls(path, load_recipe(file.resolve()))

    def checkpoint(self, name: Literal["last", "best"]) -> Path:
        """The file of the last or the best checkpoint, there or not."""
        return self.path / "checkpoints" / f"{name}.ckpt"

    @property
    def pictures(self) -> Path:
        """The folder for sample pictures."""
        return self.path / "pictures"

    @property
    def log(self) -> Path:
        """The file that takes the lines that a person sees."""
        return self.path / "log.txt"

    def write_config(self, config: Mapping[str, Any]) -> None:
        """Keep the resolved configuration, here and in ``config.yaml``; dataclasses and tuples become plain data."""
        self.config = plain_data(config)
        if self.writes:
            write_text(self.path / "config.yaml", to_yaml(self.config))

    def write_environment(self) -> None:
        """Write versions, hardware, commit and command; those of earlier starts of the same run stay in ``earlier``."""
        if not self.writes:
            return
        file = self.path / "environment.json"
        record = environment()
        if file.exists():
            before = json.loads(file.read_text())
            record["earlier"] = [*before.pop("earlier", []), before]
        write_json(file, record)

    def write_metrics(self, content: Mapping[str, Any]) -> None:
        """Write ``metrics.json``, which marks a run as finished."""
        if self.writes:
            write_json(self.path / "metrics.json", content)

    def metrics(self) -> dict[str, Any] | None:
        """What ``metrics.json`` holds, or ``None`` while the run is not finished."""
        return self._read("metrics.json")

    def validations(self) -> list[dict[str, Any]]:
        """The validations so far: step, metrics, and whether the best checkpoint was written there."""
        return self._read("validations.json") or []

    def write_validations(self, validations: list[dict[str, Any]]) -> None:
        """Write ``validations.json``."""
        if self.writes:
            write_json(self.path / "validations.json", validations)

    def _read(self, name: str) -> Any:
        file = self.path / name
        if not file.exists():
            return None
        try:
            return json.loads(file.read_text())
        except ValueError as error:
            raise UserError(f"{file} is not valid JSON: {error}") from None


def is_first_process() -> bool:
    """Whether this is the only or the first process of a run, by what launchers put into the environment."""
    # torchrun sets RANK, Slurm SLURM_PROCID, and Lightning's own launcher NODE_RANK and LOCAL_RANK.
    for name in ("RANK", "SLURM_PROCID"):
        if name in os.environ:
            return os.environ[name] == "0"
    return os.environ.get("NODE_RANK", "0") == "0" and os.environ.get("LOCAL_RANK", "0") == "0"


def environment() -> dict[str, Any]:
    """Versions, hardware, commit, command and date, as plain data."""
    # Imports torch, which the command line does not do before a command needs it.
    from latentgnn.machine import processor_name

    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": sys.argv,
        "folder": os.getcwd(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": _versions(),
        "commit": _commit(),
        "cpu": {"model": processor_name(), "cores": os.cpu_count(), "usable_cores": _usable_cores()},
        "memory_bytes": _memory(),
        "gpus": _gpus(),
    }


def _new_name(task: str) -> Path:
    base = f"{task}-{time.strftime('%Y%m%d-%H%M%S')}"
    path, number = Path("runs") / base, 2
    while path.exists():
        path, number = Path("runs") / f"{base}-{number}", number + 1
    return path


def _versions() -> dict[str, str]:
    versions = {}
    for package in _PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    return versions


def _commit() -> dict[str, Any] | None:
    """The commit of latentgnn's source and whether that is changed; ``None`` if it is not under version control."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(Path(__file__).parent), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()

    try:
        # An installed copy may lie inside another repository, whose commit would be misleading.
        git("ls-files", "--error-unmatch", __file__)
        return {"id": git("rev-parse", "HEAD"), "modified": bool(git("status", "--porcelain", "--", "../.."))}
    except (OSError, subprocess.SubprocessError):
        return None


def _usable_cores() -> int | None:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def _memory() -> int | None:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return None


def _gpus() -> list[dict[str, Any]]:
    import torch

    if not torch.cuda.is_available():
        return []
    devices = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
    return [{"name": device.name, "memory_bytes": device.total_memory} for device in devices]
