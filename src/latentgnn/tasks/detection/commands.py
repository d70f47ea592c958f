"""Commands of detection; see `latentgnn.tasks.commands`."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from latentgnn.errors import UserError
from latentgnn.files.growing_lists import GrowingList
from latentgnn.files.outputs import Results, quoted, say_end
from latentgnn.progress import counted, parts_done
from latentgnn.tasks.commands import Commands, Shared
from latentgnn.tasks.detection import overview
from latentgnn.tasks.detection.analysis import Analysis, sample_pictures
from latentgnn.tasks.detection.coco import CocoAnnotations, CocoValidationSet
from latentgnn.tasks.detection.config import DetectionConfig
from latentgnn.tasks.detection.evaluation import CocoEvaluator
from latentgnn.tasks.detection.explaining import explain_image
from latentgnn.tasks.detection.exploring import DetectorExplorer
from latentgnn.tasks.detection.finder import Finder
from latentgnn.tasks.detection.fit import NEEDS_MASKS
from latentgnn.tasks.detection.loading import TrainedDetector, load_detector
from latentgnn.tasks.detection.memory import memory_of_prediction
from latentgnn.tasks.detection.model import build_detector
from latentgnn.tasks.detection.prediction import expand_images, predict_paths
from latentgnn.tasks.detection.programs import detector_program
from latentgnn.tasks.detection.results import Record, kinds_of, load_results
from latentgnn.tasks.detection.run_sets import Data, files_of, keep_drawn, load_sets, validation_set, with_categories
from latentgnn.tasks.detection.scores import Scores
from latentgnn.tasks.detection.task import DetectionTask, found_in, kinds_of_detector
from latentgnn.tasks.detection.tiles import Tiling
from latentgnn.tasks.detection.video import require_video
from latentgnn.tasks.detection.video_prediction import expand_videos, names_videos, predict_videos
from latentgnn.tasks.detection.weights.start import body_parameters, start_from
from latentgnn.tasks.explaining import Explained, spread
from latentgnn.tasks.image_explaining import Place
from latentgnn.tasks.images import read_image
from latentgnn.tasks.looking import Inputs
from latentgnn.tasks.starting import begun_trained
from latentgnn.training import commands
from latentgnn.training.card import Subject
from latentgnn.training.checkpoints import Checkpoint
from latentgnn.training.loading import batches, make_loader
from latentgnn.training.processes import Processes, sharing
from latentgnn.training.report import write_analysis
from latentgnn.training.runs import RunFolder

USAGE = """import latentgnn

