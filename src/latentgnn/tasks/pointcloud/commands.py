"""Commands of point cloud segmentation; see `latentgnn.tasks.class_commands`."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from latentgnn.errors import UserError
from latentgnn.progress import parts_done
from latentgnn.tasks.checks import Split
from latentgnn.tasks.class_commands import ClassCommands
from latentgnn.tasks.class_scores import Result
from latentgnn.tasks.classes import class_names
from latentgnn.tasks.commands import Shared
from latentgnn.tasks.explaining import Explained, spread
from latentgnn.tasks.looking import Inputs
from latentgnn.tasks.pointcloud.check import Report, check_split, load_set
from latentgnn.tasks.pointcloud.config import DataConfig, PointCloudConfig
from latentgnn.tasks.pointcloud.crop import Place, take_crop
from latentgnn.tasks.pointcloud.datasets import ScanSet
from latentgnn.tasks.pointcloud.explaining import explain_scan
from latentgnn.tasks.pointcloud.exploring import ScanExplorer
from latentgnn.tasks.pointcloud.layouts import DATASET_FILE, DATASET_SETTINGS
from latentgnn.tasks.pointcloud.loading import TrainedSegmenter, load_segmenter
from latentgnn.tasks.pointcloud.model import build_point_network
from latentgnn.tasks.pointcloud.neighbors import Hierarchy
from latentgnn.tasks.pointcloud.pictures import draw_scan
from latentgnn.tasks.pointcloud.prediction import Tiles, expand_scans, predict_files
from latentgnn.tasks.pointcloud.programs import point_program
from latentgnn.tasks.pointcloud.scans import Scan
from latentgnn.tasks.pointcloud.start import start_from
from latentgnn.tasks.pointcloud.task import PointCloudTask, WholeScans, score_scan
from latentgnn.tasks.starting import begun_trained
from latentgnn.training.card import Subject
from latentgnn.training.checkpoints import Checkpoint
from latentgnn.training.processes import Processes
from latentgnn.training.runs import RunFolder, is_first_process

USAGE = """import latentgnn

model = latentgnn.load_run(".")  # this folder; or its name on the hub, with from_hub=True
probabilities = model.predict("scan.laz")  # (points, classes), in the order of model.class_names"""
"""Usage example of a model card."""


class PointCloudCommands(ClassCommands[PointCloudConfig, ScanSet, TrainedSegmenter]):
    kind = "scan"
    title = "point clouds"
    unit = "points"
    each = "every point of a scan"
    may_change = ("data.root", "data.cached_points", "data.overlap", "evaluation")
    most_titles = 12

    def load_split(self, config: PointCloudConfig, split: Split) -> ScanSet:
        scans = load_set(config.data, split)
        if split == "train" and is_first_process() and (replaced := _replaced(config.data, scans.config)):
            print(
                f"{', '.join(replaced)}: as {Path(config.data.root or '') / DATASET_FILE} says; to have your own "
                "settings win: --data.dataset_yaml fills"
            )
        return scans

    def check_split(self, config: PointCloudConfig, split: Split) -> Report:
        return check_split(config.data, split)

    def content(self, found: ScanSet, split: Split) -> str:
        points = 0 if found.counts is None else int(found.counts.sum())
        return f"{split}: {len(found)} scans, {points:,} labelled points"

    def refuse_others(self, trained: TrainedSegmenter, found: ScanSet) -> None:
        # The folder's own dataset.yaml replaces the model's settings, so the two must agree; only ids may differ.
        data = trained.config.data
        pairs = {
            "classes": (class_names(data.classes), found.class_names),
            "features": (data.features, found.config.features),
        }
        for name, (known, present) in pairs.items():
            if known != present:
                raise UserError(
                    f"the model was trained for the {name} {', '.join(known)}, but the scans in {data.root} have "
                    f"{', '.join(present)}; settings in a dataset.yaml there are ignored with --data.dataset_yaml fills"
                )

    def task(
        self, config: PointCloudConfig, run: RunFolder, train: ScanSet, val: ScanSet, *, goes_on: bool
    ) -> PointCloudTask:
        # Seeds the initial weights; the loop seeds each step itself.
        torch.manual_seed(config.training.seed)
        model = build_point_network(config.model, num_features=train.num_features, num_classes=train.num_classes)
        trained: frozenset[str] = frozenset()
        if config.model.weights is not None:
            trained = begun_trained(run, lambda: start_from(model, config), goes_on=goes_on)
        return PointCloudTask(model, config, train=train, val=val, trained=trained)

    def score(self, trained: TrainedSegmenter, found: ScanSet, index: int, *, keep: bool) -> Result:
        return score_scan(trained.model, WholeScans(found)[index], trained.config, keep=keep)

    def picture(self, found: ScanSet, index: int, classes: NDArray[np.int64]) -> bytes:
        scan = found.scan(index)
        return draw_scan(scan.points, found.class_names, predicted=classes, labels=scan.labels)

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
        config = trained.config
        side = config.evaluation.tiles
        with parts_done() as update:
            tiles = (
                Tiles(
                    side=side,
                    on_points=lambda path, doing, *progress: update(f"{path.name}, {doing}", *progress),
                    say=print,
                )
                if side is not None
                else None
            )
            predict_files(
                trained.model,
                paths,
                config=config.seen_by_crops,
                out=out,
                overwrite=overwrite,
                votes=config.evaluation.votes,
                tiles=tiles,
                pictures=pictures,
                on_scan=self.say,
                processes=processes,
            )

    def load_trained(self, config: PointCloudConfig, checkpoint: Checkpoint) -> TrainedSegmenter:
        return load_segmenter(config, checkpoint)

    def shared(self, trained: TrainedSegmenter) -> Shared:
        features, hierarchy = trained.model.example_input()
        return Shared(
            subject=Subject(
                title="point network",
                task="point-cloud-segmentation",
                pipeline=False,
                classes=trained.class_names,
                usage=USAGE,
            ),
            program=lambda: point_program(trained.model),
            run=lambda model: [model(features, hierarchy)],
        )

    def expand(self, inputs: Sequence[str]) -> list[Path]:
        return expand_scans(inputs)

    def read(self, trained: TrainedSegmenter, path: Path) -> Scan:
        return trained.transform.scan(path)

    def validation(self, trained: TrainedSegmenter, source: Path, most: int, stack: ExitStack) -> Inputs:
        val_set = self.matching(trained)
        places = spread(len(val_set), most)
        sources = [val_set.sources[place] for place in places]
        names, paths = [source.name for source in sources], [source.path for source in sources]
        return Inputs(names, paths, lambda number: val_set.scan(places[number]))

    def network_input(self, trained: TrainedSegmenter, sample: Scan) -> tuple[torch.Tensor, Hierarchy]:
        return take_crop(trained, sample.points, sample.features, ()).inputs()

    def look(
        self, trained: TrainedSegmenter, path: Path, *, blocks: Sequence[str], places: Sequence[Place]
    ) -> Iterator[Explained]:
        return explain_scan(trained, path, blocks=blocks, places=places)

    def explorer(self, trained: TrainedSegmenter, title: str, inputs: Inputs) -> ScanExplorer:
        return ScanExplorer(trained, title, inputs.names, inputs.read)


def _replaced(given: DataConfig, used: DataConfig) -> list[str]:
    """The settings that were replaced by those of the data folder."""
    return [
        f"data.{name}"
        for name in DATASET_SETTINGS
        if getattr(given, name) and getattr(given, name) != getattr(used, name)
    ]


COMMANDS = PointCloudCommands()
