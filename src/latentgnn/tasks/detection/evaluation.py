"""COCO's figures for boxes and masks, computed by faster-coco-eval; used by training, ``evaluate`` and the tests."""

import itertools
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, get_args

import numpy as np
from faster_coco_eval import COCO, COCOeval_faster
from faster_coco_eval.core import mask as rle_codec
from numpy.typing import NDArray
from torch import Tensor

from latentgnn.errors import UserError
from latentgnn.tasks.detection.results import Kind, Record, check_results, check_segmentation, records_of
from latentgnn.tasks.detection.scores import AREAS, Scores
from latentgnn.tasks.detection.segmentations import plain_rle, to_rle
from latentgnn.training.figures import mean_of_defined


class Match(NamedTuple):
    """An object and its detection; or an object without a detection, or a detection without an object.

    Args:
        image_id: id of the image.
        truth: category id of the object.
        found: category id of the detection.
    """

    image_id: int
    truth: int | None
    found: int | None


class CocoEvaluator:
    """Scores detections against a COCO-format ground truth.

    AP and the figures by area use the last of the limits, whatever it is.

    Args:
        dataset: the ground truth as read from a COCO JSON file; it is not modified.
        kinds: ``bbox`` for boxes, ``segm`` for masks.
        max_detections: limits of detections per image, ascending.
        per_category: also report every category's AP and AP50.

    Raises:
        UserError: if the ground truth has no objects, or its records lack what ``kinds`` needs.
        ValueError: if ``kinds`` is empty or contains another word, or the limits do not ascend.

    Attributes:
        category_names: names by category id, ascending; names that occur several times are made unique by the id.

    Example:
        >>> evaluator = CocoEvaluator(json.loads(Path("instances_val2017.json").read_text()))  # doctest: +SKIP
        >>> print(evaluator.score(load_results("results.json", evaluator.dataset)).table())  # doctest: +SKIP
    """

    def __init__(
        self,
        dataset: Mapping[str, Any],
        *,
        kinds: Sequence[Kind] = ("bbox", "segm"),
        max_detections: Sequence[int] = (1, 10, 100),
        per_category: bool = False,
    ) -> None:
        if not kinds or not set(kinds) <= set(get_args(Kind)):
            raise ValueError(f"kinds must be some of 'bbox' and 'segm', not {tuple(kinds)!r}")
        limits = tuple(max_detections)
        if not limits or limits[0] < 1 or any(a >= b for a, b in itertools.pairwise(limits)):
            raise ValueError(f"max_detections must be positive and ascending, such as (1, 10, 100), not {limits!r}")
        if missing := [key for key in ("images", "annotations", "categories") if key not in dataset]:
            raise UserError(f"the ground truth has no {' and no '.join(map(repr, missing))}: not COCO instances")
        self.dataset = dataset
        self.kinds = tuple(kinds)
        self.max_detections = limits
        self.per_category = per_category
        self._images = {int(image["id"]): {**image, "id": int(image["id"])} for image in dataset["images"]}
        self._categories = sorted(dataset["categories"], key=lambda category: int(category["id"]))
        self._truth = self._ground_truth()
        count = Counter(category["name"] for category in self._categories)
        self.category_names = {
            int(c["id"]): c["name"] if count[c["name"]] == 1 else f"{c['name']} ({c['id']})" for c in self._categories
        }

    def results_of(
        self, outputs: Sequence[Mapping[str, Tensor]], image_ids: Sequence[int], category_of_label: Mapping[int, int]
    ) -> list[Record]:
        """Convert a torchvision detector's outputs to COCO-results records (see `records_of`).

        Detections of categories that the ground truth does not have are omitted: COCO's figures do not count them.
        """
        if len(outputs) != len(image_ids):
            raise ValueError(f"{len(outputs)} outputs came with {len(image_ids)} image ids; one id an output is needed")
        known = {int(category["id"]) for category in self._categories}
        pairs = zip(outputs, image_ids, strict=True)
        records = [record for output, i in pairs for record in records_of(output, i, category_of_label)]
        return [record for record in records if record["category_id"] in known]

    def score(self, results: Sequence[Record]) -> Scores:
        """Return the 12 COCO figures of each kind; the results are not modified.

        Args:
            results: COCO-results records of any images, in any order; images without records count as having no
                detections.

        Raises:
            UserError: if a record is malformed, or lacks what is scored.
        """
        check_results(results, self.dataset, "results")
        metrics: dict[str, float] = {}
        per_category: dict[str, dict[str, float]] = {}
        if self.per_category:
            per_category = {name: {} for name in self.category_names.values()}
        precision: dict[Kind, NDArray[np.float64]] = {}
        for kind in self.kinds:
            precision_TRKAM, recall_TKAM = self._evaluate(kind, results)
            precision[kind] = precision_TRKAM[..., 0, -1]
            metrics |= {f"{kind}/{name}": value for name, value in self._figures(precision_TRKAM, recall_TKAM).items()}
            for k, figures in enumerate(per_category.values()):
                figures[f"{kind}/AP"] = mean_of_defined(precision_TRKAM[:, :, k, 0, -1])
                figures[f"{kind}/AP50"] = mean_of_defined(precision_TRKAM[0, :, k, 0, -1])
        return Scores(
            metrics=metrics,
            per_category=per_category,
            kinds=self.kinds,
            max_detections=self.max_detections,
            precision=precision,
        )

    def matches(self, kind: Kind, results: Sequence[Record], *, iou: float = 0.5) -> list[Match]:
        """Match detections with objects; crowds, and detections within them, are omitted.

        First, detections are matched as in COCO's figures, within each category and by score. Then the remaining
        objects and detections are matched in the same way regardless of category; such a detection found an object but
        gave it the wrong category.

        Args:
            kind: whether overlap is that of boxes or of masks.
            results: valid COCO-results records, as `score` takes them; all of them count, whatever their scores.
            iou: minimum overlap.
        """
        detections = {
            detection["id"]: detection
            for detection in (self._detection(kind, index, record) for index, record in enumerate(results))
        }
        objects = dict(self._truth.anns)
        crowds = {id for id, annotation in objects.items() if annotation["iscrowd"]}
        matches = []
        for by_category in (True, False):
            if not by_category:
                objects = {id: annotation for id, annotation in objects.items() if id not in crowds}
            for found, truth in self._pairs(kind, objects, detections, iou, by_category=by_category):
                detection, annotation = detections.pop(found), objects[truth]
                if truth not in crowds:
                    # A crowd may match several detections, so it stays.
                    del objects[truth]
                    matches.append(Match(annotation["image_id"], annotation["category_id"], detection["category_id"]))
        matches += [Match(annotation["image_id"], annotation["category_id"], None) for annotation in objects.values()]
        matches += [Match(detection["image_id"], None, detection["category_id"]) for detection in detections.values()]
        return matches

    def _pairs(
        self,
        kind: Kind,
        objects: Mapping[int, Record],
        detections: Mapping[int, Record],
        iou: float,
        *,
        by_category: bool,
    ) -> list[tuple[int, int]]:
        """Return pairs of a detection's id and the id of the object that it matches."""
        truth, found = (self._index([dict(record) for record in records.values()]) for records in (objects, detections))
        evaluation = COCOeval_faster(truth, found, kind, print_function=_silent)
        parameters = evaluation.params
        parameters.useCats = int(by_category)
        parameters.iouThrs = np.array([iou])
        parameters.maxDets = [self.max_detections[-1]]
        parameters.areaRng, parameters.areaRngLbl = parameters.areaRng[:1], parameters.areaRngLbl[:1]
        evaluation.evaluate()
        evaluation.accumulate()
        pairs = (ids.split("_") for ids in evaluation.eval["matched"])
        return [(int(detection), int(annotation)) for detection, annotation in pairs]

    def _figures(self, precision_TRKAM: NDArray[np.float64], recall_TKAM: NDArray[np.float64]) -> dict[str, float]:
        """Means over T IoU thresholds, R recalls and K categories, at A = all, small, medium, large and M limits."""
        figures = {
            "AP": mean_of_defined(precision_TRKAM[..., 0, -1]),
            "AP50": mean_of_defined(precision_TRKAM[0, ..., 0, -1]),
            "AP75": mean_of_defined(precision_TRKAM[5, ..., 0, -1]),
        }
        figures |= {f"AP_{area}": mean_of_defined(precision_TRKAM[..., a, -1]) for a, area in enumerate(AREAS, 1)}
        figures |= {
            f"AR_{limit}": mean_of_defined(recall_TKAM[..., 0, m]) for m, limit in enumerate(self.max_detections)
        }
        figures |= {f"AR_{area}": mean_of_defined(recall_TKAM[..., a, -1]) for a, area in enumerate(AREAS, 1)}
        return figures

    def _evaluate(self, kind: Kind, results: Sequence[Record]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        detections = self._index([self._detection(kind, i, record) for i, record in enumerate(results)])
        evaluation = COCOeval_faster(self._truth, detections, kind, print_function=_silent)
        evaluation.params.maxDets = list(self.max_detections)
        evaluation.evaluate()
        evaluation.accumulate()
        return evaluation.eval["precision"], evaluation.eval["recall"]

    def _detection(self, kind: Kind, index: int, record: Record) -> Record:
        detection = {key: record[key] for key in ("image_id", "category_id", "score")}
        where = f"results: record {index}"
        rle = None
        if kind == "segm" or "bbox" not in record:
            if "segmentation" not in record:
                raise UserError(f"{where} has no 'segmentation'; score boxes only (kinds=('bbox',)), or write masks")
            rle = _compressed(record["segmentation"], self._images[record["image_id"]])
        if kind == "segm":
            # The mask's own area decides between small, medium and large, even if the record has a box.
            return detection | {"id": index + 1, "segmentation": rle, "area": float(rle_codec.area(rle))}
        if rle is not None:
            return detection | {"id": index + 1, "bbox": _box_of(rle), "area": float(rle_codec.area(rle))}
        box = record["bbox"]
        return detection | {"id": index + 1, "bbox": box, "area": box[2] * box[3]}

    def _ground_truth(self) -> Any:
        categories = {int(category["id"]) for category in self._categories}
        annotations: list[Record] = []
        for annotation in self.dataset["annotations"]:
            image_id, category_id = int(annotation["image_id"]), int(annotation["category_id"])
            if image_id not in self._images or category_id not in categories:
                continue
            where = f"ground truth: annotation {annotation.get('id')}"
            box, area, rle = annotation.get("bbox"), annotation.get("area"), None
            if "segm" in self.kinds or not box:
                if not annotation.get("segmentation"):
                    raise UserError(f"{where} has no 'segmentation'; mend it, or give it a 'bbox' and score boxes only")
                check_segmentation(annotation["segmentation"], self._images[image_id], where)
                rle = _compressed(annotation["segmentation"], self._images[image_id])
                box = box or _box_of(rle)
            if area is None:
                area = box[2] * box[3] if rle is None else float(rle_codec.area(rle))
            annotations.append(
                {
                    # Renumbered: the evaluator takes id 0 for "not matched", and confuses duplicate ids.
                    "id": len(annotations) + 1,
                    "image_id": image_id,
                    "category_id": category_id,
                    "bbox": list(box),
                    "segmentation": rle,
                    "area": area,
                    "iscrowd": int(annotation.get("iscrowd", 0)),
                }
            )
        if all(annotation["iscrowd"] for annotation in annotations):
            raise UserError(
                f"the ground truth has {len(self._images)} images and no objects to find (crowds aside), "
                "so no score is defined; check that this is the right annotation file"
            )
        return self._index(annotations)

    def _index(self, annotations: list[Record]) -> Any:
        return COCO(
            {"images": list(self._images.values()), "categories": self._categories, "annotations": annotations},
            print_function=_silent,
        )


def _compressed(segmentation: Any, image: Mapping[str, Any]) -> dict[str, Any]:
    """Convert a valid segmentation (polygons, or RLE of either form) to compressed RLE."""
    return plain_rle(to_rle(segmentation, int(image["height"]), int(image["width"])))


def _box_of(rle: Mapping[str, Any]) -> list[float]:
    return [float(value) for value in rle_codec.toBbox(rle)]


def _silent(*_: object) -> None:
    """Replaces the evaluator's own printing; `Scores.table` shows the figures."""
