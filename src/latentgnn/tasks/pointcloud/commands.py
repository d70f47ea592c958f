"""What the commands do for point clouds, after the command line is parsed."""

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
from latentgnn.tasks.pointcloud.check import check_split, load_set
from latentgnn.tasks.pointcloud.config import PLACES, DataConfig, PointCloudConfig
from latentgnn.tasks.pointcloud.datasets import DATASET_FILE, DATASET_SETTINGS, ScanSet
from latentgnn.tasks.pointcloud.explaining import explain_scan, take_crop
from latentgnn.tasks.pointcloud.exploring import ScanExplorer
from latentgnn.tasks.pointcloud.loading import TrainedSegmenter, load_segmenter
from latentgnn.tasks.pointcloud.model import PointNetwork, build_point_network
from latentgnn.tasks.pointcloud.neighbors import Hierarchy
from latentgnn.tasks.pointcloud.pictures import draw_scan
from latentgnn.tasks.pointcloud.prediction import Predicted, Tiles, expand_scans, predict_files
from latentgnn.tasks.pointcloud.programs import point_program
from latentgnn.tasks.pointcloud.start import start_from
from latentgnn.tasks.pointcloud.task import PointCloudTask, WholeScans, score_scan, shown_scans
from latentgnn.tasks.progress import file_bar
from latentgnn.tasks.saving import shared_record
from latentgnn.training import commands
from latentgnn.training.card import Subject, model_card
from latentgnn.training.checkpoints import read_checkpoint
from latentgnn.training.processes import Processes, sharing
from latentgnn.training.runs import RunFolder, is_first_process, run_of

Data = tuple[ScanSet, ScanSet]

USAGE = """import latentgnn

model = latentgnn.load_run(".")  # this folder; or its name on the hub, with from_hub=True
probabilities = model.predict("scan.laz")  # (points, classes), in the order of model.class_names"""
"""What a model card says of its use."""

# What a resumed run may change: where the same data lie now, and how results are made and shown.
_MAY_CHANGE = ("data.root", "data.cached_points", "data.overlap", "evaluation")


def train(config: PointCloudConfig, out: Path | None, *, name: str, resume: bool = False) -> dict[str, float]:
    """See `latentgnn.training.commands.train`."""
    return commands.train(_JOB, config, out, name=name, resume=resume)


def compare(config: PointCloudConfig, out: Path | None, *, name: str, resume: bool = False) -> dict[str, Any]:
    """See `latentgnn.training.commands.compare`."""
    return commands.compare(_JOB, config, out, name=name, resume=resume)


def report(run: Path) -> None:
    """See `latentgnn.training.commands.report`."""
    commands.report(_JOB, run)


def evaluate(
    config: PointCloudConfig, source: Path | None, *, results: Path | None, out: Path, overwrite: bool = False
) -> Scores:
    """Score a trained model on the validation scans, every original point of them.

    Args:
        config: the model's, with what is to be different.
        source: a run's folder or a checkpoint.
        results: must be ``None``: files of results are detection's.
        out: folder, new or empty, for ``metrics.json`` and ``pictures/``.
        overwrite: replace the results of an earlier command in ``out``.
    """
    if results is not None or source is None:
        raise UserError("--results scores detections; for point clouds, give a run's folder or a checkpoint")
    with (
        sharing(config.training) as processes,
        Results(out, ("metrics.json",), overwrite=overwrite, first=processes.is_first) as written,
    ):
        model = _trained(config, source)
        val_set = _load_split(config.data, "val")
        written.reads(_files_of(val_set))
        _check_alike(config, val_set)
        scores, predicted = _score(model, val_set, config, processes)
        if processes.is_first:
            # Before anything is written that may fail.
            print(scores.table())
            written.write_json("metrics.json", scores.to_json())
            for name, picture in _samples(val_set, predicted):
                written.write(Path("pictures") / name, picture)
    say_end(out, f"latentgnn predict {quoted(source)} INPUT ...")
    return scores


