"""What the commands do for detection, after the command line is parsed."""

import sys
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich.progress import track
from torch import nn
from torch.utils.data import DataLoader

from latentgnn.errors import UserError
from latentgnn.files import write_bytes, write_json
from latentgnn.tasks.checks import Split, check_splits
from latentgnn.tasks.detection.check import check_split, load_split
from latentgnn.tasks.detection.coco import CocoAnnotations, CocoValidationSet, find_split
from latentgnn.tasks.detection.config import DataConfig, DetectionConfig
from latentgnn.tasks.detection.context_set import write_context_set
from latentgnn.tasks.detection.evaluation import CocoEvaluator, Record, Scores, kinds_of, load_results
from latentgnn.tasks.detection.images import read_image
from latentgnn.tasks.detection.model import build_detector
from latentgnn.tasks.detection.pictures import png_bytes, side_by_side
from latentgnn.tasks.detection.prediction import expand_images, predict_paths
from latentgnn.tasks.detection.task import DetectionTask, kinds_of_detector
from latentgnn.training import commands
from latentgnn.training.runs import RunFolder, is_first_process

Data = tuple[CocoAnnotations, CocoAnnotations]

# What a resumed run may change: where the same data lie now, and how results are shown.
_MAY_CHANGE = (
    *("data.root", "data.train_annotations", "data.train_images", "data.val_annotations", "data.val_images"),
    "evaluation",
)


def train(config: DetectionConfig, out: Path | None, *, name: str, resume: bool = False) -> dict[str, float]:
    """See `latentgnn.training.commands.train`."""
    return commands.train(_JOB, config, out, name=name, resume=resume)


def compare(config: DetectionConfig, out: Path | None, *, name: str, resume: bool = False) -> dict[str, Any]:
    """See `latentgnn.training.commands.compare`."""
    return commands.compare(_JOB, config, out, name=name, resume=resume)


def evaluate(config: DetectionConfig, source: Path | None, *, results: Path | None, out: Path) -> Scores:
    """Score a trained model on the validation set, or a file of results.

    Args:
        config: the model's, with what is to be different.
        source: a run's folder or a checkpoint; with ``results`` it is not needed.
        results: a COCO-results file to score instead of a model's detections.
        out: folder for ``metrics.json`` and, from a model, ``predictions.json`` and ``pictures/``.
    """
    val_set = _load_split(config.data, "val", source if source is not None and source.is_dir() else out)
    if results is not None:
        records = load_results(results, val_set.dataset)
        kinds = kinds_of(records)
    else:
        if source is None:
            raise UserError("there is neither a model nor a file of results to score")
        kinds = kinds_of_detector(config.model.detector)
    evaluator = CocoEvaluator(
        val_set.dataset,
        kinds=kinds,
        max_detections=config.evaluation.max_detections,
        per_category=config.evaluation.per_category,
    )
    if results is None and source is not None:
        records = _detect(config, source, val_set, evaluator)
        write_json(out / "predictions.json", records)
        _write_samples(val_set, records, out / "pictures", config.evaluation.sample_pictures)
    scores = evaluator.score(records)
    write_json(out / "metrics.json", scores.to_json())
    print(f"{scores.table()}\nwritten to {out}")
    return scores


def predict(
    config: DetectionConfig,
    source: Path,
    inputs: Sequence[str],
    *,
    out: Path,
    score_threshold: float | None,
    pictures: bool,
) -> list[Record]:
    """Apply a trained model to image files, folders and globs.

    Args:
        config: the model's.
        source: a run's folder or a checkpoint.
        inputs: files, folders and globs.
        out: folder for ``predictions.json`` and ``pictures/``.
        score_threshold: detections below it are left out; ``None`` takes 0.5.
        pictures: write annotated pictures.
    """
    paths = expand_images(inputs)
    score_threshold = 0.5 if score_threshold is None else score_threshold
    config = replace(config, model=replace(config.model, score_threshold=score_threshold))
    model, device = _trained(config, source)
    with commands.precision_of(config.training, device):
        records = predict_paths(
            model,
            paths,
            out=out,
            category_names=_categories(config, source),
            score_threshold=score_threshold,
            device=device,
            pictures=pictures,
        )
    print(f"{len(records)} objects in {len(paths)} images; written to {out}")
    return records


def check_data(config: DetectionConfig) -> bool:
    """Check every record and image of both splits, and print what is wrong; return whether nothing is."""
    return check_splits(lambda split: check_split(*find_split(config.data, split)))


