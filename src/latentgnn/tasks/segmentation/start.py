"""A segmenter starts from the weights of another run: what fits is taken over, the rest starts anew."""

from pathlib import Path

from torch import nn

from latentgnn.tasks.classes import class_names
from latentgnn.tasks.segmentation.config import SegmentationConfig
from latentgnn.tasks.segmentation.model import last_layers
from latentgnn.tasks.starting import SETTING, Start, own_weights, taken_parameters
from latentgnn.tasks.weights import Rows, fit_lines, fit_weights
from latentgnn.training.optimization import blocks_of


def start_from(model: nn.Module, config: SegmentationConfig) -> Start:
    """Load ``config.model.weights`` into a freshly built network.

    The last layers take over the rows of classes of the same name. A block is taken over whole or starts anew.

    Args:
        model: from `latentgnn.tasks.segmentation.model.build_segmenter`.
        config: its run, with the classes that the data have.

    Raises:
        UserError: there is no such run or checkpoint, or nothing of it fits.
    """
    path = Path(str(config.model.weights)).expanduser()
    checkpoint, there = own_weights(path, config.task, SegmentationConfig, "a segmenter of images")
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
