"""Files of a run that are read again, with checks of size, depth and structure."""

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from latentgnn.errors import UserError, system_error
from latentgnn.files import reading

# Far larger than anything a run writes: a larger file is not from a run, and could use up memory and time.
LARGEST = 64 * 2**20
_DEEPEST = 32
_MOST = 1_000_000
_INTEGERS = 2**63


class Damaged(UserError):
    """A run's file that does not have the content that was written; the message begins with its path."""


def read_json(path: Path, check: Callable[[Any], None]) -> Any:
    """Return the content of a run's JSON file.

    Args:
        path: the file.
        check: raises `ValueError` if the content has the wrong structure.

    Raises:
        Damaged: if it is not a file, `latentgnn.files.reading.read_json` refuses it, or it has the wrong structure.
        OSError: if the system cannot read it, which is not damage.
    """
    try:
        # Figures may be infinite or NaN.
        value = reading.read_json(path, finite=False, most_bytes=LARGEST)
        check(value)
    except reading.UnreadableError as error:
        if (fault := system_error(error)) is not None:
            raise fault from None
        raise Damaged(f"{path} is damaged ({': '.join(filter(None, (error.place, error.message)))})") from None
    except ValueError as error:
        raise Damaged(f"{path} is damaged ({error})") from None
    return value


def check_plain(value: Any) -> None:
    """Refuse anything but plain data of limited size: strings, numbers, lists, and mappings with either as keys.

    A value that is referenced several times counts each time, as code that walks over the data visits it each time.

    Raises:
        ValueError: if it is something else; the message says what is wrong.
    """
    stack = [(value, 0)]
    seen = 0
    while stack:
        item, depth = stack.pop()
        seen += 1
        if seen > _MOST:
            raise ValueError(f"it holds more than {_MOST:,} values")
        if depth > _DEEPEST:
            raise ValueError("nested too deeply")
        if isinstance(item, dict):
            if not all(isinstance(key, str) or type(key) is int for key in item):
                raise ValueError("expected names or numbers as keys")
            stack += [(inner, depth + 1) for inner in item.values()]
        elif isinstance(item, list | tuple):
            stack += [(inner, depth + 1) for inner in item]
        elif isinstance(item, int):
            if not -_INTEGERS <= item < _INTEGERS:
                raise ValueError("a whole number has more than 64 bits")
        elif item is not None and not isinstance(item, str | float):
            raise ValueError(f"expected plain data, got {type(item).__name__}")


def set_aside(path: Path) -> Path:
    """Rename a damaged file, so that it is not read again and does not take the place of an intact one."""
    aside = path.with_name(f"{path.name}.damaged")
    os.replace(path, aside)
    return aside


def is_step(value: Any) -> bool:
    """Whether a value is a number of optimizer steps."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def check_mapping(value: Any) -> None:
    """Check the structure of ``environment.json``."""
    if not isinstance(value, dict):
        raise ValueError(f"expected a mapping, got {type(value).__name__}")
    if not isinstance(value.get("earlier", []), list):
        raise ValueError("expected a list as 'earlier'")


def check_metrics(value: Any) -> None:
    """Check the structure of ``metrics.json``."""
    if not isinstance(value, dict) or not is_step(value.get("step")) or not _are_metrics(value.get("metrics")):
        raise ValueError("expected 'step' and 'metrics'")


def check_validations(value: Any) -> None:
    """Check the structure of ``validations.json``."""
    if not isinstance(value, list):
        raise ValueError(f"expected a list of validations, got {type(value).__name__}")
    for record in value:
        sound = (
            isinstance(record, dict)
            and is_step(record.get("step"))
            and isinstance(record.get("best"), bool)
            and _are_metrics(record.get("metrics"))
        )
        if not sound:
            raise ValueError("expected 'step', 'best' and 'metrics' in each validation")
    steps = [record["step"] for record in value]
    if steps != sorted(set(steps)):
        raise ValueError("expected validations in the order of their steps")


def best_validation(validations: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    """Return the validation that wrote the best checkpoint, if there is one."""
    return next((record for record in reversed(validations) if record["best"]), None)


def check_start(value: Any) -> None:
    """Check the structure of ``start.json``."""
    names = value.get("trained") if isinstance(value, dict) else None
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ValueError("expected a list of names as 'trained'")


def _are_metrics(value: Any) -> bool:
    return isinstance(value, dict) and all(
        isinstance(number, int | float) and not isinstance(number, bool) for number in value.values()
    )