def _train(config: DetectionConfig, run: RunFolder, data: Data, resume: bool) -> dict[str, float]:
    train_set, val_set = data
    config = _with_categories(config, train_set, val_set)
    if config.model.detector == "mask_rcnn" and not (train_set.has_masks and val_set.has_masks):
        raise UserError(
            "these annotations have no masks, which a Mask R-CNN learns from; "
            "train another detector: --model.detector faster_rcnn"
        )
    task = _task(config, train_set, val_set)
    metrics = commands.fit_in(run, task, config, resume=resume, may_change=_MAY_CHANGE)
    if run.writes:
        if task.scores is None:
            kinds = kinds_of_detector(config.model.detector)
            scores = Scores(metrics=metrics, kinds=kinds, max_detections=config.evaluation.max_detections)
        else:
            scores = task.scores
            _write_samples(val_set, task.results, run.pictures, config.evaluation.sample_pictures)
        print(f"{scores.table()}\nwritten to {run.path}")
    return metrics


def _task(config: DetectionConfig, train_set: CocoAnnotations, val_set: CocoAnnotations) -> DetectionTask:
    # The seed of the weights; the loop seeds each step by itself.
    torch.manual_seed(config.training.seed)
    model = build_detector(config.model, len(train_set.categories))
    return DetectionTask(model, config, train=train_set, val=val_set)


def _load(config: DetectionConfig, folder: Path) -> Data:
    return _load_split(config.data, "train", folder), _load_split(config.data, "val", folder)


def _load_split(config: DataConfig, split: Split, folder: Path) -> CocoAnnotations:
    """A split without faults; the embedded set, if that is meant, is made in ``folder`` before."""
    if config.root is None:
        root = folder / "data"
        write_context_set(root, train=config.embedded_train, val=config.embedded_val, size=config.embedded_size)
        config = replace(config, root=str(root))
    annotations = load_split(*find_split(config, split), on_fault=config.on_fault)
    if is_first_process():
        if annotations.skipped:
            print(annotations.skipped)
        objects = sum(not annotation["iscrowd"] for annotation in annotations.dataset["annotations"])
        print(f"{split}: {len(annotations)} images, {objects} objects, {len(annotations.categories)} categories")
    return annotations


def _with_categories(config: DetectionConfig, train_set: CocoAnnotations, val_set: CocoAnnotations) -> DetectionConfig:
    """The configuration with its categories named, once they are known to be the same everywhere."""
    categories = tuple(train_set.categories)
    expected = config.data.categories
    if expected is not None and expected != categories:
        raise UserError(f"data.categories are {list(expected)}, but the training annotations have {list(categories)}")
    names = dict(categories)
    for category_id, name in val_set.categories:
        if names.get(category_id, name) != name:
            raise UserError(
                f"category {category_id} is {names[category_id]!r} in the training annotations, "
                f"but {name!r} in the validation annotations"
            )
    return replace(config, data=replace(config.data, categories=categories))


def _categories(config: DetectionConfig, source: Path) -> tuple[tuple[int, str], ...]:
    if config.data.categories is None:
        raise UserError(f"the configuration of {source} names no categories, as that of a trained model does")
    return config.data.categories


def _trained(config: DetectionConfig, source: Path) -> tuple[nn.Module, torch.device]:
    """The trained model of a run or checkpoint, on its device."""
    checkpoint = commands.trained_weights(source)
    # The checkpoint has all weights: those that training began with are not fetched again.
    model = build_detector(replace(config.model, weights_backbone=None), len(_categories(config, source)))
    checkpoint.load_into(model)
    device = commands.device_of(config.training.accelerator)
    model.to(device).eval()
    if config.training.channels_last:
        model.to(memory_format=torch.channels_last)
    return model, device


def _detect(config: DetectionConfig, source: Path, val_set: CocoAnnotations, evaluator: CocoEvaluator) -> list[Record]:
    model, device = _trained(config, source)
    category_of_label = {label: id for label, (id, _) in enumerate(_categories(config, source), 1)}
    images: DataLoader[Any] = DataLoader(
        CocoValidationSet(val_set),  # type: ignore[arg-type]
        batch_size=None,
        num_workers=config.training.workers,
    )
    shown = track(images, "evaluate", total=len(val_set), transient=True, disable=not sys.stdout.isatty())
    records: list[Record] = []
    with torch.inference_mode(), commands.precision_of(config.training, device):
        for image, target in shown:
            records += evaluator.results_of([model([image.to(device)])[0]], [target["image_id"]], category_of_label)
    return records


def _write_samples(val_set: CocoAnnotations, results: Sequence[Record], folder: Path, number: int) -> None:
    """Pictures of some images spread over the set, ground truth beside predictions."""
    number = min(number, len(val_set))
    for index in (position * len(val_set) // number for position in range(number)):
        image = val_set.images[index]
        picture = side_by_side(
            read_image(image.path, size=(image.width, image.height)),
            val_set.annotations_of(image.id),
            [record for record in results if record["image_id"] == image.id],
            val_set.categories,
        )
        write_bytes(folder / f"{Path(image.file_name).stem}.png", png_bytes(picture))


def _titles(names: Iterable[str]) -> dict[str, str]:
    shown = [name for name in names if name.partition("/")[2] in ("AP", "AP50", "AP75")]
    return {name: name.replace("bbox/", "box ").replace("segm/", "mask ") for name in shown}


_JOB = commands.Job(load=_load, train=_train, titles=_titles)
