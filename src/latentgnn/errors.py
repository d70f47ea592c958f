"""Errors that are the user's to mend, and the check for optional packages."""

import importlib
from types import ModuleType


class UserError(Exception):
    """A mistake in data, configuration or set-up; its message says what came, what was expected and what to do."""


def require(module: str, *, extra: str) -> ModuleType:
    """Import an optional package, or say which extra brings it.

    Args:
        module: name of the package to import.
        extra: the extra of latentgnn that installs it.

    Raises:
        UserError: the package is not installed.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.split(".")[0] != module.split(".")[0]:
            raise
        raise UserError(f"this needs {module!r}, which is not installed: pip install 'latentgnn[{extra}]'") from None
