"""State dicts from files, read without running any code in them."""

import warnings
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from latentgnn.errors import UserError, system_error

_WRAPPERS = ("module.", "model.")  # prefixes that DistributedDataParallel and Lightning add to every name

_KEYS = ("state_dict", "model")  # keys under which other programs save a state dict


def read_file(path: Path, setting: str) -> Any:
    """Read a safetensors file, or one that ``torch.load(weights_only=True)`` accepts.

    Raises:
        UserError: if it is neither.
    """
    try:
        if path.suffix == ".safetensors":
            return safetensors.torch.load_file(path)
        with warnings.catch_warnings():
            # PyTorch warns about some kinds of tensors, which are refused below.
            warnings.simplefilter("ignore", UserWarning)
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever the readers raise for other content
        if system_error(error) is not None:
            raise
        raise UserError(
            f"{setting}: cannot read {path} ({type(error).__name__}): expected a safetensors file, or "
            "tensors that torch.load(weights_only=True) accepts"
        ) from error


def state_of(content: Any, path: Path, setting: str) -> dict[str, Tensor]:
    """Return the state dict in the result of `read_file`, with the network's own names.

    Raises:
        UserError: if there is none.
    """
    if isinstance(content, dict):
        content = next((content[key] for key in _KEYS if isinstance(content.get(key), dict)), content)
    if not _is_state(content):
        raise UserError(f"{setting}: {path} holds no state dict, a mapping from names to tensors: {_held(content)}")
    strange = [str(name) for name, value in content.items() if value.layout != torch.strided or value.is_quantized]
    if strange:
        raise UserError(
            f"{setting}: {path} holds sparse or quantized tensors, such as {strange[0]}: save them as plain ones"
        )
    state = {str(name): value for name, value in content.items()}
    for wrapper in _WRAPPERS:
        if all(name.startswith(wrapper) for name in state):
            state = {name.removeprefix(wrapper): value for name, value in state.items()}
    return state


def _is_state(content: Any) -> bool:
    return isinstance(content, dict) and bool(content) and all(isinstance(value, Tensor) for value in content.values())


def _held(content: Any) -> str:
    """Describe what the file has instead of a state dict, and what to do."""
    if not isinstance(content, dict):
        return f"it holds a {type(content).__name__}; save the network's state_dict() with torch.save"
    if not content:
        return "it is empty; save the network's state_dict() with torch.save"
    more = f" and {len(content) - 6} more" if len(content) > 6 else ""
    keys = f"its keys are {', '.join(map(repr, list(content)[:6]))}{more}"
    inside = next((key for key, value in content.items() if _is_state(value)), None)
    if inside is not None:
        return f"{keys}; save what is under {inside!r} to a file of its own with torch.save, and give that"
    other = next(key for key, value in content.items() if not isinstance(value, Tensor))
    return f"{keys}, and {other!r} is no tensor ({type(content[other]).__name__}); save the state_dict() alone"
