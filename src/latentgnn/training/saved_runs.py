"""The configuration of a run in the record of a saved model, see `latentgnn.saved`."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from latentgnn.errors import UserError
from latentgnn.training.run_files import check_plain, is_step


def config_of(record: Mapping[str, Any], source: Path) -> dict[str, Any]:
    """Return the run's configuration from the record of a saved model.

    Raises:
        UserError: if the record is of something else.
    """
    config: dict[str, Any] = _with_numbers(record["config"])
    if config.get("task") != record["kind"] or not is_step(record.get("step", 0)):
        raise UserError(f"{source} contains a model of kind {record['kind']!r}, not the model of a training run")
    try:
        check_plain(config)
    except ValueError as error:
        raise UserError(f"{source}: its configuration is no run's ({error})") from None
    return config


def _with_numbers(value: Any) -> Any:
    """Convert keys that look like whole numbers back to integers, as JSON only has string keys."""
    if isinstance(value, dict):
        # Longer ones are not class ids, and Python refuses to parse thousands of digits.
        return {
            int(key) if key.isdecimal() and len(key) < 19 else key: _with_numbers(item) for key, item in value.items()
        }
    return [_with_numbers(item) for item in value] if isinstance(value, list) else value
