"""Detection as the training loop sees it: a detector, its sets and their scores."""

from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from latentgnn.tasks.detection.coco import CocoAnnotations, CocoTrainingSet, CocoValidationSet
from latentgnn.tasks.detection.config import DetectionConfig
from latentgnn.tasks.detection.evaluation import CocoEvaluator
from latentgnn.tasks.detection.results import Kind, Record
from latentgnn.tasks.detection.scores import Scores
from latentgnn.tasks.detection.tiles import Tiling, detect_in_tiles
from latentgnn.tasks.images import read_image
from latentgnn.tasks.tars import file_of
from latentgnn.training.fingerprint import Fingerprint
from latentgnn.training.fingerprint import Record as Source
from latentgnn.training.large_models import units
from latentgnn.training.task import TrainingSet, ValidationSet

Batch = tuple[list[Tensor | Path], list[dict[str, Any]]]


def kinds_of_detector(detector: str) -> tuple[Kind, ...]:
    """What a detector's results are scored for: boxes, and masks where it makes some."""
    return ("bbox", "segm") if detector == "mask_rcnn" else ("bbox",)


def found_in(
    model: nn.Module,
    images: Sequence[Tensor | Path],
    targets: Sequence[Mapping[str, Any]],
    config: DetectionConfig,
    evaluator: CocoEvaluator,
    category_of_label: Mapping[int, int],
) -> list[Record]:
    """COCO-results records of what a model finds in samples of a `CocoValidationSet`.

    Args:
        model: a detector in evaluation mode.
        images: on its device; or paths, which are looked at by tiles.
        targets: the samples' other half.
        config: says how images are looked at.
        evaluator: makes the records.
        category_of_label: of the model's training set.
    """
    tiling = Tiling.of(config.evaluation)
    if tiling is None:
        return evaluator.results_of(model(images), [target["image_id"] for target in targets], category_of_label)
    device = next(model.parameters()).device
    records: list[Record] = []
    for path, target in zip(images, targets, strict=True):
        assert isinstance(path, Path)
        height, width = target["size"]

        def records_of(output: Mapping[str, Tensor], image_id: int = target["image_id"]) -> list[Record]:
            return evaluator.results_of([output], [image_id], category_of_label)

        records += detect_in_tiles(
            model,
            read_image(path, size=(width, height)),
            tiling,
            records_of,
            device=device,
            nms_threshold=config.model.nms_threshold,
        )
    return records


class DetectionTask:
    """A `latentgnn.training.task.TrainingTask` on COCO-format data.

    Args:
        model: with torchvision's interface.
        config: the run.
        train: what it learns from.
        val: what it is scored on; categories that ``train`` lacks are never found there.
        trained: names of the parameters that began with trained weights.

    Attributes:
        scores: of the last validation in this process; ``None`` before it.
        results: its COCO-results records.
        evaluator: scores on ``val``.
    """

    def __init__(
        self,
        model: nn.Module,
        config: DetectionConfig,
        *,
        train: CocoAnnotations,
        val: CocoAnnotations,
        trained: Collection[str] = (),
    ) -> None:
        kinds = kinds_of_detector(config.model.detector)
        self.model = model
        self._config = config
        self.monitor = f"{kinds[-1]}/AP"
        self.trained = trained
        self.training_set: TrainingSet = CocoTrainingSet(
            train,
            augment=config.data.augment,
            seed=config.training.seed,
            crop=config.data.crop,
            group_by_aspect=config.data.group_by_aspect,
        )
        self.validation_set: ValidationSet = CocoValidationSet(val, in_tiles=config.evaluation.tiles is not None)
        self.scores: Scores | None = None
        self.results: Sequence[Record] = ()
        self._category_of_label = train.category_of_label
        self._sets = {"training set": train, "validation set": val}
        # The embedded set is the same wherever and whenever it is made.
        self._is_embedded = config.data.root is None
        self.evaluator = CocoEvaluator(
            val.dataset,
            kinds=kinds,
            max_detections=config.evaluation.max_detections,
            per_category=config.evaluation.per_category,
        )

    def units(self) -> list[nn.Module]:
        """The residual blocks of the backbone, or what it has of the kind."""
        return units(self.model.backbone.body)  # type: ignore[arg-type,union-attr]

    def collate(self, samples: list[Any]) -> Batch:
        """Images of any sizes stay apart; the detector pads them."""
        return [image for image, _ in samples], [target for _, target in samples]

    def sample_ids(self, batch: Batch) -> list[Any]:
        """The ids of the images."""
        return [target["image_id"] for target in batch[1]]

    def losses(self, batch: Batch) -> dict[str, Tensor]:
        """The detector's losses, under its names without ``loss_``."""
        losses: dict[str, Tensor] = self.model(*batch)
        return {name.removeprefix("loss_"): loss for name, loss in losses.items()}

    def predict(self, batch: Batch) -> list[Record]:
        """COCO-results records of the detections in all images."""
        return found_in(self.model, *batch, self._config, self.evaluator, self._category_of_label)

    def score(self, results: Sequence[Record]) -> dict[str, float]:
        """COCO's figures."""
        self.results = results
        self.scores = self.evaluator.score(results)
        return self.scores.metrics

    def fingerprints(self) -> dict[str, Fingerprint]:
        """What is annotated on each image, and its file."""
        return {
            name: Fingerprint.of(annotations.folder, _sources(annotations), times=not self._is_embedded)
            for name, annotations in self._sets.items()
        }


def _sources(annotations: CocoAnnotations) -> Iterator[Source]:
    for image in annotations.images:
        objects = [
            [annotation.get(key) for key in ("id", "category_id", "bbox", "iscrowd", "segmentation")]
            for annotation in annotations.annotations_of(image.id)
        ]
        yield Source(
            name=image.file_name, content=[image.id, image.width, image.height, objects], files=[file_of(image.path)]
        )
