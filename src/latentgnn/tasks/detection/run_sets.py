"""The data sets of a run and of a trained model, opened with the run's own split and checked for its categories."""

import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

from latentgnn.errors import UserError
from latentgnn.hub import CONFIG
from latentgnn.tasks.checks import Split
from latentgnn.tasks.detection.categories import differing
from latentgnn.tasks.detection.coco import CocoAnnotations
from latentgnn.tasks.detection.config import DataConfig, DetectionConfig
from latentgnn.tasks.detection.context_set import write_context_set
from latentgnn.tasks.detection.sets import DetectionSet
from latentgnn.tasks.detection.sound_sets import load
from latentgnn.tasks.detection.splits import SPLIT_FILE, keep_split, kept_split, refuse_another_split
from latentgnn.training.runs import is_first_process

Data = tuple[CocoAnnotations, CocoAnnotations]
"""The training set and the validation set."""

_NAMED = 20  # number of categories that an error lists


def load_sets(config: DataConfig, folder: Path, *, resume: bool) -> Data:
    """Load the sets of a run, without faults.

    Args:
        config: where the sets are; embedded ones are generated in the folder.
        folder: the run's folder, which stores a split that is drawn.
        resume: whether the folder may have a split already.
    """
    if resume:
        refuse_another_split(folder, config)
    opened = _open(config, folder, folder)
    data = _load_split(opened, "train"), _load_split(opened, "val")
    if is_first_process():
        keep_drawn(config, folder, data)
    return data


def validation_set(config: DetectionConfig, source: Path | None, stack: ExitStack) -> CocoAnnotations:
    """Return the set on which a trained model, or without a model a file of results, is scored.

    Args:
        config: the model's configuration.
        source: its run's folder, checkpoint or saved model.
        stack: keeps an embedded set that is not in the run's folder until it is closed.

    Raises:
        UserError: if there is no such set, it has faults, or its categories are not the model's.
    """
    has_run = source is not None and source.is_dir() and not (source / CONFIG).is_file()
    made_in = source if has_run and source is not None else _temporary_folder(stack)
    val_set = _load_split(_open(config.data, made_in, _run_of(config.data, source)), "val")
    _check_alike(config, val_set)
    return val_set


def keep_drawn(config: DataConfig, folder: Path, data: Data) -> None:
    """Store a drawn split in a run's folder; it is used again when the run is resumed or evaluated."""
    if config.val_fraction is not None and kept_split(folder, config) is None:
        train, val = ([image.file_name for image in annotations.images] for annotations in data)
        keep_split(folder, config, train=train, val=val)


def with_categories(config: DetectionConfig, data: Data) -> DetectionConfig:
    """Return the configuration with its categories, after checking that they are the same everywhere."""
    train_set, val_set = data
    categories = tuple(train_set.categories)
    expected = config.data.categories
    if expected is not None and expected != categories:
        raise UserError(f"data.categories are {list(expected)}, but the training annotations have {list(categories)}")
    if (difference := differing(categories, val_set.categories)) is not None:
        (id, name), (other_id, other_name) = difference
        raise UserError(
            f"category {id} is {name!r} in the training annotations, "
            f"but {other_id} is {other_name!r} in the validation annotations"
        )
    return replace(config, data=replace(config.data, categories=categories))


def files_of(annotations: CocoAnnotations) -> list[Path]:
    """Return the files of a set that are read after its annotations."""
    return [image.path for image in annotations.images]


def _open(config: DataConfig, folder: Path, run: Path | None) -> DetectionSet:
    """Open the configured set with the split of a run; an embedded set is generated in a folder."""
    if config.root is None:
        root = folder / "data"
        write_context_set(root, train=config.embedded_train, val=config.embedded_val, size=config.embedded_size)
        config = replace(config, root=str(root))
    return DetectionSet(config, run)


def _run_of(config: DataConfig, source: Path | None) -> Path | None:
    """The folder of the run that a model comes from, whose split is used again.

    Raises:
        UserError: if a split is to be drawn, and the checkpoint is not in the folder of its run, which stores it.
    """
    if source is None or source.is_dir():
        return source
    folder = source.resolve().parent
    run = folder.parent if folder.name == "checkpoints" else folder
    if (run / SPLIT_FILE).exists():
        return run
    if config.val_fraction is not None:
        raise UserError(
            f"the validation images were drawn (data.val_fraction {config.val_fraction:g}), and {source} does not lie "
            f"in a run's folder with its {SPLIT_FILE}: give the run's folder instead, or score a set with a val split "
            "of its own with --data.root FOLDER --data.val_fraction null"
        )
    return None


def _load_split(opened: DetectionSet, split: Split) -> CocoAnnotations:
    """A split without faults."""
    reading = opened.reading(split)
    annotations = load(reading, on_fault=opened.config.on_fault, whole=opened.config.is_whole)
    if is_first_process():
        if annotations.skipped:
            print(annotations.skipped)
        counts = f"{len(annotations)} images, {annotations.objects} objects, {len(annotations.categories)} categories"
        print(f"{split}: {counts}")
        for note in reading.notes:
            print(f"note: {note}")
    return annotations


def _check_alike(config: DetectionConfig, val_set: CocoAnnotations) -> None:
    """Refuse a set whose ids mean other categories than the model's, as its figures would be meaningless."""
    known = config.data.categories
    if known is None:
        return
    if (difference := differing(known, val_set.categories)) is not None:
        (id, name), (other_id, other_name) = difference
        raise UserError(
            f"category {id} is {name!r} for the model, but {other_id} is {other_name!r} in the set of "
            f"{val_set.folder}: give the set the model's ids and names, {_listed(known)}"
        )
    if not {name for _, name in known} & {name for _, name in val_set.categories}:
        raise UserError(
            f"the set of {val_set.folder} has no category of the model, but {_listed(val_set.categories)}: "
            f"give the set the model's ids and names, {_listed(known)}"
        )


def _listed(categories: Sequence[tuple[int, str]]) -> str:
    shown = ", ".join(f"{id} {name}" for id, name in categories[:_NAMED])
    return f"{shown} and {len(categories) - _NAMED} others" if len(categories) > _NAMED else shown


def _temporary_folder(stack: ExitStack) -> Path:
    return Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="latentgnn-")))
