"""Weights of a classifier for the body of a detector's backbone."""

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor, nn

from latentgnn.errors import UserError
from latentgnn.tasks.detection.weights.files import read_file, state_of

SETTING = "model.weights_backbone"
OTHERWISE = "give a file of weights, or start without: --model.weights_backbone null"


def read_classifier(name: str, backbone: str, published: str) -> Mapping[str, Tensor]:
    """Return the state dict in the file that ``model.weights_backbone`` names.

    Args:
        name: value of the setting.
        backbone: name of the backbone, for the error.
        published: names of its published weights, for the error.

    Raises:
        UserError: if there is no such file, or it does not contain a state dict, or that of a whole detector.
    """
    path = Path(name).expanduser()
    if not path.is_file():
        raise UserError(
            f"{SETTING}: {name!r} is no file and none of the published weights of "
            f"{backbone!r} ({published}); null starts without"
        )
    state = state_of(read_file(path, SETTING), path, SETTING)
    if any(key.startswith(("backbone.body.", "backbone.bottom_up.")) for key in state):
        raise UserError(
            f"{SETTING}: {path} holds a whole detector and not a classifier; give it as --model.weights {path}"
        )
    return state


def load_body(body: nn.Module, weights: Mapping[str, Tensor], *, name: str, backbone: str, norm: str) -> None:
    """Load the weights of a classifier into its body; those of its last layers are omitted.

    Args:
        body: the network without its last layers.
        weights: weights of the whole network.
        name: name of the weights, for the error.
        backbone: name of the backbone, for the error.
        norm: name of the norm, for the error.

    Raises:
        UserError: if they do not fit.
    """
    children = {child for child, _ in body.named_children()}
    own = {}
    for key, value in weights.items():
        # Torchvision's MobileNet keeps its stages in `features`, which a detector's body is made of.
        key = key.removeprefix("features.")
        first, _, rest = key.partition(".")
        second, _, tail = rest.partition(".")
        if first in ("fc", "head", "classifier"):
            continue
        # timm renames a.b to a_b when it splits a network.
        own[f"{first}_{second}.{tail}" if f"{first}_{second}" in children else key] = value
    expected = body.state_dict()
    # Frozen norms have no such counter, nor do weights published before 2018.
    counters = {key for key in (*expected, *own) if key.endswith("num_batches_tracked")}
    faults = [f"{key} is missing" for key in expected if key not in own and key not in counters]
    faults += [f"{key} is unexpected" for key in own if key not in expected and key not in counters]
    faults += [
        f"{key} has shape {tuple(own[key].shape)}, expected {tuple(value.shape)}"
        for key, value in expected.items()
        if key in own and own[key].shape != value.shape
    ]
    if faults:
        more = f" and {len(faults) - 5} more" if len(faults) > 5 else ""
        raise UserError(
            f"{SETTING}: {name!r} does not fit {backbone!r} with norm {norm!r}: {'; '.join(faults[:5])}{more}"
        )
    body.load_state_dict(own, strict=False)
