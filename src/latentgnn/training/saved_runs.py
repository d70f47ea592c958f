"""The configuration of a run in the record of a saved model, see `latentgnn.saved`."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from latentgnn.errors import UserError
from latentgnn.training.run_files import check_plain, is_step


def config_of(record: Mapping[str, Any], source: Path) -> dict[str, Any]:
    """The run's configuration in the record of a saved model.

    Raises:
        UserError: it is a record of something else.
    """
    config: dict[str, Any] = _with_numbers(record["config"])
    if config.get("task") != record["kind"] or not is_step(record.get("step", 0)):
        raise UserError(f"{source} holds a model of the kind {record['kind']!r}, and no trained run's")
    try:
        check_plain(config)
    except ValueError as error:
        raise UserError(f"{source}: its configuration is no run's ({error})") from None
    return config


def _with_numbers(value: Any) -> Any:
    """JSON has texts as keys alone; those of a run's configuration that look like whole numbers are numbers."""
    if isinstance(value, dict):
        # Longer ones are no class's id, and Python takes thousands of digits for no number at all.
        return {
            int(key) if key.isdecimal() and len(key) < 19 else key: _with_numbers(item) for key, item in value.items()
        }
    return [_with_numbers(item) for item in value] if isinstance(value, list) else value
