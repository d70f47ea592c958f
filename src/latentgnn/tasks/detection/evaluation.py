"""COCO's figures for boxes and masks, by faster-coco-eval. Training, ``evaluate`` and the tests score through here."""

import itertools
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from faster_coco_eval import COCO, COCOeval_faster
from faster_coco_eval.core import mask as rle_codec
from numpy.typing import NDArray
from torch import Tensor

from latentgnn.errors import UserError
from latentgnn.reading import read_json, shown
from latentgnn.tasks.detection.segmentations import plain_rle, segmentation_fault, to_rle
from latentgnn.tasks.figures import figure_text, mean_of_defined

Kind = Literal["bbox", "segm"]
Record = dict[str, Any]

_AREAS = ("small", "medium", "large")
_ROW_NAMES = {"bbox": "box", "segm": "mask"}


@dataclass(frozen=True, kw_only=True)
class Scores:
    """The figures of an evaluation.

    Args:
        metrics: ``bbox/AP``, ``bbox/AP50``, ``bbox/AP75``, ``bbox/AP_small``, ``bbox/AP_medium``, ``bbox/AP_large``,
            ``bbox/AR_1``, ``bbox/AR_10``, ``bbox/AR_100`` (by the limits in use), ``bbox/AR_small``,
            ``bbox/AR_medium``, ``bbox/AR_large``; likewise ``segm/...``. -1 where no ground truth defines the figure.
        per_category: for each category's name its ``bbox/AP``, ``bbox/AP50`` and so on; empty unless asked for.
        kinds: what was scored.
        max_detections: limits of detections an image.
        precision: of each kind, at T = 10 IoU thresholds from 0.5 to 0.95, R = 101 recalls from 0 to 1 and K categories
            in the order of their ids, float64, shape (T, R, K); -1 where a category has no ground truth.
    """

    metrics: dict[str, float]
    per_category: dict[str, dict[str, float]] = field(default_factory=dict)
    kinds: tuple[Kind, ...] = ("bbox", "segm")
    max_detections: tuple[int, ...] = (1, 10, 100)
    precision: Mapping[Kind, NDArray[np.float64]] = field(default_factory=dict, compare=False, repr=False)

    def table(self) -> str:
        """The figures as a plain text table, ``APs`` for ``AP_small`` and so on; ``n/a`` for undefined ones."""
        names = [name.partition("/")[2] for name in self.metrics if name.startswith(f"{self.kinds[0]}/")]
        rows = [["", *map(_short, names)]]
        rows += [
            [_ROW_NAMES[kind], *(figure_text(self.metrics[f"{kind}/{name}"]) for name in names)] for kind in self.kinds
        ]
        text = _aligned(rows)
        if self.per_category:
            columns = [f"{kind}/{name}" for kind in self.kinds for name in ("AP", "AP50")]
            rows = [["category", *(f"{_ROW_NAMES[kind]} {name}" for kind in self.kinds for name in ("AP", "AP50"))]]
            rows += [[name, *(figure_text(values[c]) for c in columns)] for name, values in self.per_category.items()]
            text += "\n\n" + _aligned(rows)
        return text

    def to_json(self) -> dict[str, Any]:
        """The figures as plain data for a JSON file; undefined ones stay -1."""
        data: dict[str, Any] = {"max_detections": list(self.max_detections), "metrics": dict(self.metrics)}
        if self.per_category:
            data["per_category"] = {name: dict(values) for name, values in self.per_category.items()}
        return data


class Match(NamedTuple):
    """An object and the detection that found it; or an object that none found, or a detection that found none.

    Args:
        image_id: of the image.
        truth: the object's category id.
        found: the detection's category id.
    """

    image_id: int
    truth: int | None
    found: int | None


