"""State dicts from files, read without running any code in them."""

import warnings
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from latentgnn.errors import UserError, system_error

_WRAPPERS = ("module.", "model.")  # what DistributedDataParallel and Lightning put before every name


def read_file(path: Path, setting: str) -> Any:
    """What a safetensors file holds, or one that ``torch.load(weights_only=True)`` reads.

    Raises:
        UserError: it is neither.
    """
    try:
        if path.suffix == ".safetensors":
            return safetensors.torch.load_file(path)
        with warnings.catch_warnings():
            # PyTorch warns of kinds of tensors that are refused below.
            warnings.simplefilter("ignore")
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever the readers raise on bytes that are no such file
        if system_error(error) is not None:
            raise
        raise UserError(
            f"{setting}: cannot read {path} ({type(error).__name__}): expected a safetensors file, or "
            "tensors that torch.load(weights_only=True) accepts"
        ) from error


def state_of(content: Any, path: Path, setting: str) -> dict[str, Tensor]:
    """The state dict in what `read_file` gave, under the names that its network knows.

    Raises:
        UserError: there is none.
    """
    if isinstance(content, dict):
        content = next((content[key] for key in ("state_dict", "model") if isinstance(content.get(key), dict)), content)
    if not isinstance(content, dict) or not content or not all(isinstance(value, Tensor) for value in content.values()):
        raise UserError(f"{setting}: {path} holds no state dict: a mapping from names to tensors")
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
