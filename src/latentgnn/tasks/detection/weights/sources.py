"""Resolves ``model.weights``: one of torchvision's trained detectors, a run, a checkpoint, or a file."""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from torch import Tensor

from latentgnn.errors import UserError
from latentgnn.saved import is_saved
from latentgnn.tasks.detection.config import SETTINGS, DetectionConfig, ModelConfig
from latentgnn.tasks.detection.weights.fetching import torchvision_state
from latentgnn.tasks.detection.weights.files import read_file, state_of
from latentgnn.tasks.detection.weights.layouts import Layout, recognised
from latentgnn.tasks.detection.weights.published import PublishedDetector, published_detector, unknown
from latentgnn.tasks.starting import SETTING, own_weights, shown_setting

# Settings that do not change the weights' shapes: with another value the weights fit, but the result is wrong.
_SILENT = (
    *("norm_eps", "stride_in_1x1", "image_mean", "image_std", "anchor_sizes", "anchor_ratios"),
    *(setting.name for setting in fields(ModelConfig) if f"model.{setting.name}" in SETTINGS.free_when_trained),
)


@dataclass(frozen=True, kw_only=True)
class Source:
    """Trained weights of a detector, with the names used here.

    Args:
        name: name for messages.
        state: the state dict.
        categories: names of the rows of the last layers, background first; ``None`` if unknown.
        blocks: see `latentgnn.tasks.detection.weights.layouts.Layout`.
        notes: lines to print.
    """

    name: str
    state: Mapping[str, Tensor]
    categories: list[str] | None
    blocks: Mapping[str, dict[str, Tensor]] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


def find_source(config: ModelConfig) -> Source:
    """Read or download the weights that ``config.weights`` names.

    Raises:
        UserError: if there is nothing of this name, it cannot be downloaded, or it is something else.
    """
    name = str(config.weights)
    path = Path(name).expanduser()
    if path.is_dir() or is_saved(path):
        return _own(path, config)
    if path.is_file():
        return _from_file(path, config)
    published = published_detector(name)
    if published is None:
        raise unknown(name)
    return _published(published, config)


def _published(detector: PublishedDetector, config: ModelConfig) -> Source:
    _refuse_other_detector(detector, config)
    title = f"torchvision's {detector.weights}"
    state = torchvision_state(
        detector.weights,
        title,
        setting=SETTING,
        otherwise="give the file as --model.weights PATH, or start without: --model.weights null",
    )
    layout = recognised(state, image_std=config.image_std)
    assert layout is not None, "supported names are those of torchvision's detectors"
    return Source(
        name=title,
        state=layout.state,
        categories=detector.categories,
        notes=(*_renamed(layout), *_differences(vars(detector.config), config, "")),
    )


def _refuse_other_detector(detector: PublishedDetector, config: ModelConfig) -> None:
    theirs = detector.config
    wrong = [name for name in ("backbone", "heads") if getattr(theirs, name) != getattr(config, name)]
    # Faster R-CNN is Mask R-CNN without masks, but RetinaNet is different.
    if "retinanet" in (theirs.detector, config.detector) and theirs.detector != config.detector:
        wrong.insert(0, "detector")
    if wrong:
        if theirs.norm_eps != config.norm_eps:
            wrong.append("norm_eps")
        options = " ".join(f"--model.{name} {getattr(theirs, name)}" for name in wrong)
        raise UserError(f"{SETTING}: {detector.weights} is of another detector; with it, take {options}")


def _own(path: Path, config: ModelConfig) -> Source:
    """The weights of one of our runs or checkpoints."""
    checkpoint, there = own_weights(path, "detection", DetectionConfig)
    categories = there.data.categories
    return Source(
        name=str(checkpoint.path),
        state=checkpoint.weights,
        categories=None if categories is None else ["__background__", *(name for _, name in categories)],
        notes=_differences(vars(there.model), config, ""),
    )


def _from_file(path: Path, config: ModelConfig) -> Source:
    content = read_file(path, SETTING)
    if isinstance(content, dict) and "latentgnn" in content:
        return _own(path, config)
    state = state_of(content, path, SETTING)
    layout = recognised(state, image_std=config.image_std)
    if layout is None:
        hint = f"; for a classifier's weights, --model.weights_backbone {path}" if "conv1.weight" in state else ""
        raise UserError(
            f"{SETTING}: {path} holds no detector with names as torchvision's, maskrcnn-benchmark's or detectron2's "
            f"(its first: {', '.join(list(state)[:3])}){hint}"
        )
    return Source(
        name=f"{path}, a detector of {layout.name}" if layout.name != "torchvision" else str(path),
        state=layout.state,
        categories=layout.categories,
        blocks=layout.blocks,
        notes=(
            *_renamed(layout),
            *_guessed(layout),
            *_differences(layout.settings, config, f"{layout.name}'s ResNets "),
        ),
    )


def _renamed(layout: Layout) -> tuple[str, ...]:
    return (f"renamed: {layout.renamed} tensors, from names of {layout.name}'s",) if layout.renamed else ()


def _guessed(layout: Layout) -> tuple[str, ...]:
    if layout.categories is None:
        return ()
    rows = len(layout.categories)
    return (f"guessed: the weights name no categories; by their number, {rows} rows, they are taken for COCO's",)


def _differences(trained_with: Mapping[str, Any], config: ModelConfig, who: str) -> tuple[str, ...]:
    """A line about settings that differ and without which the detector computes something else."""
    # RetinaNet has no proposals.
    proposals = "retinanet" not in (trained_with.get("detector"), config.detector)
    other = [
        f"model.{name} {shown_setting(trained_with[name])} (here {shown_setting(getattr(config, name))})"
        for name in _SILENT
        if name in trained_with
        and trained_with[name] != getattr(config, name)
        and (proposals or not name.startswith("rpn_"))
    ]
    return (f"note: {who}trained with {', '.join(other)}",) if other else ()
