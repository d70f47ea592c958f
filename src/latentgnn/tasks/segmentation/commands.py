"""What the commands do for segmentation of images, after the command line is parsed."""

import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from rich.progress import track
from torch import Tensor
from torchvision.transforms.v2.functional import to_pil_image

from latentgnn.configuration.settings import plain_data
from latentgnn.errors import UserError
from latentgnn.inspection import Report
from latentgnn.outputs import Results, quoted, say_end
from latentgnn.tasks.checks import Split, check_splits
from latentgnn.tasks.class_results import say_class_results, write_class_results
from latentgnn.tasks.class_scores import Scores
from latentgnn.tasks.classes import class_names
from latentgnn.tasks.explaining import PAGE, block_names, chosen_blocks, spread
from latentgnn.tasks.explaining import diagnose as diagnose_blocks
from latentgnn.tasks.explaining import explain as explain_inputs
from latentgnn.tasks.explore.inputs import MOST_INPUTS, noting_no_set
from latentgnn.tasks.exporting import Exporting, Format
from latentgnn.tasks.exporting import export as exported
from latentgnn.tasks.inputs import result_names
from latentgnn.tasks.saving import shared_record
from latentgnn.tasks.segmentation.check import check_split, load_set
from latentgnn.tasks.segmentation.config import PLACES, DataConfig, SegmentationConfig
from latentgnn.tasks.segmentation.datasets import LabelledImages
from latentgnn.tasks.segmentation.explaining import explain_image
from latentgnn.tasks.segmentation.exploring import SegmenterExplorer
from latentgnn.tasks.segmentation.layouts import colors_of
from latentgnn.tasks.segmentation.loading import TrainedSegmenter, load_segmenter
from latentgnn.tasks.segmentation.model import build_segmenter
from latentgnn.tasks.segmentation.pictures import beside, png
from latentgnn.tasks.segmentation.prediction import Predicted, expand_images, network_input, predict_files
from latentgnn.tasks.segmentation.programs import segmenter_program
from latentgnn.tasks.segmentation.start import start_from
from latentgnn.tasks.segmentation.task import UNIT, SegmentationTask, score_image
from latentgnn.training import commands
from latentgnn.training.card import Subject, model_card
from latentgnn.training.checkpoints import read_checkpoint
from latentgnn.training.processes import Processes, sharing
from latentgnn.training.runs import RunFolder, is_first_process, run_of

Data = tuple[LabelledImages, LabelledImages]

USAGE = """import latentgnn

model = latentgnn.load_run(".")  # this folder; or its name on the hub, with from_hub=True
labels = model.predict("photo.jpg")  # (height, width): places in model.class_names"""
"""What a model card says of its use."""

# What a resumed run may change: where the same data lie now, and how results are made and shown.
_MAY_CHANGE = ("data.root", "evaluation")


def train(config: SegmentationConfig, out: Path | None, *, name: str, resume: bool = False) -> dict[str, float]:
    """See `latentgnn.training.commands.train`."""
    return commands.train(_JOB, config, out, name=name, resume=resume)


def compare(config: SegmentationConfig, out: Path | None, *, name: str, resume: bool = False) -> dict[str, Any]:
    """See `latentgnn.training.commands.compare`."""
    return commands.compare(_JOB, config, out, name=name, resume=resume)


def report(run: Path) -> None:
    """See `latentgnn.training.commands.report`."""
    commands.report(_JOB, run)


