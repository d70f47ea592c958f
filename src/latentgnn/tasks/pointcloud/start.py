"""Initialises a point network from another run's weights: loads what fits and keeps the fresh rest."""

from collections.abc import Sequence
from pathlib import Path

from latentgnn.blocks import blocks_of
from latentgnn.errors import UserError
from latentgnn.tasks.classes import class_names
from latentgnn.tasks.pointcloud.config import PointCloudConfig
from latentgnn.tasks.pointcloud.features import feature_columns
from latentgnn.tasks.pointcloud.model import PointNetwork
from latentgnn.tasks.starting import SETTING, Start, own_weights, shown_setting, taken_parameters
from latentgnn.tasks.weights import Rows, fit_lines, fit_weights

# If these settings differ, the weights fit but see different data.
_SILENT = ("model.grids", "model.neighbors", "data.voxel", "data.height_radius")


def start_from(model: PointNetwork, config: PointCloudConfig) -> Start:
    """Load ``config.model.weights`` into a freshly built network.

    The classifier loads the rows of classes with the same name, and the first layer the columns of features with the
    same name. A block is loaded whole or not at all.

    Args:
        model: from `latentgnn.tasks.pointcloud.model.build_point_network`.
        config: its run's configuration, with the classes and features of the data.

    Raises:
        UserError: if there is no such run or checkpoint, or its network has other widths.
    """
    path = Path(str(config.model.weights)).expanduser()
    checkpoint, there = own_weights(path, config.task, PointCloudConfig)
    if there.model.widths != config.model.widths:
        raise UserError(
            f"{SETTING}: the network in {checkpoint.path} has the widths {list(there.model.widths)}, this one "
            f"{list(config.model.widths)}; take --model.widths '{list(there.model.widths)}'"
        )
    old_classes, classes = class_names(there.data.classes), class_names(config.data.classes)
    # The last column is the height above a crop's lowest point, which every network has.
    old_columns, columns = ((*feature_columns(data.features), "") for data in (there.data, config.data))
    rows = {f"{model.classifier}.{part}": _same(old_classes, classes) for part in ("weight", "bias")}
    rows |= {f"scale.{part}": _same(old_columns, columns) for part in ("weight", "bias", "running_mean", "running_var")}
    rows["encoder.0.abstraction.features.weight"] = _same(old_columns, columns, dim=1)
    source = str(checkpoint.path)
    blocks = blocks_of(model)
    fit = fit_weights(checkpoint.weights, model.state_dict(), source=f"{SETTING}: {source}", rows=rows, together=blocks)
    model.load_state_dict(fit.state)
    lines = [
        *fit_lines(fit, source),
        *_compared("classes", old_classes, classes),
        *_compared("features", old_columns[:-1], columns[:-1]),
        *_differences(there, config),
    ]
    return Start(lines=tuple(lines), trained=taken_parameters(model, fit))


def _same(there: Sequence[str], here: Sequence[str], *, dim: int = 0) -> Rows:
    pairs = [(place, there.index(name)) for place, name in enumerate(here) if name in there]
    return Rows(pairs=pairs, dim=dim)


def _compared(what: str, there: Sequence[str], here: Sequence[str]) -> list[str]:
    """A line about names that are not the same in both."""
    if set(there) == set(here):
        return []
    groups = {
        "taken over": [name for name in here if name in there],
        "new": [name for name in here if name not in there],
        "left out": [name for name in there if name not in here],
    }
    return [f"  {what}: " + "; ".join(f"{title}: {', '.join(names)}" for title, names in groups.items() if names)]


def _differences(there: PointCloudConfig, here: PointCloudConfig) -> list[str]:
    """A line about settings whose difference makes the weights see different data."""
    found = []
    for setting in _SILENT:
        group, name = setting.split(".")
        old, new = (getattr(getattr(config, group), name) for config in (there, here))
        if old != new and (name != "height_radius" or "height" in there.data.features):
            found.append(f"{setting} {shown_setting(old)} (here {shown_setting(new)})")
    return [f"  note: trained with {', '.join(found)}"] if found else []