def _check_alike(config: PointCloudConfig, val_set: ScanSet) -> None:
    # The folder's own dataset.yaml replaces the model's settings, so the two must agree; ids may be others.
    pairs = {
        "classes": (class_names(config.data.classes), val_set.class_names),
        "features": (config.data.features, val_set.config.features),
    }
    for name, (trained, present) in pairs.items():
        if trained != present:
            raise UserError(
                f"the model was trained for the {name} {', '.join(trained)}, but the scans in {config.data.root} have "
                f"{', '.join(present)}; what a dataset.yaml says there is not used with --data.dataset_yaml fills"
            )


def _score(
    model: PointNetwork, val_set: ScanSet, config: PointCloudConfig, processes: Processes
) -> tuple[Scores, dict[int, NDArray[np.int64]]]:
    """The figures, and what was predicted for the scans that are drawn, by their index, in the first process."""
    scans, confusion, predicted = WholeScans(val_set), np.zeros((model.num_classes,) * 2, np.int64), {}
    shown = shown_scans(len(val_set), config.evaluation.sample_pictures)
    with commands.precision_of(config.training, commands.device_of(config.training.accelerator)):
        mine = (score_scan(model, scans[index], config, keep=index in shown) for index in processes.mine(len(scans)))
        results = processes.in_order(mine, len(scans))
        for result in track(results, "evaluate", total=len(scans), transient=True, disable=not sys.stdout.isatty()):
            confusion += result.confusion
            if result.predicted is not None:
                predicted[result.number] = result.predicted
    confusion = processes.from_first(lambda: confusion)
    return Scores(class_names=val_set.class_names, confusion=confusion), predicted


def predict(
    config: PointCloudConfig,
    source: Path,
    inputs: Sequence[str],
    *,
    out: Path,
    overwrite: bool = False,
    score_threshold: float | None,
    pictures: bool,
) -> list[Predicted]:
    """Write scan files again with the predicted class of every point.

    Args:
        config: the model's.
        source: a run's folder or a checkpoint.
        inputs: files, folders and globs.
        out: folder, new or empty, for the scans and ``pictures/``.
        overwrite: replace the results of an earlier command in ``out``.
        score_threshold: must be ``None``: every point gets a class.
        pictures: draw each scan.
    """
    if score_threshold is not None:
        raise UserError("--score-threshold leaves out detections; every point of a scan gets a class")
    paths = expand_scans(inputs)
    side = config.evaluation.tiles
    device = commands.device_of(config.training.accelerator)
    with sharing(config.training) as processes, commands.precision_of(config.training, device), file_bar() as update:
        model = _trained(config, source)
        tiles = (
            Tiles(
                side=side,
                on_points=lambda path, doing, *progress: update(f"{path.name}, {doing}", *progress),
                say=print,
            )
            if side is not None
            else None
        )
        predicted = predict_files(
            model,
            paths,
            config=config.seen_by_crops,
            out=out,
            overwrite=overwrite,
            votes=config.evaluation.votes,
            tiles=tiles,
            pictures=pictures,
            on_scan=lambda scan: print(f"{scan.source}: {scan.counts.sum():,} points, written to {scan.path}"),
            processes=processes,
        )
    say_end(out)
    return predicted


