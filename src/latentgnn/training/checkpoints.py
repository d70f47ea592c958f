"""Checkpoints: one file each, written completely or not at all, and read without running any code in it."""

import io
from dataclasses import dataclass, field
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from torch import Tensor, nn

from latentgnn.errors import UserError, concerning
from latentgnn.files import write_bytes


def write_checkpoint(path: Path | str, content: dict[str, Any]) -> None:
    """Write a checkpoint; a crash in the middle leaves the file before it intact.

    Args:
        path: the file.
        content: ``latentgnn`` with ``step``, ``config`` and ``course``; ``state_dict``, the model's weights under the
            model's own names; ``optimizer``, its state dict; ``precision``, that of the scaling of losses.
    """
    buffer = io.BytesIO()
    torch.save(content, buffer)
    write_bytes(path, buffer.getvalue())


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A checkpoint as it is read for resuming, evaluation and prediction.

    Args:
        step: optimizer steps done.
        config: the run's resolved configuration.
        course: what a run that continues it must agree on.
        weights: the model's state dict, under the model's own names.
        optimizer: the optimizer's state dict.
        precision: the state of mixed precision's scaling; empty where nothing is scaled.
    """

    step: int
    config: dict[str, Any]
    course: dict[str, Any]
    weights: dict[str, Tensor]
    optimizer: dict[str, Any]
    precision: dict[str, Any] = field(default_factory=dict)

    def load_into(self, model: nn.Module) -> None:
        """Copy the weights into a model.

        Raises:
            UserError: the model's names or shapes are others.
        """
        check_weights(self.weights, model, "the checkpoint")
        model.load_state_dict(self.weights)


def read_checkpoint(path: Path | str) -> Checkpoint:
    """Read a checkpoint that training wrote.

    Args:
        path: the file, such as ``checkpoints/best.ckpt`` in a run folder.

    Raises:
        UserError: there is no such file, or it is damaged or something else.
    """
    path = Path(path)
    content = _load(path)
    try:
        record = content["latentgnn"]
        return Checkpoint(
            step=record["step"],
            config=record["config"],
            course=record["course"],
            weights=dict(content["state_dict"]),
            optimizer=content["optimizer"],
            precision=content.get("precision", {}),
        )
    except (KeyError, TypeError, ValueError, AttributeError):
        raise UserError(f"{path} is no checkpoint of a latentgnn training run") from None


def check_weights(weights: dict[str, Tensor], model: nn.Module, source: str) -> None:
    """Compare names and shapes of weights with a model's.

    Raises:
        UserError: naming what is missing, unexpected or of another shape.
    """
    wanted = model.state_dict()
    faults = {
        "missing": [name for name in wanted if name not in weights],
        "unexpected": [name for name in weights if name not in wanted],
        "of another shape": [
            f"{name} {tuple(weights[name].shape)} instead of {tuple(value.shape)}"
            for name, value in wanted.items()
            if name in weights and weights[name].shape != value.shape
        ],
    }
    if any(faults.values()):
        listed = "; ".join(
            f"{len(names)} {kind}: {', '.join(names[:5])}{', ...' if len(names) > 5 else ''}"
            for kind, names in faults.items()
            if names
        )
        raise UserError(f"{source} does not fit the model ({listed}): build the model with the checkpoint's config")


def _load(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise UserError(f"there is no checkpoint {path}")
    try:
        with concerning(path):
            content: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    except (UnpicklingError, LookupError, RuntimeError, EOFError, TypeError, ValueError, AttributeError) as error:
        raise UserError(f"{path} cannot be read as a checkpoint: {str(error).splitlines()[0]}") from error
    return content
