"""What the commands do for detection, after the command line is parsed."""

import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich.progress import track
from torch import nn

from latentgnn.configuration.settings import plain_data
from latentgnn.errors import UserError
from latentgnn.hub import CONFIG
from latentgnn.inspection import Report
from latentgnn.outputs import JsonList, Results, quoted, say_end
from latentgnn.tasks.checks import Split
from latentgnn.tasks.detection import convert as conversion
from latentgnn.tasks.detection import overview
from latentgnn.tasks.detection.analysis import Analysis
from latentgnn.tasks.detection.categories import differing
from latentgnn.tasks.detection.check import load
from latentgnn.tasks.detection.coco import CocoAnnotations, CocoValidationSet
from latentgnn.tasks.detection.config import PLACES, DataConfig, DetectionConfig
from latentgnn.tasks.detection.context_set import write_context_set
from latentgnn.tasks.detection.evaluation import CocoEvaluator, Record, Scores, kinds_of, load_results
from latentgnn.tasks.detection.explaining import explain_image
from latentgnn.tasks.detection.exploring import DetectorExplorer
from latentgnn.tasks.detection.fit import NEEDS_MASKS
from latentgnn.tasks.detection.loading import TrainedDetector, load_detector
from latentgnn.tasks.detection.memory import memory_of_prediction
from latentgnn.tasks.detection.model import build_detector
from latentgnn.tasks.detection.pictures import png_bytes, side_by_side
from latentgnn.tasks.detection.prediction import expand_images, predict_paths
from latentgnn.tasks.detection.programs import detector_program
from latentgnn.tasks.detection.sets import DetectionSet
from latentgnn.tasks.detection.splits import SPLIT_FILE, keep_split, kept_split, refuse_another_split
from latentgnn.tasks.detection.task import DetectionTask, found_in, kinds_of_detector
from latentgnn.tasks.detection.tiles import Tiling
from latentgnn.tasks.detection.video import require_video
from latentgnn.tasks.detection.video_prediction import expand_videos, names_videos, predict_videos
from latentgnn.tasks.detection.weights.start import body_parameters, start_from
from latentgnn.tasks.explaining import PAGE, block_names, chosen_blocks, spread
from latentgnn.tasks.explaining import diagnose as diagnose_blocks
from latentgnn.tasks.explaining import explain as explain_inputs
from latentgnn.tasks.explore.inputs import MOST_INPUTS, noting_no_set
from latentgnn.tasks.exporting import Exporting, Format
from latentgnn.tasks.exporting import export as exported
from latentgnn.tasks.images import read_image
from latentgnn.tasks.inputs import result_names
from latentgnn.tasks.progress import file_bar
from latentgnn.tasks.saving import shared_record
from latentgnn.training import commands
from latentgnn.training.card import Subject, model_card
from latentgnn.training.checkpoints import read_checkpoint
from latentgnn.training.loading import batches, make_loader
from latentgnn.training.processes import Processes, sharing
from latentgnn.training.report import write_analysis
from latentgnn.training.runs import RunFolder, is_first_process, run_of

Data = tuple[CocoAnnotations, CocoAnnotations]

# What a resumed run may change: where the same data lie now, and how results are shown.
_MAY_CHANGE = (
    *("data.root", "data.train_annotations", "data.train_images", "data.val_annotations", "data.val_images"),
    "evaluation",
)
USAGE = """import latentgnn

model = latentgnn.load_run(".")  # this folder; or its name on the hub, with from_hub=True
found = model.predict("photo.jpg")  # boxes, labels, scores and, of a Mask R-CNN, masks
names = [model.categories[label - 1][1] for label in found["labels"]]"""
"""What a model card says of its use."""

_NAMED = 20  # categories that an error lists


def train(config: DetectionConfig, out: Path | None, *, name: str, resume: bool = False) -> dict[str, float]:
    """See `latentgnn.training.commands.train`."""
    return commands.train(_JOB, config, out, name=name, resume=resume)


def compare(config: DetectionConfig, out: Path | None, *, name: str, resume: bool = False) -> dict[str, Any]:
    """See `latentgnn.training.commands.compare`."""
    return commands.compare(_JOB, config, out, name=name, resume=resume)


def report(run: Path) -> None:
    """See `latentgnn.training.commands.report`."""
    commands.report(_JOB, run)


