"""Commands of image segmentation; see `latentgnn.tasks.class_commands`."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torchvision.transforms.v2.functional import to_pil_image

from latentgnn.errors import UserError
from latentgnn.tasks.checks import Split
from latentgnn.tasks.class_commands import ClassCommands
from latentgnn.tasks.class_scores import Result
from latentgnn.tasks.classes import class_names
from latentgnn.tasks.commands import Shared
from latentgnn.tasks.explaining import Explained, spread
from latentgnn.tasks.image_explaining import Place
from latentgnn.tasks.images import png_bytes, read_image, to_tensor
from latentgnn.tasks.looking import Inputs
from latentgnn.tasks.segmentation.check import Report, check_split, load_set
from latentgnn.tasks.segmentation.config import SegmentationConfig
from latentgnn.tasks.segmentation.datasets import LabelledImages
from latentgnn.tasks.segmentation.explaining import explain_image
from latentgnn.tasks.segmentation.exploring import SegmenterExplorer
from latentgnn.tasks.segmentation.layouts import colors_of
from latentgnn.tasks.segmentation.loading import TrainedSegmenter, load_segmenter
from latentgnn.tasks.segmentation.model import build_segmenter
from latentgnn.tasks.segmentation.pictures import beside
from latentgnn.tasks.segmentation.prediction import expand_images, network_input, predict_files
from latentgnn.tasks.segmentation.programs import segmenter_program
from latentgnn.tasks.segmentation.start import start_from
from latentgnn.tasks.segmentation.task import UNIT, SegmentationTask, score_image
from latentgnn.tasks.starting import begun_trained
from latentgnn.training.card import Subject
from latentgnn.training.checkpoints import Checkpoint
from latentgnn.training.processes import Processes
from latentgnn.training.runs import RunFolder

USAGE = """import latentgnn

model = latentgnn.load_run(".")  # this folder; or its name on the hub, with from_hub=True
labels = model.predict("photo.jpg")  # (height, width): places in model.class_names"""
"""Usage example of a model card."""


class SegmentationCommands(ClassCommands[SegmentationConfig, LabelledImages, TrainedSegmenter]):
    kind = "image"
    title = "segmentation"
    unit = UNIT
    each = "every pixel of an image"
    may_change = ("data.root", "evaluation")
    most_titles = 16

    def load_split(self, config: SegmentationConfig, split: Split) -> LabelledImages:
        return load_set(config.data, split)

    def check_split(self, config: SegmentationConfig, split: Split) -> Report:
        return check_split(config.data, split)

    def content(self, found: LabelledImages, split: Split) -> str:
        name = found.config.train if split == "train" else found.config.val
        return f"{name}: {len(found)} images, {int(found.counts.sum()):,} labelled pixels"

    def refuse_others(self, trained: TrainedSegmenter, found: LabelledImages) -> None:
        if trained.class_names != found.class_names:
            raise UserError(
                f"the model was trained for the classes {', '.join(trained.class_names)}, but the label pictures in "
                f"{found.config.root} have {', '.join(found.class_names)}: leave out --data.classes, or name the ids "
                "of the same classes in the same order"
            )

    def task(
        self, config: SegmentationConfig, run: RunFolder, train: LabelledImages, val: LabelledImages, *, goes_on: bool
    ) -> SegmentationTask:
        # Seeds the initial weights; the loop seeds each step itself.
        torch.manual_seed(config.training.seed)
        model = build_segmenter(
            config.model,
            num_classes=len(class_names(config.data.classes)),
            auxiliary=config.loss.auxiliary > 0,
            download=not goes_on and config.model.weights is None,
        )
        trained: frozenset[str] = frozenset()
        if config.model.weights is not None:
            trained = begun_trained(run, lambda: start_from(model, config), goes_on=goes_on)
        return SegmentationTask(model, config, train=train, val=val, trained=trained)

    def score(self, trained: TrainedSegmenter, found: LabelledImages, index: int, *, keep: bool) -> Result:
        return score_image(trained.model, found[index], trained.config, len(found.class_names), keep=keep)

    def picture(self, found: LabelledImages, index: int, classes: NDArray[np.int64]) -> bytes:
        sample, colors = found[index], colors_of(found.config, found.class_ids)
        return png_bytes(beside(to_pil_image(sample.image), sample.labels.numpy(), classes, colors))

    def predict_files(
        self,
        trained: TrainedSegmenter,
        paths: Sequence[Path],
        processes: Processes,
        *,
        out: Path,
        overwrite: bool,
        pictures: bool,
    ) -> None:
        predict_files(
            trained.model,
            paths,
            trained.config,
            class_ids=trained.class_ids,
            colors=colors_of(trained.config.data, trained.class_ids),
            out=out,
            overwrite=overwrite,
            pictures=pictures,
            on_image=self.say,
            processes=processes,
        )

    def load_trained(self, config: SegmentationConfig, checkpoint: Checkpoint) -> TrainedSegmenter:
        return load_segmenter(config, checkpoint)

    def shared(self, trained: TrainedSegmenter) -> Shared:
        config = trained.config
        program = segmenter_program(trained.model, config)
        return Shared(
            subject=Subject(
                title=f"{config.model.architecture} on {config.model.backbone}",
                task="image-segmentation",
                pipeline=True,
                classes=trained.class_names,
                usage=USAGE,
            ),
            program=lambda: program,
            run=lambda model: [model(program.samples[0]["images"])["out"]],
        )

    def expand(self, inputs: Sequence[str]) -> list[Path]:
        return expand_images(inputs)

    def read(self, trained: TrainedSegmenter, path: Path) -> Tensor:
        return to_tensor(read_image(path))

    def validation(self, trained: TrainedSegmenter, source: Path, most: int, stack: ExitStack) -> Inputs:
        val_set = self.matching(trained)
        places = spread(len(val_set), most)
        sources = [val_set.sources[place] for place in places]
        paths = [source.image for source in sources if source.image is not None]
        return Inputs([source.name for source in sources], paths, lambda number: val_set[places[number]].image)

    def network_input(self, trained: TrainedSegmenter, sample: Tensor) -> Tensor:
        return network_input(sample.to(next(trained.model.parameters()).device), trained.config)

    def look(
        self, trained: TrainedSegmenter, path: Path, *, blocks: Sequence[str], places: Sequence[Place]
    ) -> Iterator[Explained]:
        return explain_image(trained, path, blocks=blocks, places=places)

    def explorer(self, trained: TrainedSegmenter, title: str, inputs: Inputs) -> SegmenterExplorer:
        return SegmenterExplorer(trained, title, inputs.paths)


COMMANDS = SegmentationCommands()
