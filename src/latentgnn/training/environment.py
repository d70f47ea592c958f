"""The environment of a run: versions, hardware, commit, command."""

import os
import platform
import subprocess
import sys
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

_PACKAGES = (
    *("latentgnn", "torch", "torchvision", "timm", "lightning", "numpy", "safetensors", "faster-coco-eval"),
    *("scipy", "trimesh", "laspy"),
)


def environment() -> dict[str, Any]:
    """Return versions, hardware, commit, command and date as plain data."""
    # Imports torch, which the command line delays until a command needs it.
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


def _versions() -> dict[str, str]:
    versions = {}
    for package in _PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    return versions


def _commit() -> dict[str, Any] | None:
    """The commit of latentgnn's source and whether files differ from it; ``None`` without version control."""

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