def export(config: PointCloudConfig, source: Path, *, to: Format, out: Path, overwrite: bool = False) -> None:
    """Write a trained point network in a format that others read; see `latentgnn.tasks.exporting.export`.

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
    features, hierarchy = trained.model.example_input()
    blocks = f" with LatentGNN blocks at {', '.join(config.model.blocks)}" if config.model.blocks else ""
    subject = Subject(
        title=f"point network{blocks}",
        task="point-cloud-segmentation",
        pipeline=False,
        classes=trained.class_names,
        usage=USAGE,
    )
    exporting = Exporting(
        model=trained.model,
        record=record,
        program=lambda: point_program(trained.model),
        rebuild=lambda file: load_segmenter(config, read_checkpoint(file)).model,
        run=lambda model: [model(features, hierarchy)],
        card=lambda lines, usage: model_card(
            subject, record, run_of(source), titles=_titles, export=lines, usage=usage
        ),
    )
    exported(exporting, to, out, overwrite=overwrite)
    say_end(out)


def explain(
    config: PointCloudConfig,
    source: Path,
    inputs: Sequence[str],
    *,
    out: Path,
    overwrite: bool,
    places: Sequence[tuple[float, float]],
    block: str | None,
    command: str,
) -> None:
    """Show what each block does on scans; see `latentgnn.tasks.explaining.explain`.

    Args:
        config: the model's.
        source: a run's folder, a checkpoint or a saved model.
        inputs: files, folders and globs.
        out: folder, new or empty.
        overwrite: replace the results of an earlier command in ``out``.
        places: x and y, in the file's coordinates, of points that are shown.
        block: a block, or a part of its name; ``None`` for all.
        command: that is run.
    """
    paths = expand_scans(inputs)
    trained = _with_blocks(config, source)
    blocks = chosen_blocks(block_names(trained.model), block, source)
    explain_inputs(
        paths,
        lambda path: explain_scan(trained, path, blocks=blocks, places=places),
        kind="scan",
        out=out,
        overwrite=overwrite,
        source=source,
        config=plain_data(config),
        command=command,
    )
    say_end(out / PAGE)


def diagnose(config: PointCloudConfig, source: Path, *, samples: int) -> Report:
    """Say of each block whether it does something on the validation scans, of each of which one crop is taken.

    Args:
        config: the model's.
        source: a run's folder, a checkpoint or a saved model.
        samples: so many scans, spread over the set.
    """
    trained = _with_blocks(config, source)
    chosen_blocks(block_names(trained.model), None, source)
    val_set = _load_split(config.data, "val")
    _check_alike(config, val_set)
    chosen = spread(len(val_set), samples)

    def inputs() -> Iterator[tuple[Tensor, Hierarchy]]:
        for place in chosen:
            scan = val_set.scan(place)
            crop = take_crop(trained, scan.points, scan.features, ())
            yield torch.from_numpy(crop.features), crop.hierarchy

    return diagnose_blocks(trained.model, inputs(), total=len(chosen))


def explore(
    config: PointCloudConfig, source: Path, inputs: Sequence[str], *, serve: Callable[[ScanExplorer], None]
) -> None:
    """Let a page show what each block does on scans.

    Args:
        config: the model's.
        source: a run's folder, a checkpoint or a saved model.
        inputs: files, folders and globs; none takes scans of the validation set.
        serve: answers the page until it is ended.
    """
    trained = _with_blocks(config, source)
    chosen_blocks(block_names(trained.model), None, source)
    title = source.resolve().name
    paths = expand_scans(inputs) if inputs else []
    explorer = ScanExplorer(
        trained, title, [path.name for path in paths], lambda number: trained.transform.scan(paths[number])
    )
    if not inputs:
        with noting_no_set("scan"):
            val_set = _load_split(config.data, "val")
            _check_alike(config, val_set)
            places = spread(len(val_set), MOST_INPUTS)
            names = [val_set.names[place] for place in places]
            explorer = ScanExplorer(trained, title, names, lambda number: val_set.scan(places[number]))
    serve(explorer)


def _with_blocks(config: PointCloudConfig, source: Path) -> TrainedSegmenter:
    trained = load_segmenter(config, commands.trained_weights(source))
    trained.model.to(commands.device_of(config.training.accelerator))
    return trained


def check_data(
    config: PointCloudConfig, *, recipe: str, out: Path | None = None, overwrite: bool = False
) -> dict[str, Any]:
    """See `latentgnn.tasks.checks.check_splits`.

    Args:
        config: says where the scans are.
        recipe: that it comes from.
        out: must be ``None``: scans have no picture of samples.
        overwrite: likewise without effect.
    """
    if out is not None:
        raise UserError(
            f"{recipe} is a recipe for point clouds, of which check-data writes no pictures: leave out --out"
        )
    return check_splits(lambda split: check_split(config.data, split))


def _train(config: PointCloudConfig, run: RunFolder, data: Data, resume: bool) -> dict[str, float]:
    train_set, val_set = data
    # What the folder says about itself belongs to the run: its classes and features above all.
    config = replace(config, data=train_set.config)
    task = _task(config, run, train_set, val_set, resume=resume)

    def drawn() -> Iterator[tuple[Path, bytes]]:
        return _samples(val_set, task.predicted)

    def write_results() -> None:
        if task.scores is not None:
            write_class_results(
                run,
                task.scores,
                val_set.names,
                task.confusions,
                _places(val_set, task.predicted),
                drawn(),
                reads=_files_of(val_set),
                kind="scan",
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
    config: PointCloudConfig, run: RunFolder, train_set: ScanSet, val_set: ScanSet, *, resume: bool
) -> PointCloudTask:
    # The seed of the weights; the loop seeds each step by itself.
    torch.manual_seed(config.training.seed)
    model = build_point_network(config.model, num_features=train_set.num_features, num_classes=train_set.num_classes)
    trained = _started(model, config, run, goes_on=resume and run.has_checkpoint)
    return PointCloudTask(model, config, train=train_set, val=val_set, trained=trained)


def _started(model: PointNetwork, config: PointCloudConfig, run: RunFolder, *, goes_on: bool) -> frozenset[str]:
    """Load the weights that a run starts from; the names of the parameters that began trained."""
    if config.model.weights is None:
        return frozenset()
    if goes_on and (kept := run.trained_at_start()) is not None:
        return kept
    start = start_from(model, config)
    if run.writes:
        print("\n".join(start.lines))
    run.write_start(start.lines, start.trained)
    return start.trained


def _load(config: PointCloudConfig, folder: Path, resume: bool) -> Data:
    return _load_split(config.data, "train"), _load_split(config.data, "val")


def _load_split(config: DataConfig, split: Split) -> ScanSet:
    scans = load_set(config, split)
    if is_first_process():
        if split == "train" and (replaced := _replaced(config, scans.config)):
            print(
                f"{', '.join(replaced)}: as {Path(config.root or '') / DATASET_FILE} says; to have your own settings "
                "win: --data.dataset_yaml fills"
            )
        if scans.skipped:
            print(scans.skipped)
        points = 0 if scans.counts is None else int(scans.counts.sum())
        print(f"{split}: {len(scans)} scans, {points:,} labelled points, {scans.num_classes} classes")
    return scans


def _replaced(given: DataConfig, used: DataConfig) -> list[str]:
    """The settings that the data folder's own replaced by others."""
    return [
        f"data.{name}"
        for name in DATASET_SETTINGS
        if getattr(given, name) and getattr(given, name) != getattr(used, name)
    ]