class CocoEvaluator:
    """Scores detections against a COCO-format ground truth.

    AP and the figures by area are taken at the last of the limits, whatever it is.

    Args:
        dataset: the ground truth as read from a COCO JSON file; it is not changed.
        kinds: ``bbox`` for boxes, ``segm`` for masks.
        max_detections: ascending limits of detections an image.
        per_category: also give every category's AP and AP50.

    Raises:
        UserError: the ground truth has no objects, or its records lack what ``kinds`` needs.
        ValueError: ``kinds`` is empty or holds another word, or the limits do not ascend.

    Attributes:
        category_names: by the categories' ids, ascending; names that several have are told apart by the id.

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
        if not kinds or not set(kinds) <= set(_ROW_NAMES):
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
        """A torchvision detector's outputs as COCO-results records (see `records_of`).

        Detections of categories that the ground truth does not have are left out: COCO's figures do not count them.
        """
        if len(outputs) != len(image_ids):
            raise ValueError(f"{len(outputs)} outputs came with {len(image_ids)} image ids; one id an output is needed")
        known = {int(category["id"]) for category in self._categories}
        pairs = zip(outputs, image_ids, strict=True)
        records = [record for output, i in pairs for record in records_of(output, i, category_of_label)]
        return [record for record in records if record["category_id"] in known]

    def score(self, results: Sequence[Record]) -> Scores:
        """The 12 COCO figures of each kind; none of the results is changed.

        Args:
            results: COCO-results records of any number of images, in any order; images without any count as empty.

        Raises:
            UserError: a record is malformed, or lacks what is to be scored.
        """
        _check_results(results, self.dataset, "results")
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
        """Which detection found which object; crowds, and detections within them, are left out.

        First as COCO's figures match, within each category and by score; then objects and detections that are left,
        whatever their categories, in the same way: what stands there was found and called something else.

        Args:
            kind: how overlap is measured.
            results: COCO-results records, known to be sound, as `score` takes them; all of them count, whatever their
                scores.
            iou: the least overlap.
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
                    # A crowd may hold several.
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
        """The ids of detections and of the objects that they are matched with."""
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
        figures |= {f"AP_{area}": mean_of_defined(precision_TRKAM[..., a, -1]) for a, area in enumerate(_AREAS, 1)}
        figures |= {
            f"AR_{limit}": mean_of_defined(recall_TKAM[..., 0, m]) for m, limit in enumerate(self.max_detections)
        }
        figures |= {f"AR_{area}": mean_of_defined(recall_TKAM[..., a, -1]) for a, area in enumerate(_AREAS, 1)}
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
            # The mask's own area decides between small, medium and large, also where the record has a box.
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
                _check_segmentation(annotation["segmentation"], self._images[image_id], where)
                rle = _compressed(annotation["segmentation"], self._images[image_id])
                box = box or _box_of(rle)
            if area is None:
                area = box[2] * box[3] if rle is None else float(rle_codec.area(rle))
            annotations.append(
                {
                    # Numbered anew: the evaluator takes id 0 for "not matched", and mixes up ids that come twice.
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


def records_of(output: Mapping[str, Tensor], image_id: int, category_of_label: Mapping[int, int]) -> list[Record]:
    """A torchvision detector's output on one image as COCO-results records.

    Args:
        output: ``boxes`` (n, 4) as x1, y1, x2, y2, ``labels`` (n,), ``scores`` (n,) and, from a detector with masks,
            ``masks`` (n, 1, height, width) in 0..1, cut at 0.5.
        image_id: of the records.
        category_of_label: the dataset's category id of each label.

    Returns:
        Records with ``image_id``, ``category_id``, ``bbox`` (x, y, width, height), ``score`` and, with masks,
        ``segmentation`` as compressed RLE.
    """
    boxes_N4 = output["boxes"].detach().cpu().double()
    boxes_N4 = torch.cat([boxes_N4[:, :2], boxes_N4[:, 2:] - boxes_N4[:, :2]], dim=1)
    columns = zip(boxes_N4.tolist(), output["labels"].tolist(), output["scores"].tolist(), strict=True)
    records: list[Record] = [
        {"image_id": int(image_id), "category_id": int(category_of_label[label]), "bbox": box, "score": score}
        for box, label, score in columns
    ]
    if "masks" in output and records:
        for record, rle in zip(records, encode_masks(output["masks"][:, 0] > 0.5), strict=True):
            record["segmentation"] = rle
    return records


def encode_masks(masks_NHW: Tensor) -> list[dict[str, Any]]:
    """Bool masks (n, height, width) as compressed RLE, as JSON can hold it."""
    # The codec wants height fastest in memory: one transposed copy here instead of one a mask there.
    columns_NWH = masks_NHW.detach().to(torch.uint8).transpose(1, 2).contiguous().cpu().numpy()
    return [plain_rle(rle) for rle in rle_codec.encode(columns_NWH.transpose(2, 1, 0))]


def load_results(path: Path | str, dataset: Mapping[str, Any]) -> list[Record]:
    """Read a COCO-results JSON file and check every record against the ground truth.

    Args:
        path: a list of records with ``image_id``, ``category_id``, ``score``, and ``bbox`` or ``segmentation``.
        dataset: the ground truth as read from a COCO JSON file.

    Raises:
        UserError: the file is missing or malformed, a record lacks a key, its image or category is unknown, or its
            segmentation does not decode.
    """
    results = read_json(path)
    if isinstance(results, dict):
        hint = "; this looks like an annotation file" if "annotations" in results else ""
        raise UserError(f"{path}: a list of result records was expected, not an object{hint}")
    if not isinstance(results, list):
        raise UserError(f"{path}: a list of result records was expected, not {type(results).__name__}")
    _check_results(results, dataset, str(path))
    return results


def kinds_of(results: Sequence[Record]) -> tuple[Kind, ...]:
    """What a results file can be scored for: masks only where every record has one."""
    return ("bbox", "segm") if all("segmentation" in record for record in results) else ("bbox",)


def _check_results(results: Sequence[Any], dataset: Mapping[str, Any], source: str) -> None:
    images = {int(image["id"]): image for image in dataset["images"]}
    categories = {int(category["id"]) for category in dataset["categories"]}
    for index, record in enumerate(results):
        where = f"{source}: record {index}"
        if not isinstance(record, dict):
            raise UserError(f"{where} is {type(record).__name__}, not an object")
        if missing := [key for key in ("image_id", "category_id", "score") if key not in record]:
            raise UserError(f"{where} has no {' and no '.join(map(repr, missing))}; it has {', '.join(record)}")
        # Lists cannot be looked up, and floats equal the ids that they hold.
        if not _is_id(record["image_id"]) or record["image_id"] not in images:
            raise UserError(f"{where} is for image {shown(record['image_id'])}, which the {len(images)} annotated lack")
        if not _is_id(record["category_id"]) or record["category_id"] not in categories:
            known = ", ".join(map(str, sorted(categories)[:10])) + (", ..." if len(categories) > 10 else "")
            raise UserError(f"{where} has category {shown(record['category_id'])}; the annotations have {known}")
        if not _finite(record["score"]):
            raise UserError(f"{where} has score {shown(record['score'])}; a finite number is needed")
        if "bbox" in record:
            box = record["bbox"]
            if not (isinstance(box, list | tuple) and len(box) == 4 and all(map(_finite, box)) and min(box[2:]) >= 0):
                raise UserError(f"{where} has bbox {shown(box)}; four numbers [x, y, width, height] are needed")
        elif "segmentation" not in record:
            raise UserError(f"{where} has neither 'bbox' nor 'segmentation'; one is needed")
        if "segmentation" in record:
            _check_segmentation(record["segmentation"], images[record["image_id"]], where)


def _check_segmentation(segmentation: Any, image: Mapping[str, Any], where: str) -> None:
    # A detector may find an object and none of its pixels.
    fault = segmentation_fault(segmentation, int(image["width"]), int(image["height"]), may_be_empty=True)
    if fault is not None:
        raise UserError(f"{where} has a segmentation that cannot be used: {fault}")


def _compressed(segmentation: Any, image: Mapping[str, Any]) -> dict[str, Any]:
    """Polygons and RLE of both sorts, known to be sound, as compressed RLE."""
    return plain_rle(to_rle(segmentation, int(image["height"]), int(image["width"])))


def _is_id(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _box_of(rle: Mapping[str, Any]) -> list[float]:
    return [float(value) for value in rle_codec.toBbox(rle)]


def _finite(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _short(name: str) -> str:
    """``AP_small`` as ``APs``, ``AR_100`` as ``AR100``."""
    head, _, tail = name.partition("_")
    return head + (tail[0] if tail in _AREAS else tail)


def _aligned(rows: Sequence[Sequence[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = (
        "  ".join([row[0].ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(row[1:], widths[1:], strict=True))])
        for row in rows
    )
    return "\n".join(line.rstrip() for line in lines)


def _silent(*_: object) -> None:
    """The evaluator's printing, unwanted: figures are shown by `Scores.table`."""
