"""A run's configuration in the form in which it is shared."""

from typing import Any

from latentgnn.configuration.settings import plain_data
from latentgnn.saved import new_record
from latentgnn.tasks.settings import settings_of


def shared_record(config: Any, *, step: int = 0) -> dict[str, Any]:
    """Return the record that is saved beside a trained model's weights, see `latentgnn.saved`.

    Args:
        config: the run's configuration; settings that are locations on this machine are omitted.
        step: number of optimizer steps of the training; 0 if unknown.
    """
    values = plain_data(config)
    for name in settings_of(values["task"]).places:
        group, _, setting = name.partition(".")
        values[group][setting] = None
    return new_record(values["task"], values, step=step)
