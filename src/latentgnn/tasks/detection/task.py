"""Detection as a task of the training loop: a detector, its data sets and their scores."""

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
    """Return what a detector's results are scored for: boxes, and masks if it makes them."""
    return ("bbox", "segm") if detector == "mask_rcnn" else ("bbox",)


def found_in(
    model: nn.Module,
    images: Sequence[Tensor | Path],
    targets: Sequence[Mapping[str, Any]],
    config: DetectionConfig,
    evaluator: CocoEvaluator,
    category_of_label: Mapping[int, int],
) -> list[Record]:
    """Return COCO-results records of a model's detections in samples of a `CocoValidationSet`.

    Args:
        model: a detector in evaluation mode.
        images: images on its device; or paths, which are processed in tiles.
        targets: the targets of the samples.
        config: says how images are processed.
        evaluator: makes the records.
        category_of_label: mapping of the model's training set.
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
        model: a detector with torchvision's interface.
        config: the run's configuration.
        train: the training set.
        val: the validation set; categories that ``train`` lacks are never found in it.
        trained: names of the parameters that started from trained weights.

    Attributes:
        scores: scores of the last validation in this process; ``None`` before it.
        results: COCO-results records of that validation.
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
        # The embedded set is the same wherever and whenever it is generated.
        self._is_embedded = config.data.root is None
        self.evaluator = CocoEvaluator(
            val.dataset,
            kinds=kinds,
            max_detections=config.evaluation.max_detections,
            per_category=config.evaluation.per_category,
        )

    def units(self) -> list[nn.Module]:
        """Return the residual blocks of the backbone, or the corresponding modules."""
        return units(self.model.backbone.body)  # type: ignore[arg-type,union-attr]

    def collate(self, samples: list[Any]) -> Batch:
        """Keep images as a list, as they differ in size; the detector pads them."""
        return [image for image, _ in samples], [target for _, target in samples]

    def sample_ids(self, batch: Batch) -> list[Any]:
        """Return the ids of the images."""
        return [target["image_id"] for target in batch[1]]

    def losses(self, batch: Batch) -> dict[str, Tensor]:
        """Return the detector's losses, with their names without ``loss_``."""
        losses: dict[str, Tensor] = self.model(*batch)
        return {name.removeprefix("loss_"): loss for name, loss in losses.items()}

    def predict(self, batch: Batch) -> list[Record]:
        """Return COCO-results records of the detections in all images."""
        return found_in(self.model, *batch, self._config, self.evaluator, self._category_of_label)

    def score(self, results: Sequence[Record]) -> dict[str, float]:
        """Return COCO's figures."""
        self.results = results
        self.scores = self.evaluator.score(results)
        return self.scores.metrics

    def fingerprints(self) -> dict[str, Fingerprint]:
        """Return fingerprints of the annotations on each image, and of its file."""
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
