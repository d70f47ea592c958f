"""Work that takes long, kept in a folder of results until it is whole, so that the same command goes on with it."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from latentgnn.errors import UserError
from latentgnn.files import is_temporary, write_json

WORK = ".latentgnn-unfinished"
"""The folder in a folder of results that a command keeps unfinished work in."""

_TASK = "task.json"


class Unfinished:
    """The unfinished work in a folder of results.

    Args:
        folder: of the results.
        task: of the command that asks: plain data that its results depend on, all of them; ``None`` for a command that
            does not go on with anything.
        overwrite: begin anew, whatever is there.

    Attributes:
        path: the folder of the work.
        found: whether an earlier command has left such work.
        goes_on: whether the work that is there is the same task's.
        begun: whether this command works on it.

    Raises:
        UserError: there is another task's.
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
        """Make the folder anew, or leave it as it is where the command goes on."""
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
        """The task that work is there of; ``None`` where there is none, or something else has its name."""
        if self.path.is_symlink() or not self.path.is_dir():
            return None
        if any(path.is_symlink() for path in self.path.rglob("*")):
            # What is written through it would be another file.
            return None
        if not (self.path / _TASK).exists():
            # A command that was ended before it had written anything.
            return {} if all(is_temporary(path) for path in self.path.iterdir()) else None
        try:
            return json.loads((self.path / _TASK).read_bytes())
        except ValueError:
            return {}