model = latentgnn.load_run(".")  # this folder; or its name on the hub, with from_hub=True
found = model.predict("photo.jpg")  # boxes, labels, scores and, of a Mask R-CNN, masks
names = [model.categories[label - 1][1] for label in found["labels"]]"""
"""Usage example of a model card."""


class DetectionCommands(Commands[DetectionConfig, Data, TrainedDetector]):
    kind = "image"
    may_change = (
        *("data.root", "data.train_annotations", "data.train_images", "data.val_annotations", "data.val_images"),
        "evaluation",
    )

    def load(self, config: DetectionConfig, folder: Path, resume: bool) -> Data:
        return load_sets(config.data, folder, resume=resume)

    def fit(self, config: DetectionConfig, run: RunFolder, data: Data, resume: bool) -> dict[str, float]:
        train_set, val_set = data
        if run.writes:
            keep_drawn(config.data, run.path, data)
        config = with_categories(config, data)
        if config.model.detector == "mask_rcnn" and not (train_set.has_masks and val_set.has_masks):
            raise UserError(NEEDS_MASKS)
        task = self.task(config, run, data, goes_on=resume and run.has_checkpoint)
        number = config.evaluation.sample_pictures

        def pictures() -> Iterator[tuple[Path, bytes]]:
            return sample_pictures(val_set, task.results, number)

        def write_results() -> None:
            if task.scores is not None:
                commands.write_pictures(run, pictures(), reads=files_of(val_set))
                analysis = Analysis(task.evaluator, val_set, task.scores, task.results, pictures=number)
                commands.write_pictures(run, analysis.pictures(), reads=files_of(val_set))
                write_analysis(run, analysis.sections())

        metrics = commands.fit_in(
            run,
            task,
            config,
            resume=resume,
            may_change=self.may_change,
            write_results=write_results,
            pictures=pictures,
            titles=self.titles,
        )
        if run.writes:
            if task.scores is None:
                kinds = kinds_of_detector(config.model.detector)
                scores = Scores(metrics=metrics, kinds=kinds, max_detections=config.evaluation.max_detections)
            else:
                scores = task.scores
            print(scores.table())
        return metrics

    def task(self, config: DetectionConfig, run: RunFolder, data: Data, *, goes_on: bool) -> DetectionTask:
        """Return the training task of a run; weights that a checkpoint replaces are not downloaded."""
        train_set, val_set = data
        # Seeds the initial weights; the loop seeds each step itself.
        torch.manual_seed(config.training.seed)
        # The weights of a whole detector replace those of its backbone, and a checkpoint replaces both.
        bare = goes_on or config.model.weights is not None
        model = build_detector(
            replace(config.model, weights_backbone=None) if bare else config.model, len(train_set.categories)
        )
        if config.model.weights is not None:
            trained = begun_trained(run, lambda: start_from(model, config.model, train_set.categories), goes_on=goes_on)
        else:
            trained = body_parameters(model) if config.model.weights_backbone is not None else frozenset()
        return DetectionTask(model, config, train=train_set, val=val_set, trained=trained)

    def titles(self, names: Iterable[str]) -> dict[str, str]:
        shown = [name for name in names if name.partition("/")[2] in ("AP", "AP50", "AP75")]
        return {name: name.replace("bbox/", "box ").replace("segm/", "mask ") for name in shown}

    def evaluate(
        self, config: DetectionConfig, source: Path | None, *, results: Path | None, out: Path, overwrite: bool = False
    ) -> Scores:
        if results is None and source is None:
            raise UserError("there is neither a model nor a file of results to score")
        with ExitStack() as stack:
            processes = Processes() if results is not None else stack.enter_context(sharing(config.training))
            names, reads = ("metrics.json", "predictions.json"), [results] if results else ()
            written = stack.enter_context(
                Results(out, names, reads=reads, overwrite=overwrite, first=processes.is_first)
            )
            val_set = validation_set(config, source, stack)
            written.reads(files_of(val_set))
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
                trained = self.trained(config, source)
                with written.json_list("predictions.json") as found:
                    detections = _detect(trained, val_set, evaluator, processes)
                    records = _kept(processes.in_order(detections, len(val_set)), found, len(val_set))
            scores = processes.from_first(lambda: evaluator.score(records))
            if processes.is_first:
                # Printed before anything else is written, which may fail.
                print(scores.table())
                written.write_json("metrics.json", scores.to_json())
                if results is None:
                    for name, picture in sample_pictures(val_set, records, config.evaluation.sample_pictures):
                        written.write(Path("pictures") / name, picture)
        say_end(out, *([] if source is None else [f"latentgnn predict {quoted(source)} INPUT ..."]))
        return scores

    def predict(
        self,
        config: DetectionConfig,
        source: Path,
        inputs: Sequence[str],
        *,
        out: Path,
        overwrite: bool = False,
        score_threshold: float | None,
        pictures: bool,
    ) -> None:
        tiling = Tiling.of(config.evaluation)
        are_videos = names_videos(inputs)
        if are_videos:
            require_video()
        paths = expand_videos(inputs) if are_videos else expand_images(inputs, in_tiles=tiling is not None)
        score_threshold = 0.5 if score_threshold is None else score_threshold
        config = replace(config, model=replace(config.model, score_threshold=score_threshold))
        device = commands.device_of(config.training.accelerator)
        with sharing(config.training) as processes, commands.precision_of(config.training, device):
            if are_videos and processes.world > 1:
                raise UserError("frames are numbered across all videos: predict videos with one process")
            trained = self.trained(config, source)
            finder = Finder(
                trained.model,
                trained.categories,
                score_threshold=score_threshold,
                device=device,
                tiling=tiling,
                nms_threshold=config.model.nms_threshold,
            )
            with parts_done() as update:

                def on_part(path: Path, done: int, total: int) -> None:
                    update(path.name, done, total)

                if are_videos:
                    objects, frames = predict_videos(
                        finder, paths, out=out, overwrite=overwrite, pictures=pictures, on_frame=on_part
                    )
                    looked_at = f"{frames} frames of {len(paths)} videos"
                else:
                    if tiling is not None:
                        print(memory_of_prediction(trained, paths, tiling, device=device, pictures=pictures))
                    objects = predict_paths(
                        finder,
                        paths,
                        out=out,
                        overwrite=overwrite,
                        pictures=pictures,
                        on_tile=on_part,
                        processes=processes,
                    )
                    looked_at = f"{len(paths)} images"
        print(f"{objects} objects in {looked_at}")
        say_end(out)

    def check_data(
        self, config: DetectionConfig, *, recipe: str, out: Path | None = None, overwrite: bool = False
    ) -> dict[str, Any]:
        return overview.check_data(config, recipe=recipe, out=out, overwrite=overwrite)

    def load_trained(self, config: DetectionConfig, checkpoint: Checkpoint) -> TrainedDetector:
        return load_detector(config, checkpoint)

    def shared(self, trained: TrainedDetector) -> Shared:
        config = trained.config.model
        image = torch.rand(3, 96, 128, generator=torch.Generator().manual_seed(0))
        return Shared(
            subject=Subject(
                title=f"{config.detector} on {config.backbone}",
                task="image-segmentation" if config.detector == "mask_rcnn" else "object-detection",
                pipeline=True,
                classes=[name for _, name in trained.categories],
                usage=USAGE,
            ),
            program=lambda: detector_program(trained.model, config.detector),
            run=lambda model: [value for found in model([image]) for value in found.values()],
        )

    def expand(self, inputs: Sequence[str]) -> list[Path]:
        return expand_images(inputs)

    def read(self, trained: TrainedDetector, path: Path) -> Image.Image:
        return read_image(path)

    def validation(self, trained: TrainedDetector, source: Path, most: int, stack: ExitStack) -> Inputs:
        images = validation_set(trained.config, source, stack).images
        paths = [images[place].path for place in spread(len(images), most)]
        return Inputs([path.name for path in paths], paths, lambda number: read_image(paths[number]))

    def network_input(self, trained: TrainedDetector, sample: Image.Image) -> list[Tensor]:
        return [trained.transform(sample)]

    def look(
        self, trained: TrainedDetector, path: Path, *, blocks: Sequence[str], places: Sequence[Place]
    ) -> Iterator[Explained]:
        return explain_image(trained, path, blocks=blocks, places=places)

    def explorer(self, trained: TrainedDetector, title: str, inputs: Inputs) -> DetectorExplorer:
        return DetectorExplorer(trained, title, inputs.paths)


def _detect(
    trained: TrainedDetector, val_set: CocoAnnotations, evaluator: CocoEvaluator, processes: Processes
) -> Iterator[list[Record]]:
    """Yield the detections of a model in this process's share of a set's images, one image at a time."""
    config, model = trained.config, trained.model
    device = next(model.parameters()).device
    category_of_label = {label: id for label, (id, _) in enumerate(trained.categories, 1)}
    samples = CocoValidationSet(val_set, in_tiles=config.evaluation.tiles is not None)
    mine = processes.mine(len(samples))
    images = make_loader(samples, list, workers=config.training.workers, seed=0, batch_size=1, sampler=mine)
    with torch.inference_mode(), commands.precision_of(config.training, device), batches(images) as loaded:
        for [(image, target)] in loaded:
            on_device = image if isinstance(image, Path) else image.to(device)
            yield found_in(model, [on_device], [target], config, evaluator, category_of_label)


def _kept(detections: Iterator[list[Record]], found: GrowingList, images: int) -> list[Record]:
    """Return the detections in all images, and store them in a file as they come."""
    records: list[Record] = []
    for new in counted(detections, "evaluate", total=images):
        found.add(new)
        records += new
    return records


COMMANDS = DetectionCommands()