def evaluate(
    config: SegmentationConfig, source: Path | None, *, results: Path | None, out: Path, overwrite: bool = False
) -> Scores:
    """Score a trained model on the validation images, every original pixel of them.

    Args:
        config: the model's, with what is to be different, such as ``data.val`` for another split.
        source: a run's folder or a checkpoint.
        results: must be ``None``: files of results are detection's.
        out: folder, new or empty, for ``metrics.json`` and ``pictures/``.
        overwrite: replace the results of an earlier command in ``out``.
    """
    if results is not None or source is None:
        raise UserError("--results scores detections; for segmentation, give a run's folder or a checkpoint")
    with (
        sharing(config.training) as processes,
        Results(out, ("metrics.json",), overwrite=overwrite, first=processes.is_first) as written,
    ):
        trained = _trained(config, source)
        val_set = _load_split(config.data, "val")
        written.reads(val_set.files)
        _check_alike(trained, val_set)
        scores, predicted = _score(trained, val_set, config, processes)
        if processes.is_first:
            # Before anything is written that may fail.
            print(scores.table())
            written.write_json("metrics.json", scores.to_json())
            for name, picture in _samples(val_set, predicted):
                written.write(Path("pictures") / name, picture)
    say_end(out, f"latentgnn predict {quoted(source)} INPUT ...")
    return scores


def _check_alike(trained: TrainedSegmenter, val_set: LabelledImages) -> None:
    if trained.class_names != val_set.class_names:
        raise UserError(
            f"the model was trained for the classes {', '.join(trained.class_names)}, but the label pictures in "
            f"{val_set.config.root} have {', '.join(val_set.class_names)}: leave out --data.classes, or name the ids "
            "of the same classes in the same order"
        )


def _score(
    trained: TrainedSegmenter, val_set: LabelledImages, config: SegmentationConfig, processes: Processes
) -> tuple[Scores, dict[int, NDArray[np.int64]]]:
    """The figures, and what was predicted for the images that are drawn, by their index, in the first process."""
    count = len(val_set.class_names)
    confusion, predicted = np.zeros((count, count), np.int64), {}
    shown = {*spread(len(val_set), config.evaluation.sample_pictures)}
    with commands.precision_of(config.training, commands.device_of(config.training.accelerator)):
        mine = (
            score_image(trained.model, val_set[index], config, count, keep=index in shown)
            for index in processes.mine(len(val_set))
        )
        results = processes.in_order(mine, len(val_set))
        for result in track(results, "evaluate", total=len(val_set), transient=True, disable=not sys.stdout.isatty()):
            confusion += result.confusion
            if result.predicted is not None:
                predicted[result.number] = result.predicted
    confusion = processes.from_first(lambda: confusion)
    return Scores(class_names=val_set.class_names, confusion=confusion, unit=UNIT), predicted


def predict(
    config: SegmentationConfig,
    source: Path,
    inputs: Sequence[str],
    *,
    out: Path,
    overwrite: bool = False,
    score_threshold: float | None,
    pictures: bool,
) -> list[Predicted]:
    """Write a label picture, in the data set's ids, for each image, and the classes drawn over it.

    Args:
        config: the model's.
        source: a run's folder or a checkpoint.
        inputs: files, folders and globs.
        out: folder, new or empty, for ``labels/`` and ``pictures/``.
        overwrite: replace the results of an earlier command in ``out``.
        score_threshold: must be ``None``: every pixel gets a class.
        pictures: draw each image.
    """
    if score_threshold is not None:
        raise UserError("--score-threshold leaves out detections; every pixel of an image gets a class")
    paths = expand_images(inputs)
    device = commands.device_of(config.training.accelerator)
    with sharing(config.training) as processes, commands.precision_of(config.training, device):
        trained = _trained(config, source)
        predicted = predict_files(
            trained.model,
            paths,
            config,
            class_ids=trained.class_ids,
            colors=colors_of(config.data, trained.class_ids),
            out=out,
            overwrite=overwrite,
            pictures=pictures,
            on_image=lambda image: print(f"{image.source}: {image.counts.sum():,} pixels, written to {image.path}"),
            processes=processes,
        )
    say_end(out)
    return predicted