def _trained(config: PointCloudConfig, source: Path) -> PointNetwork:
    """The trained model of a run or checkpoint, on its device."""
    model = load_segmenter(config, commands.trained_weights(source)).model
    return model.to(commands.device_of(config.training.accelerator))


def _files_of(scans: ScanSet) -> list[Path]:
    """What a set reads again and again."""
    return [path for source in scans.sources for path in source.files]


def _samples(scans: ScanSet, predicted: Mapping[int, NDArray[np.int64]]) -> Iterator[tuple[Path, bytes]]:
    """Names and pictures of scans, ground truth beside predictions."""
    places = _places(scans, predicted)
    for index, classes in predicted.items():
        scan = scans.scan(index)
        yield places[index], draw_scan(scan.points, scans.class_names, predicted=classes, labels=scan.labels)


def _places(scans: ScanSet, indices: Iterable[int]) -> dict[int, Path]:
    """Where the pictures of scans lie, below ``pictures/``."""
    listed = list(indices)
    names = result_names([Path(f"{scans.names[index]}.png") for index in listed])
    return {index: name.with_name(f"{name.name}.png") for index, name in zip(listed, names, strict=True)}


def _titles(names: Iterable[str]) -> dict[str, str]:
    """All figures of few classes, and the means of many."""
    listed = list(names)
    means = [name for name in listed if not name.startswith("IoU/")]
    return {name: name.removeprefix("IoU/") for name in (listed if len(listed) <= 12 else means)}


_JOB = commands.Job(load=_load, train=_train, titles=_titles)
