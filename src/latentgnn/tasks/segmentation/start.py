"""A segmenter starts from the weights of another run: what fits is taken over, the rest starts anew."""

from pathlib import Path

from torch import nn

from latentgnn.configuration.settings import parse_config
from latentgnn.errors import UserError
from latentgnn.tasks.classes import class_names
from latentgnn.tasks.segmentation.config import SegmentationConfig
from latentgnn.tasks.segmentation.model import last_layers
from latentgnn.tasks.weights import Rows, Start, fit_lines, fit_weights
from latentgnn.training.commands import trained_weights
from latentgnn.training.optimization import blocks_of

_SETTING = "model.weights"


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
    if not path.exists():
        raise UserError(f"{_SETTING}: there is no run folder or checkpoint {path}")
    try:
        checkpoint = trained_weights(path)
        task = checkpoint.config.get("task", "detection")
        if task != "segmentation":
            raise UserError(f"{checkpoint.path} is of the task {task!r}, and this is a segmenter of images")
        there = parse_config(SegmentationConfig, checkpoint.config, recorded=True)
    except UserError as error:
        raise UserError(f"{_SETTING}: {error}") from error
    old, new = class_names(there.data.classes), class_names(config.data.classes)
    rows = Rows(pairs=[(place, old.index(name)) for place, name in enumerate(new) if name in old])
    source = str(checkpoint.path)
    blocks = blocks_of(model)
    fit = fit_weights(
        checkpoint.weights,
        model.state_dict(),
        source=f"{_SETTING}: {source}",
        rows={f"{layer}.{part}": rows for layer in last_layers(model) for part in ("weight", "bias")},
        together=blocks,
    )
    model.load_state_dict(fit.state)
    in_blocks = tuple(f"{name}." for name in blocks)
    learning = {name for name, _ in model.named_parameters() if not name.startswith(in_blocks)}
    return Start(lines=tuple(fit_lines(fit, source)), trained=frozenset(learning & set(fit.taken)))