def evaluate(
    config: DetectionConfig, source: Path | None, *, results: Path | None, out: Path, overwrite: bool = False
) -> Scores:
    """Score a trained model on the validation set, or a file of results.

    Args:
        config: the model's, with what is to be different.
        source: a run's folder or a checkpoint; with ``results`` it is not needed.
        results: a COCO-results file to score instead of a model's detections.
        out: folder, new or empty, for ``metrics.json`` and, from a model, ``predictions.json`` and ``pictures/``.
        overwrite: replace the results of an earlier command in ``out``.
    """
    if results is None and source is None:
        raise UserError("there is neither a model nor a file of results to score")
    with ExitStack() as stack:
        processes = Processes() if results is not None else stack.enter_context(sharing(config.training))
        names, reads = ("metrics.json", "predictions.json"), [results] if results else ()
        written = stack.enter_context(Results(out, names, reads=reads, overwrite=overwrite, first=processes.is_first))
        # A run has its embedded set; for a checkpoint alone, one is made for the time of the evaluation.
        made_in = source if source is not None and source.is_dir() else _temporary_folder(stack)
        val_set = _load_split(_open(config.data, made_in, _run_of(config.data, source)), "val")
        written.reads(_files_of(val_set))
        _check_alike(config, val_set)
        if results is not None:
            records = load_results(results, val_set.dataset)
            kinds = kinds_of(records)
        else:
            kinds = kinds_of_detector(config.model.detector)
        evaluator = CocoEvaluator(
            val_set.dataset,
            kinds=kinds,
            max_detections=config.evaluation.max_detections,
            per_category=config.evaluation.per_category,
        )
        if results is None and source is not None:
            model, device = _trained(config, source)
            with written.json_list("predictions.json") as found:
                detections = _detect(model, device, config, val_set, evaluator, processes)
                records = _kept(processes.in_order(detections, len(val_set)), found, len(val_set))
        scores = processes.from_first(lambda: evaluator.score(records))
        if processes.is_first:
            # Before anything else is written that may fail.
            print(scores.table())
            written.write_json("metrics.json", scores.to_json())
            if results is None:
                for name, picture in _samples(val_set, records, config.evaluation.sample_pictures):
                    written.write(Path("pictures") / name, picture)
    say_end(out, *([] if source is None else [f"latentgnn predict {quoted(source)} INPUT ..."]))
    return scores


def predict(
    config: DetectionConfig,
    source: Path,
    inputs: Sequence[str],
    *,
    out: Path,
    overwrite: bool = False,
    score_threshold: float | None,
    pictures: bool,
) -> None:
    """Apply a trained model to image files, folders and globs, or to video files.

    Args:
        config: the model's.
        source: a run's folder or a checkpoint.
        inputs: files, folders and globs.
        out: folder, new or empty, for ``predictions.json`` and ``pictures/`` or ``videos/``.
        overwrite: replace the results of an earlier command in ``out``.
        score_threshold: detections below it are left out; ``None`` takes 0.5.
        pictures: write annotated pictures, or videos.
    """
    tiling = Tiling.of(config.evaluation)
    are_videos = names_videos(inputs)
    if are_videos:
        require_video()
    paths = expand_videos(inputs) if are_videos else expand_images(inputs, in_tiles=tiling is not None)
    score_threshold = 0.5 if score_threshold is None else score_threshold
    config = replace(config, model=replace(config.model, score_threshold=score_threshold))
    with sharing(config.training) as processes:
        objects, looked_at = _predict(
            config,
            source,
            paths,
            are_videos=are_videos,
            processes=processes,
            out=out,
            overwrite=overwrite,
            pictures=pictures,
        )
    print(f"{objects} objects in {looked_at}")
    say_end(out)


