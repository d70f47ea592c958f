"""Initialises a segmenter from another run's weights: loads what fits and keeps the fresh rest."""

from pathlib import Path

from torch import nn

from latentgnn.blocks import blocks_of
from latentgnn.tasks.classes import class_names
from latentgnn.tasks.segmentation.config import SegmentationConfig
from latentgnn.tasks.segmentation.model import last_layers
from latentgnn.tasks.starting import SETTING, Start, own_weights, taken_parameters
from latentgnn.tasks.weights import Rows, fit_lines, fit_weights


def start_from(model: nn.Module, config: SegmentationConfig) -> Start:
    """Load ``config.model.weights`` into a freshly built network.

    The last layers load the rows of classes with the same name. A block is loaded whole or not at all.

    Args:
        model: from `latentgnn.tasks.segmentation.model.build_segmenter`.
        config: its run's configuration, with the classes of the data.

    Raises:
        UserError: if there is no such run or checkpoint, or none of its weights fit.
    """
    path = Path(str(config.model.weights)).expanduser()
    checkpoint, there = own_weights(path, config.task, SegmentationConfig)
    old, new = class_names(there.data.classes), class_names(config.data.classes)
    rows = Rows(pairs=[(place, old.index(name)) for place, name in enumerate(new) if name in old])
    source = str(checkpoint.path)
    blocks = blocks_of(model)
    fit = fit_weights(
        checkpoint.weights,
        model.state_dict(),
        source=f"{SETTING}: {source}",
        rows={f"{layer}.{part}": rows for layer in last_layers(model) for part in ("weight", "bias")},
        together=blocks,
    )
    model.load_state_dict(fit.state)
    return Start(lines=tuple(fit_lines(fit, source)), trained=taken_parameters(model, fit))
