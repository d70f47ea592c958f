"""Checkpoints: each is one file, written completely or not at all, and read without running code from it."""

import os
import warnings
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from torch import Tensor, nn

from latentgnn.errors import UserError, concerning, system_error
from latentgnn.files.writing import replacing, temporary_name
from latentgnn.saved import read_saved
from latentgnn.training.archives import check_archive, seal
from latentgnn.training.fingerprint import Fingerprint
from latentgnn.training.run_files import Damaged, check_plain, is_step
from latentgnn.training.saved_runs import config_of

LAST, PREVIOUS, BEST = "last.ckpt", "previous.ckpt", "best.ckpt"
NAMES = (LAST, PREVIOUS, BEST)


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A checkpoint, as read for resuming, evaluation or prediction.

    Args:
        path: the file.
        step: optimizer steps done.
        config: the run's resolved configuration.
        course: the settings on which a run that continues from it must agree.
        data: fingerprints of the data sets by name; empty if none were stored.
        weights: the model's state dict, under the model's own names.
        optimizer: the optimizer's state dict.
        precision: state of the loss scaling in mixed precision; empty if losses are not scaled.
        lost: damaged checkpoints that were skipped in favour of this one, with the reason for each; see
            `newest_checkpoint`.
    """

    path: Path
    step: int
    config: dict[str, Any]
    course: dict[str, Any]
    data: dict[str, Fingerprint]
    weights: dict[str, Tensor]
    optimizer: dict[str, Any]
    precision: dict[str, Any]
    lost: Mapping[Path, Damaged] = field(default_factory=dict)

    def load_into(self, model: nn.Module) -> None:
        """Copy the weights into a model.

        Raises:
            UserError: if the model's names, shapes or dtypes differ.
        """
        check_weights(self.weights, model, str(self.path))
        model.load_state_dict(self.weights)

    def load_optimizer_into(self, optimizer: torch.optim.Optimizer) -> None:
        """Restore an optimizer's state.

        Raises:
            UserError: if the state belongs to another optimizer or another model.
        """
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        try:
            kept = [index for group in self.optimizer["param_groups"] for index in group["params"]]
            wrong = [
                f"{name} has the shape {tuple(value.shape)}, its parameter {tuple(parameter.shape)}"
                for index, parameter in zip(kept, parameters, strict=True)
                for name, value in self.optimizer["state"].get(index, {}).items()
                if isinstance(value, Tensor) and value.ndim and value.shape != parameter.shape
            ]
            if wrong:
                raise ValueError(wrong[0])
            optimizer.load_state_dict(self.optimizer)
        except (LookupError, TypeError, ValueError, AttributeError) as error:
            raise UserError(f"{self.path} does not fit the optimizer ({error}): start a new run") from error


def write_checkpoint(path: Path | str, content: dict[str, Any]) -> None:
    """Write a checkpoint with its digest; an existing ``last.ckpt`` is kept as ``previous.ckpt``.

    Args:
        path: the file.
        content: ``latentgnn`` (a dict of ``step``, ``config``, ``course`` and ``data``, see `Checkpoint`),
            ``state_dict`` (the weights, under the model's own names), ``optimizer`` (its state dict) and, if losses are
            scaled, ``precision`` (the state of the scaling).

    Raises:
        UserError: if weights or optimizer state are not finite; then nothing is written.
    """
    check_finite(content, step=content["latentgnn"]["step"])
    path = Path(path)

    def keep() -> None:
        if path.name == LAST and path.exists():
            _second_name(path, path.with_name(PREVIOUS))

    with replacing(path, before=keep) as file:
        torch.save(content, file)
        seal(file)


def check_finite(content: Mapping[str, Any], *, step: int) -> None:
    """Raise an error if weights or optimizer state are not finite, as training cannot continue from them.

    Args:
        content: as in `write_checkpoint`.
        step: the step that the error names.

    Raises:
        UserError: if a value is infinite or NaN; the message names some of the tensors.
    """
    bad = [name for part in ("state_dict", "optimizer") for name in _non_finite(content.get(part), "")]
    if bad:
        raise UserError(
            f"after step {step}, weights or the optimizer's state are infinite or not "
            f"numbers: {', '.join(bad[:5])}. The last checkpoint is as it was. Lower the learning rate, lengthen the "
            "warm-up or clip the gradient"
        )


def read_checkpoint(path: Path | str) -> Checkpoint:
    """Read a checkpoint that training wrote, or a model that was saved from one.

    Args:
        path: the file, such as ``checkpoints/best.ckpt`` in a run folder; or a saved model, see `latentgnn.saved`,
            which has neither optimizer state nor data.

    Raises:
        UserError: if there is no such file, it is damaged (the message names intact ones beside it), or it is not a
            checkpoint.
    """
    path = Path(path)
    if path.suffix == ".safetensors" or path.is_dir():
        return _from_saved(path)
    if not path.is_file():
        raise UserError(f"there is no checkpoint {path}")
    try:
        return _read(path)
    except Damaged as error:
        others, _ = _sound(path.with_name(name) for name in NAMES if name != path.name)
        if not others:
            raise
        told = ", ".join(f"{other.path} (step {other.step})" for other in others)
        raise Damaged(f"{error}; sound beside it: {told}") from error


def newest_checkpoint(folder: Path) -> Checkpoint | None:
    """Return the checkpoint to resume from: ``last.ckpt`` or, if that is damaged, the intact one with the most steps.

    Args:
        folder: the folder with the checkpoints of a run.

    Returns:
        The checkpoint, or ``None`` if there is none.

    Raises:
        UserError: if there are checkpoints and all of them are damaged.
    """
    found, lost = _sound([folder / LAST])
    if not found:
        found, more = _sound([folder / PREVIOUS, folder / BEST])
        lost |= more
    if not found and lost:
        raise UserError(f"{'; '.join(map(str, lost.values()))}; no checkpoint is sound: start a new run")
    if not found:
        return None
    return replace(max(found, key=lambda checkpoint: checkpoint.step), lost=lost)


def check_weights(weights: Mapping[str, Tensor], model: nn.Module, source: str) -> None:
    """Compare the names, shapes and dtypes of weights with those of a model.

    Raises:
        UserError: if a tensor is missing, unexpected, or has another shape or dtype; the message names it.
    """
    wanted = model.state_dict()
    common = [name for name in wanted if name in weights]
    faults = {
        "missing": [name for name in wanted if name not in weights],
        "unexpected": [name for name in weights if name not in wanted],
        "of another shape": [
            f"{name} {tuple(weights[name].shape)} instead of {tuple(wanted[name].shape)}"
            for name in common
            if weights[name].shape != wanted[name].shape
        ],
        "of another type": [
            f"{name} {weights[name].dtype} instead of {wanted[name].dtype}"
            for name in common
            if _kind(weights[name]) != _kind(wanted[name])
        ],
    }
    if any(faults.values()):
        listed = "; ".join(
            f"{len(names)} {kind}: {', '.join(names[:5])}{', ...' if len(names) > 5 else ''}"
            for kind, names in faults.items()
            if names
        )
        raise UserError(f"{source} does not fit the model ({listed}): build the model with the checkpoint's config")


def _second_name(path: Path, previous: Path) -> None:
    """Give a file a second name; at every moment it has at least one name."""
    link = temporary_name(previous)
    try:
        link.unlink(missing_ok=True)
        try:
            os.link(path, link)
        except OSError:
            # A file system without hard links: until the new file is renamed, `previous` serves as both.
            os.replace(path, previous)
        else:
            os.replace(link, previous)
    finally:
        link.unlink(missing_ok=True)


def _read(path: Path) -> Checkpoint:
    if not path.is_file():
        raise Damaged(f"{path} is damaged (it is no file)")
    with concerning(path), path.open("rb") as file:
        try:
            sealed = check_archive(file)
        except ValueError as error:
            raise Damaged(f"{path} is damaged ({error})") from None
        file.seek(0)
        try:
            with warnings.catch_warnings():
                # PyTorch warns about some kinds of tensors, which are refused here anyway.
                warnings.simplefilter("ignore")
                content = torch.load(file, map_location="cpu", weights_only=True)
        except Exception as error:
            if system_error(error) is not None:
                raise
            # PyTorch's reader has no exception class for files that it cannot parse. For objects that it refuses to
            # load, its message tells how to load them anyway, which would run code from the file.
            strange = isinstance(error, UnpicklingError)
            reason = "it holds more than tensors and plain data" if strange else str(error).partition("\n")[0]
            message = f"{path} cannot be read as a checkpoint ({reason})"
            raise (UserError(message) if sealed else Damaged(message)) from error
    try:
        return _checked(path, content)
    except ValueError as error:
        raise Damaged(f"{path} is not an intact checkpoint of a latentgnn run ({error})") from None


def _from_saved(path: Path) -> Checkpoint:
    saved = read_saved(path)
    config = config_of(saved.record, path)
    bad = _non_finite(saved.weights, "")
    if bad:
        raise Damaged(f"{saved.path} is damaged (infinite or not numbers: {', '.join(bad[:5])})")
    return Checkpoint(
        path=saved.path,
        step=saved.record.get("step", 0),
        config=config,
        course={},
        data={},
        weights=saved.weights,
        optimizer={},
        precision={},
    )


def _checked(path: Path, content: Any) -> Checkpoint:
    """Return a checkpoint whose fields have the expected types; raise `ValueError` for the first that does not."""
    if not isinstance(content, dict):
        raise ValueError(f"expected a mapping, got {type(content).__name__}")
    missing = [name for name in ("latentgnn", "state_dict", "optimizer") if not isinstance(content.get(name), dict)]
    if missing:
        raise ValueError(
            f"it has no {' and no '.join(missing)}; weights of a network of your own go into its load_state_dict"
        )
    record, weights = content["latentgnn"], content["state_dict"]
    for name in ("config", "course"):
        if not isinstance(record.get(name), dict):
            raise ValueError(f"its {name} is {type(record.get(name)).__name__}, expected a mapping")
        check_plain(record[name])
    step, steps = record.get("step"), record["course"].get("training.steps")
    if not is_step(step) or (is_step(steps) and step > steps):
        raise ValueError(f"it says step {step!r:.40} of {steps!r:.40}")
    for name, value in weights.items():
        if not isinstance(name, str) or not isinstance(value, Tensor):
            raise ValueError(f"its weight {name!r:.40} is {type(value).__name__}, expected a tensor")
    precision = content.get("precision", {})
    if not isinstance(precision, dict):
        raise ValueError(f"its precision is {type(precision).__name__}, expected a mapping")
    for name, tensor in _tensors(content, ""):
        if not _holds_its_values(tensor):
            raise ValueError(f"{name} in it has no memory for its {tensor.numel()} values")
    bad = [name for part in ("state_dict", "optimizer") for name in _non_finite(content[part], "")]
    if bad:
        raise ValueError(f"infinite or not numbers: {', '.join(bad[:5])}")
    sets = record.get("data", {})
    if not isinstance(sets, dict) or not all(isinstance(name, str) for name in sets):
        raise ValueError("the data fingerprint has an unexpected structure")
    return Checkpoint(
        path=path,
        step=step,
        config=record["config"],
        course=record["course"],
        data={name: Fingerprint.from_plain(plain) for name, plain in sets.items()},
        weights=weights,
        optimizer=content["optimizer"],
        precision=precision,
    )


def _sound(paths: Iterable[Path]) -> tuple[list[Checkpoint], dict[Path, Damaged]]:
    """Split existing checkpoints into those that can be read, and the others with the reason why not."""
    found, lost = [], {}
    for path in paths:
        if os.path.lexists(path):
            try:
                found.append(_read(path))
            except Damaged as error:
                lost[path] = error
    return found, lost


def _tensors(tree: Any, name: str) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors in nested mappings and lists with their places; each container is visited once."""
    stack, seen = [(name, tree)], set()
    while stack:
        place, value = stack.pop()
        if isinstance(value, Tensor):
            yield place, value
        elif isinstance(value, dict | list | tuple) and id(value) not in seen:
            seen.add(id(value))
            items = value.items() if isinstance(value, dict) else enumerate(value)
            stack += [(f"{place}.{key}" if place else str(key), inner) for key, inner in items]


def _non_finite(tree: Any, name: str) -> list[str]:
    """Return the places of tensors with infinite or NaN values in nested mappings and lists."""
    bad = [
        place
        for place, value in _tensors(tree, name)
        if (value.is_floating_point() or value.is_complex()) and not bool(torch.isfinite(value.detach()).all())
    ]
    return sorted(bad)


def _holds_its_values(tensor: Tensor) -> bool:
    """Whether each value has its own place in memory: a few bytes can claim to be a tensor of any size."""
    if tensor.layout != torch.strided or tensor.device.type != "cpu" or tensor.is_quantized:
        return False
    return tensor.numel() * tensor.element_size() <= tensor.untyped_storage().nbytes()


def _kind(tensor: Tensor) -> tuple[bool, bool]:
    return tensor.is_floating_point(), tensor.is_complex()