def export(config: DetectionConfig, source: Path, *, to: Format, out: Path, overwrite: bool = False) -> None:
    """Write a trained detector in a format that others read; see `latentgnn.tasks.exporting.export`.

    Args:
        config: the model's.
        source: a run's folder, a checkpoint or a saved model.
        to: the format.
        out: folder, new or empty.
        overwrite: replace the results of an earlier command in ``out``.
    """
    checkpoint = commands.trained_weights(source)
    trained = load_detector(config, checkpoint)
    record = shared_record(config, PLACES, step=checkpoint.step)
    generator = torch.Generator().manual_seed(0)
    image = torch.rand(3, 96, 128, generator=generator)
    blocks = f" with LatentGNN blocks at {', '.join(config.model.blocks)}" if config.model.blocks else ""
    subject = Subject(
        title=f"{config.model.detector} on {config.model.backbone}{blocks}",
        task="image-segmentation" if config.model.detector == "mask_rcnn" else "object-detection",
        pipeline=True,
        classes=[name for _, name in trained.categories],
        usage=USAGE,
    )
    exporting = Exporting(
        model=trained.model,
        record=record,
        program=lambda: detector_program(trained.model, config.model.detector),
        rebuild=lambda file: load_detector(config, read_checkpoint(file)).model,
        run=lambda model: [value for found in model([image]) for value in found.values()],
        card=lambda lines, usage: model_card(
            subject, record, run_of(source), titles=_titles, export=lines, usage=usage
        ),
    )
    exported(exporting, to, out, overwrite=overwrite)
    say_end(out)


