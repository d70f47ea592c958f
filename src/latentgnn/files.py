"""Files that are complete or absent: written under a temporary name, then renamed."""

import json
import os
from pathlib import Path
from typing import Any

from latentgnn.errors import concerning


def write_bytes(path: Path | str, data: bytes) -> None:
    """Write a whole file in one step, with the folders above it."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # One temporary name a process: several processes of a run may write side by side.
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with concerning(path), temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        with concerning(path):
            temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: Path | str, text: str) -> None:
    """`write_bytes` of UTF-8 text."""
    write_bytes(path, text.encode())


def write_json(path: Path | str, value: Any) -> None:
    """`write_bytes` of indented JSON."""
    write_text(path, json.dumps(value, indent=2) + "\n")