def export(config: SegmentationConfig, source: Path, *, to: Format, out: Path, overwrite: bool = False) -> None:
    """Write a trained segmenter in a format that others read; see `latentgnn.tasks.exporting.export`.

    Args:
        config: the model's.
        source: a run's folder, a checkpoint or a saved model.
        to: the format.
        out: folder, new or empty.
        overwrite: replace the results of an earlier command in ``out``.
    """
    checkpoint = commands.trained_weights(source)
    trained = load_segmenter(config, checkpoint)
    record = shared_record(config, PLACES, step=checkpoint.step)
    blocks = f" with LatentGNN blocks at {', '.join(config.model.blocks)}" if config.model.blocks else ""
    subject = Subject(
        title=f"{config.model.architecture} on {config.model.backbone}{blocks}",
        task="image-segmentation",
        pipeline=True,
        classes=trained.class_names,
        usage=USAGE,
    )
    program = segmenter_program(trained.model, config)
    exporting = Exporting(
        model=trained.model,
        record=record,
        program=lambda: program,
        rebuild=lambda file: load_segmenter(config, read_checkpoint(file)).model,
        run=lambda model: [model(program.samples[0]["images"])["out"]],
        card=lambda lines, usage: model_card(
            subject, record, run_of(source), titles=_titles, export=lines, usage=usage
        ),
    )
    exported(exporting, to, out, overwrite=overwrite)
    say_end(out)


def explain(
    config: SegmentationConfig,
    source: Path,
    inputs: Sequence[str],
    *,
    out: Path,
    overwrite: bool,
    places: Sequence[tuple[float, float]],
    block: str | None,
    command: str,
) -> None:
    """Show what each block does on images; see `latentgnn.tasks.explaining.explain`.

    Args:
        config: the model's.
        source: a run's folder, a checkpoint or a saved model.
        inputs: files, folders and globs.
        out: folder, new or empty.
        overwrite: replace the results of an earlier command in ``out``.
        places: column and row of pixels whose nodes are shown.
        block: a block, or a part of its name; ``None`` for all.
        command: that is run.
    """
    paths = expand_images(inputs)
    trained = _trained(config, source)
    blocks = chosen_blocks(block_names(trained.model), block, source)
    explain_inputs(
        paths,
        lambda path: explain_image(trained, path, blocks=blocks, places=places),
        kind="image",
        out=out,
        overwrite=overwrite,
        source=source,
        config=plain_data(config),
        command=command,
    )
    say_end(out / PAGE)


def explore(
    config: SegmentationConfig, source: Path, inputs: Sequence[str], *, serve: Callable[[SegmenterExplorer], None]
) -> None:
    """Let a page show what each block does on images.

    Args:
        config: the model's.
        source: a run's folder, a checkpoint or a saved model.
        inputs: files, folders and globs; none takes images of the validation set.
        serve: answers the page until it is ended.
    """
    trained = _trained(config, source)
    chosen_blocks(block_names(trained.model), None, source)
    paths = expand_images(inputs) if inputs else []
    if not inputs:
        with noting_no_set("image"):
            val_set = _load_split(config.data, "val")
            _check_alike(trained, val_set)
            paths = [val_set.images[place] for place in spread(len(val_set), MOST_INPUTS)]
    serve(SegmenterExplorer(trained, source.resolve().name, paths))


def diagnose(config: SegmentationConfig, source: Path, *, samples: int) -> Report:
    """Say of each block whether it does something on the validation images.

    Args:
        config: the model's.
        source: a run's folder, a checkpoint or a saved model.
        samples: so many images, spread over the set.
    """
    trained = _trained(config, source)
    chosen_blocks(block_names(trained.model), None, source)
    val_set = _load_split(config.data, "val")
    _check_alike(trained, val_set)
    chosen = spread(len(val_set), samples)
    device = commands.device_of(config.training.accelerator)

    def inputs() -> Iterator[Tensor]:
        for place in chosen:
            yield network_input(val_set[place].image.to(device), config)

    return diagnose_blocks(trained.model, inputs(), total=len(chosen))


def check_data(
    config: SegmentationConfig, *, recipe: str, out: Path | None = None, overwrite: bool = False
) -> dict[str, Any]:
    """See `latentgnn.tasks.checks.check_splits`.

    Args:
        config: says where the images are.
        recipe: that it comes from.
        out: must be ``None``: no picture of samples is made.
        overwrite: likewise without effect.
    """
    if out is not None:
        raise UserError(
            f"{recipe} is a recipe for segmentation, of which check-data writes no pictures: leave out --out"
        )
    return check_splits(lambda split: check_split(config.data, split))


