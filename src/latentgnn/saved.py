"""Models as data, as on the Hugging Face hub: ``config.json`` and ``model.safetensors`` in one folder.

The weights file also contains the configuration, so that it is complete on its own. Nothing here runs code from a file,
and the network is only used through `latentgnn.hub`, on request.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar

import safetensors
import safetensors.torch
from torch import Tensor, nn

from latentgnn.config import LatentGNNConfig
from latentgnn.errors import UserError, first_line, system_error
from latentgnn.files.reading import parse_json, read_json, regular_file
from latentgnn.files.writing import write_bytes
from latentgnn.hub import CONFIG, WEIGHTS, find

CARD = "README.md"
"""The description of a saved model, which the hub shows."""

_RECORD = "latentgnn"  # the record's name in the metadata of a safetensors file
_MOST_BYTES = 2**24  # maximum size of a record

L = TypeVar("L", bound=nn.Module)


@dataclass(frozen=True, kw_only=True)
class Saved:
    """A saved model, as read from disk.

    Args:
        path: path of its weights file.
        record: ``kind``, the name of its class or task; ``config``, its configuration; and anything else known about
            it.
        weights: its state dict.
    """

    path: Path
    record: dict[str, Any]
    weights: dict[str, Tensor]

    @property
    def kind(self) -> str:
        """The name of its class or task."""
        return str(self.record["kind"])

    @property
    def config(self) -> dict[str, Any]:
        """Its configuration."""
        config: dict[str, Any] = self.record["config"]
        return config


def new_record(kind: str, config: Mapping[str, Any], **others: Any) -> dict[str, Any]:
    """Return the record that is saved beside the weights."""
    return {"library_name": _RECORD, "version": version("latentgnn"), "kind": kind, **others, "config": dict(config)}


def files_of(record: Mapping[str, Any], weights: Mapping[str, Tensor], card: str | None = None) -> dict[str, bytes]:
    """Return the files of a saved model by name.

    Args:
        record: see `new_record`.
        weights: the state dict.
        card: the text of its ``README.md``.
    """
    text = json.dumps(record, indent=2, ensure_ascii=False)
    plain = {name: value.detach().cpu().contiguous() for name, value in weights.items()}
    files = {
        WEIGHTS: safetensors.torch.save(plain, metadata={"format": "pt", _RECORD: json.dumps(record)}),
        CONFIG: f"{text}\n".encode(),
    }
    return files | ({} if card is None else {CARD: card.encode()})


def save_folder(folder: Path | str, files: Mapping[str, bytes], *, overwrite: bool = False) -> None:
    """Write the files of a saved model, each in one step, the configuration last.

    Args:
        folder: the folder, created if needed; other files in it are kept.
        files: see `files_of`.
        overwrite: replace files of these names.

    Raises:
        UserError: if such files exist and may not be replaced.
    """
    folder = Path(folder)
    there = [name for name in files if (folder / name).exists()]
    if there and not overwrite:
        raise UserError(f"{folder} has {' and '.join(there)} already: name another folder, or say overwrite=True")
    for name, data in files.items():
        write_bytes(folder / name, data)


def is_saved(path: Path) -> bool:
    """Whether a path is a saved model: a folder, or a weights file that contains its configuration."""
    if path.is_dir():
        return (path / WEIGHTS).is_file() and (path / CONFIG).is_file()
    if path.suffix != ".safetensors" or not path.is_file():
        return False
    return _RECORD in _metadata(path)


def read_record(source: Path | str) -> dict[str, Any]:
    """Return the record of a saved model; for a folder, it is ``config.json``, which may have been edited.

    Raises:
        UserError: if there is none, or it is something else.
    """
    path = Path(source)
    if path.is_dir():
        place = path / CONFIG
        missing = [name for name in (CONFIG, WEIGHTS) if not (path / name).is_file()]
        if missing:
            raise UserError(f"{path} holds no saved model: it has no {' and no '.join(missing)}")
        record = read_json(place, "configuration", most_bytes=_MOST_BYTES)
    else:
        place = path
        metadata = _metadata(path)
        if _RECORD not in metadata:
            raise UserError(
                f"{path} has no configuration of latentgnn inside: give the folder with its {CONFIG}, or a file that "
                "save_pretrained or `latentgnn export --to safetensors` wrote"
            )
        record = parse_json(metadata[_RECORD], path)
    sound = isinstance(record, dict) and isinstance(record.get("config"), dict) and isinstance(record.get("kind"), str)
    if not sound:
        raise UserError(f"{place}: expected an object with 'kind' and 'config', as save_pretrained writes it")
    return record


def read_saved(source: Path | str) -> Saved:
    """Read a saved model from a folder or from a weights file with its configuration; never from the network.

    Raises:
        UserError: if there is none, or it is damaged.
    """
    path = Path(source)
    if not path.exists():
        raise UserError(
            f"there is no folder or file {path}; a model of the Hugging Face hub is taken with from_hub=True"
        )
    record = read_record(path)
    file = path / WEIGHTS if path.is_dir() else path
    try:
        weights = safetensors.torch.load_file(file)
    except Exception as error:  # OSError, or the reader's own errors for other content
        raise _unreadable(file, error) from error
    return Saved(path=file, record=record, weights=weights)


def save_layer(layer: nn.Module, folder: Path | str, *, overwrite: bool = False) -> None:
    """See `latentgnn.LatentGNN.save_pretrained`."""
    config: Any = layer.config
    record = new_record(type(layer).__name__, config.to_dict())
    save_folder(folder, files_of(record, layer.state_dict()), overwrite=overwrite)


def load_layer(layer_class: type[L], source: Path | str, *, from_hub: bool, revision: str | None) -> L:
    """See `latentgnn.LatentGNN.from_pretrained`."""
    saved = read_saved(find(source, from_hub=from_hub, revision=revision))
    name = layer_class.__name__
    if saved.kind != name:
        other = f"{saved.kind}.from_pretrained" if saved.kind.endswith("LatentGNN") else "latentgnn.load_run"
        raise UserError(f"{source} holds a model of the kind {saved.kind!r} and no {name}: load it with {other}")
    types = {value.dtype for value in saved.weights.values() if value.is_floating_point()}
    constructor: Any = layer_class
    try:
        # The layer is created without memory, and uses the tensors that were read.
        layer: L = constructor.from_config(LatentGNNConfig(**saved.config), device="meta", dtype=types.pop())
        layer.load_state_dict(saved.weights, assign=True)
    except (KeyError, RuntimeError, TypeError, ValueError) as error:
        told = " ".join(str(error).split())
        raise UserError(f"{source}: the weights and the configuration do not make a {name}: {told}") from error
    return layer.eval()


def _metadata(path: Path) -> dict[str, str]:
    """The metadata of a safetensors file."""
    regular_file(path)
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            return dict(file.metadata() or {})
    except Exception as error:  # OSError, or the reader's own errors for other content
        raise _unreadable(path, error) from error


def _unreadable(path: Path, error: Exception) -> Exception:
    if (fault := system_error(error)) is not None:
        return fault
    return UserError(f"{path} cannot be read as a safetensors file ({first_line(error)})")
