"""Programs of this package run in a process of their own, which give their result as JSON on standard output."""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from latentgnn.errors import UserError

ROOT = Path(__file__).resolve().parents[1]
_SHOWN = 2000


def run_child(module: str, arguments: Sequence[str], *, source: Path | None = None) -> dict[str, Any]:
    """Run ``python -m module arguments`` from the repository's root, and read the JSON object that it prints last.

    Args:
        module: a module of this package with a command line.
        arguments: for it.
        source: folder that the library is taken from, before all others.

    Raises:
        UserError: it failed; with the end of what it said.
    """
    command = [sys.executable, "-m", module, *arguments]
    # The root first, so that the package is found wherever this was started from.
    path = os.pathsep.join(filter(None, [str(source or ""), str(ROOT), os.environ.get("PYTHONPATH")]))
    done = subprocess.run(
        command, cwd=ROOT, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, check=False
    )
    if done.returncode != 0:
        said = (done.stderr or done.stdout).strip()[-_SHOWN:]
        raise UserError(f"python -m {module} {' '.join(arguments)} ended with code {done.returncode}:\n{said}")
    result: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return result