def _train(config: SegmentationConfig, run: RunFolder, data: Data, resume: bool) -> dict[str, float]:
    train_set, val_set = data
    # What the layout says belongs to the run: its classes above all.
    config = replace(config, data=train_set.config)
    task = _task(config, run, train_set, val_set, resume=resume)

    def drawn() -> Iterator[tuple[Path, bytes]]:
        return _samples(val_set, task.predicted)

    def write_results() -> None:
        if task.scores is not None:
            write_class_results(
                run,
                task.scores,
                [source.name for source in val_set.sources],
                task.confusions,
                _places(val_set, task.predicted),
                drawn(),
                reads=val_set.files,
                kind="image",
            )

    metrics = commands.fit_in(
        run,
        task,
        config,
        resume=resume,
        may_change=_MAY_CHANGE,
        write_results=write_results,
        pictures=drawn,
        titles=_titles,
    )
    say_class_results(run, task.scores, metrics)
    return metrics


def _task(
    config: SegmentationConfig, run: RunFolder, train_set: LabelledImages, val_set: LabelledImages, *, resume: bool
) -> SegmentationTask:
    # The seed of the weights; the loop seeds each step by itself.
    torch.manual_seed(config.training.seed)
    goes_on = resume and run.has_checkpoint
    model = build_segmenter(
        config.model,
        num_classes=len(class_names(config.data.classes)),
        auxiliary=config.loss.auxiliary > 0,
        download=not goes_on and config.model.weights is None,
    )
    trained: frozenset[str] = frozenset()
    if config.model.weights is not None:
        kept = run.trained_at_start() if goes_on else None
        if kept is not None:
            trained = kept
        else:
            start = start_from(model, config)
            trained = start.trained
            if run.writes:
                print("\n".join(start.lines))
            run.write_start(start.lines, start.trained)
    return SegmentationTask(model, config, train=train_set, val=val_set, trained=trained)


def _load(config: SegmentationConfig, folder: Path, resume: bool) -> Data:
    return _load_split(config.data, "train"), _load_split(config.data, "val")


def _load_split(config: DataConfig, split: Split) -> LabelledImages:
    images = load_set(config, split)
    if is_first_process():
        if images.skipped:
            print(images.skipped)
        total, classes = int(images.counts.sum()), len(images.class_names)
        name = images.config.train if split == "train" else images.config.val
        print(f"{name}: {len(images)} images, {total:,} labelled pixels, {classes} classes")
    return images


def _trained(config: SegmentationConfig, source: Path) -> TrainedSegmenter:
    trained = load_segmenter(config, commands.trained_weights(source))
    trained.model.to(commands.device_of(config.training.accelerator))
    return trained


def _samples(images: LabelledImages, predicted: Mapping[int, NDArray[np.int64]]) -> Iterator[tuple[Path, bytes]]:
    """Names and pictures of images, with what is true and what was predicted beside them."""
    places = _places(images, predicted)
    colors = colors_of(images.config, images.class_ids)
    for index, classes in predicted.items():
        sample = images[index]
        picture = beside(to_pil_image(sample.image), sample.labels.numpy(), classes, colors)
        yield places[index], png(picture)


def _places(images: LabelledImages, indices: Iterable[int]) -> dict[int, Path]:
    """Where the pictures of images lie, below ``pictures/``."""
    listed = list(indices)
    names = result_names([Path(f"{images.sources[index].name}.png") for index in listed])
    return {index: name.with_name(f"{name.name}.png") for index, name in zip(listed, names, strict=True)}


def _titles(names: Iterable[str]) -> dict[str, str]:
    """All figures of few classes, and the means of many."""
    listed = list(names)
    means = [name for name in listed if not name.startswith("IoU/")]
    return {name: name.removeprefix("IoU/") for name in (listed if len(listed) <= 16 else means)}


_JOB = commands.Job(load=_load, train=_train, titles=_titles)
