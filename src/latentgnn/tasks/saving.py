"""A run's configuration as it is given to others."""

from typing import Any

from latentgnn.configuration.settings import plain_data
from latentgnn.saved import new_record
from latentgnn.tasks.settings import settings_of


def shared_record(config: Any, *, step: int = 0) -> dict[str, Any]:
    """The record that is saved beside a trained model's weights, see `latentgnn.saved`.

    Args:
        config: the run's; settings that say where something lies on this machine are left out.
        step: optimizer steps that the weights have seen; 0 where that is unknown.
    """
    values = plain_data(config)
    for name in settings_of(values["task"]).places:
        group, _, setting = name.partition(".")
        values[group][setting] = None
    return new_record(values["task"], values, step=step)