def explain(
    config: DetectionConfig,
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
    trained = _with_blocks(config, source)
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


def diagnose(config: DetectionConfig, source: Path, *, samples: int) -> Report:
    """Say of each block whether it does something on the validation images.

    Args:
        config: the model's.
        source: a run's folder, a checkpoint or a saved model.
        samples: so many images, spread over the set.
    """
    trained = _with_blocks(config, source)
    chosen_blocks(block_names(trained.model), None, source)
    with ExitStack() as stack:
        images = _validation_images(config, source, stack, most=samples)
        inputs = ([trained.transform(path)] for path in images)
        return diagnose_blocks(trained.model, inputs, total=len(images))


def explore(
    config: DetectionConfig, source: Path, inputs: Sequence[str], *, serve: Callable[[DetectorExplorer], None]
) -> None:
    """Let a page show what each block does on images.

    Args:
        config: the model's.
        source: a run's folder, a checkpoint or a saved model.
        inputs: files, folders and globs; none takes images of the validation set.
        serve: answers the page until it is ended.
    """
    trained = _with_blocks(config, source)
    chosen_blocks(block_names(trained.model), None, source)
    with ExitStack() as stack:
        paths = expand_images(inputs) if inputs else []
        if not inputs:
            with noting_no_set("image"):
                paths = _validation_images(config, source, stack, most=MOST_INPUTS)
        serve(DetectorExplorer(trained, source.resolve().name, paths))


def _validation_images(config: DetectionConfig, source: Path, stack: ExitStack, *, most: int) -> list[Path]:
    """Images spread over the validation set; the embedded one is made for the time of the stack if need be."""
    made_in = source if source.is_dir() and not (source / CONFIG).is_file() else _temporary_folder(stack)
    val_set = _load_split(_open(config.data, made_in, _run_of(config.data, source)), "val")
    _check_alike(config, val_set)
    return [val_set.images[place].path for place in spread(len(val_set), most)]


def _with_blocks(config: DetectionConfig, source: Path) -> TrainedDetector:
    trained = load_detector(config, commands.trained_weights(source))
    trained.model.to(commands.device_of(config.training.accelerator))
    return trained


def check_data(
    config: DetectionConfig, *, recipe: str, out: Path | None = None, overwrite: bool = False
) -> dict[str, Any]:
    """See `latentgnn.tasks.detection.overview.check_data`."""
    return overview.check_data(config, recipe=recipe, out=out, overwrite=overwrite)


def convert(config: DetectionConfig, *, out: Path, overwrite: bool = False, with_images: bool = True) -> None:
    """See `latentgnn.tasks.detection.convert.convert`."""
    conversion.convert(config, out=out, overwrite=overwrite, with_images=with_images)


def _predict(
    config: DetectionConfig,
    source: Path,
    paths: Sequence[Path],
    *,
    are_videos: bool,
    processes: Processes,
    out: Path,
    overwrite: bool,
    pictures: bool,
) -> tuple[int, str]:
    """The number of objects, and what they are in."""
    if are_videos and processes.world > 1:
        raise UserError("the frames of videos are counted on from one to the next: predict videos in one process")
    tiling = Tiling.of(config.evaluation)
    model, device = _trained(config, source)
    options: dict[str, Any] = {
        "out": out,
        "overwrite": overwrite,
        "category_names": _categories(config, source),
        "score_threshold": config.model.score_threshold,
        "device": device,
        "pictures": pictures,
        "tiling": tiling,
        "nms_threshold": config.model.nms_threshold,
    }
    with commands.precision_of(config.training, device):
        if are_videos:
            with file_bar() as update:
                objects, frames = predict_videos(
                    model, paths, **options, on_frame=lambda path, *progress: update(path.name, *progress)
                )
            return objects, f"{frames} frames of {len(paths)} videos"
        options["processes"] = processes
        if tiling is not None:
            print(memory_of_prediction(model, paths, tiling, config, device=device, pictures=pictures))
            with file_bar() as update:
                objects = predict_paths(
                    model, paths, **options, on_tile=lambda path, *progress: update(path.name, *progress)
                )
        else:
            objects = predict_paths(model, paths, **options)
    return objects, f"{len(paths)} images"


def _train(config: DetectionConfig, run: RunFolder, data: Data, resume: bool) -> dict[str, float]:
    train_set, val_set = data
    if run.writes:
        _keep_split(config.data, run.path, data)
    config = _with_categories(config, train_set, val_set)
    if config.model.detector == "mask_rcnn" and not (train_set.has_masks and val_set.has_masks):
        raise UserError(NEEDS_MASKS)
    task = _task(config, run, train_set, val_set, resume=resume)

    def pictures() -> Iterator[tuple[Path, bytes]]:
        return _samples(val_set, task.results, config.evaluation.sample_pictures)

    def write_results() -> None:
        if task.scores is not None:
            number = config.evaluation.sample_pictures
            commands.write_pictures(run, pictures(), reads=_files_of(val_set))
            analysis = Analysis(task.evaluator, val_set, task.scores, task.results, pictures=number)
            commands.write_pictures(run, analysis.pictures(), reads=_files_of(val_set))
            write_analysis(run, analysis.sections())

    metrics = commands.fit_in(
        run,
        task,
        config,
        resume=resume,
        may_change=_MAY_CHANGE,
        write_results=write_results,
        pictures=pictures,
        titles=_titles,
    )
    if run.writes:
        if task.scores is None:
            kinds = kinds_of_detector(config.model.detector)
            scores = Scores(metrics=metrics, kinds=kinds, max_detections=config.evaluation.max_detections)
        else:
            scores = task.scores
        print(scores.table())
    return metrics


def _task(
    config: DetectionConfig, run: RunFolder, train_set: CocoAnnotations, val_set: CocoAnnotations, *, resume: bool
) -> DetectionTask:
    # The seed of the weights; the loop seeds each step by itself.
    torch.manual_seed(config.training.seed)
    goes_on = resume and run.has_checkpoint
    # The weights of a whole detector stand in for those of its backbone, and a checkpoint for both.
    bare = goes_on or config.model.weights is not None
    model = build_detector(
        replace(config.model, weights_backbone=None) if bare else config.model, len(train_set.categories)
    )
    trained = _started(model, config, run, train_set, goes_on=goes_on)
    return DetectionTask(model, config, train=train_set, val=val_set, trained=trained)


def _started(
    model: nn.Module, config: DetectionConfig, run: RunFolder, train_set: CocoAnnotations, *, goes_on: bool
) -> frozenset[str]:
    """Load the weights that a run starts from; the names of the parameters that began trained."""
    if config.model.weights is None:
        return body_parameters(model) if config.model.weights_backbone is not None else frozenset()
    if goes_on and (kept := run.trained_at_start()) is not None:
        return kept
    start = start_from(model, config.model, train_set.categories)
    if run.writes:
        print("\n".join(start.lines))
    run.write_start(start.lines, start.trained)
    return start.trained


def _load(config: DetectionConfig, folder: Path, resume: bool) -> Data:
    if resume:
        refuse_another_split(folder, config.data)
    opened = _open(config.data, folder, folder)
    data = _load_split(opened, "train"), _load_split(opened, "val")
    if is_first_process():
        _keep_split(config.data, folder, data)
    return data


def _open(config: DataConfig, folder: Path, run: Path | None) -> DetectionSet:
    """The set that is meant, with the split of a run; the embedded set, if it is meant, is made in a folder."""
    if config.root is None:
        root = folder / "data"
        write_context_set(root, train=config.embedded_train, val=config.embedded_val, size=config.embedded_size)
        config = replace(config, root=str(root))
    return DetectionSet(config, run)


def _run_of(config: DataConfig, source: Path | None) -> Path | None:
    """The folder of the run that a model comes from, whose split is taken again.

    Raises:
        UserError: a split is to be drawn, and a checkpoint does not lie where its run kept that.
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


def _keep_split(config: DataConfig, folder: Path, data: Data) -> None:
    """Write a split that was drawn into a run, which takes it again when it is resumed or evaluated."""
    if config.val_fraction is not None and kept_split(folder, config) is None:
        train, val = ([image.file_name for image in annotations.images] for annotations in data)
        keep_split(folder, config, train=train, val=val)


def _with_categories(config: DetectionConfig, train_set: CocoAnnotations, val_set: CocoAnnotations) -> DetectionConfig:
    """The configuration with its categories named, once they are known to be the same everywhere."""
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


def _check_alike(config: DetectionConfig, val_set: CocoAnnotations) -> None:
    """Refuse a set whose ids mean other categories than the model's, of which its figures would tell nothing."""
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


def _categories(config: DetectionConfig, source: Path) -> tuple[tuple[int, str], ...]:
    if config.data.categories is None:
        raise UserError(f"the configuration of {source} names no categories, as that of a trained model does")
    return config.data.categories


def _trained(config: DetectionConfig, source: Path) -> tuple[nn.Module, torch.device]:
    """The trained model of a run or checkpoint, on its device."""
    device = commands.device_of(config.training.accelerator)
    return load_detector(config, commands.trained_weights(source)).model.to(device), device


def _detect(
    model: nn.Module,
    device: torch.device,
    config: DetectionConfig,
    val_set: CocoAnnotations,
    evaluator: CocoEvaluator,
    processes: Processes,
) -> Iterator[list[Record]]:
    """What a model finds in the images of a set that are this process's, one after the other."""
    category_of_label = {label: id for label, (id, _) in enumerate(config.data.categories or (), 1)}
    samples = CocoValidationSet(val_set, in_tiles=config.evaluation.tiles is not None)
    mine = processes.mine(len(samples))
    images = make_loader(samples, list, workers=config.training.workers, seed=0, batch_size=1, sampler=mine)
    with torch.inference_mode(), commands.precision_of(config.training, device), batches(images) as loaded:
        for [(image, target)] in loaded:
            on_device = image if isinstance(image, Path) else image.to(device)
            yield found_in(model, [on_device], [target], config, evaluator, category_of_label)


def _kept(detections: Iterator[list[Record]], found: JsonList, images: int) -> list[Record]:
    """The detections in all images, kept in a file as they come."""
    records: list[Record] = []
    for new in track(detections, "evaluate", total=images, transient=True, disable=not sys.stdout.isatty()):
        found.add(new)
        records += new
    return records


def _files_of(annotations: CocoAnnotations) -> list[Path]:
    """What is read of a set after its annotations."""
    return [image.path for image in annotations.images]


def _temporary_folder(stack: ExitStack) -> Path:
    return Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="latentgnn-")))


def _samples(val_set: CocoAnnotations, results: Sequence[Record], number: int) -> Iterator[tuple[Path, bytes]]:
    """Names and pictures of some images spread over the set, ground truth beside predictions."""
    number = min(number, len(val_set))
    images = [val_set.images[position * len(val_set) // number] for position in range(number)]
    for image, name in zip(images, result_names([image.path for image in images]), strict=True):
        picture = side_by_side(
            read_image(image.path, size=(image.width, image.height)),
            val_set.annotations_of(image.id),
            [record for record in results if record["image_id"] == image.id],
            val_set.categories,
        )
        yield name.with_name(f"{name.name}.png"), png_bytes(picture)


def _titles(names: Iterable[str]) -> dict[str, str]:
    shown = [name for name in names if name.partition("/")[2] in ("AP", "AP50", "AP75")]
    return {name: name.replace("bbox/", "box ").replace("segm/", "mask ") for name in shown}


_JOB = commands.Job(load=_load, train=_train, titles=_titles)
