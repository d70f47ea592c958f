"""Unfinished long work, kept in a folder of results until it is complete, so that the same command can continue it."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from latentgnn.errors import UserError
from latentgnn.files.writing import is_temporary, write_json

WORK = ".latentgnn-unfinished"
"""The folder for unfinished work in a folder of results."""

_TASK = "task.json"


class Unfinished:
    """The unfinished work in a folder of results.

    Args:
        folder: the folder of results.
        task: description of the command's task: plain data with everything that its results depend on; ``None`` for a
            command that cannot continue.
        overwrite: start again, whatever is there.

    Attributes:
        path: the folder of the work.
        found: whether an earlier command has left unfinished work.
        goes_on: whether that work belongs to the same task.
        begun: whether this command works on it.

    Raises:
        UserError: if there is unfinished work of another task.
    """

    def __init__(self, folder: Path, task: Mapping[str, Any] | None, *, overwrite: bool) -> None:
        self.path = folder / WORK
        self.begun = False
        self._task = task
        known = self._known()
        self.found = known is not None
        self.goes_on = task is not None and not overwrite and known == json.loads(json.dumps(task))
        if self.found and not self.goes_on and not overwrite:
            raise UserError(
                f"{folder} holds unfinished work of an earlier command: give that command again to go on, begin anew "
                "with --overwrite, or name another folder with --out"
            )

    def begin(self) -> None:
        """Create the folder, or keep it unchanged if the command continues."""
        assert self._task is not None
        if not self.goes_on:
            self.remove()
            self.path.mkdir()
            write_json(self.path / _TASK, self._task)
        self.begun = True

    def remove(self) -> None:
        """Remove the work, if it is there."""
        if self._known() is not None:
            shutil.rmtree(self.path)

    def _known(self) -> Any:
        """The task of the existing work; ``None`` if there is none, or something else has its name."""
        if self.path.is_symlink() or not self.path.is_dir():
            return None
        if any(path.is_symlink() for path in self.path.rglob("*")):
            # A link, through which other files would be written.
            return None
        if not (self.path / _TASK).exists():
            # A command that was interrupted before it had written anything.
            return {} if all(is_temporary(path) for path in self.path.iterdir()) else None
        try:
            return json.loads((self.path / _TASK).read_bytes())
        except ValueError:
            return {}
