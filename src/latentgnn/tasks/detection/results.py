"""Detections as COCO-results records: converted from a detector's outputs, or read from files."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from faster_coco_eval.core import mask as rle_codec
from torch import Tensor

from latentgnn.errors import UserError
from latentgnn.files.plain_values import shown
from latentgnn.files.reading import read_json
from latentgnn.tasks.detection.segmentations import plain_rle, segmentation_fault

Kind = Literal["bbox", "segm"]
Record = dict[str, Any]


def records_of(output: Mapping[str, Tensor], image_id: int, category_of_label: Mapping[int, int]) -> list[Record]:
    """Convert a torchvision detector's output on one image to COCO-results records.

    Args:
        output: ``boxes`` (n, 4) as x1, y1, x2, y2, ``labels`` (n,), ``scores`` (n,) and, from a detector with masks,
            ``masks`` (n, 1, height, width) in 0..1, thresholded at 0.5.
        image_id: id for the records.
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
    """Convert bool masks (n, height, width) to compressed RLE that JSON can store."""
    # The codec needs height as the fastest axis: one transposed copy here instead of one per mask there.
    columns_NWH = masks_NHW.detach().to(torch.uint8).transpose(1, 2).contiguous().cpu().numpy()
    return [plain_rle(rle) for rle in rle_codec.encode(columns_NWH.transpose(2, 1, 0))]


def load_results(path: Path | str, dataset: Mapping[str, Any]) -> list[Record]:
    """Read a COCO-results JSON file and check every record against the ground truth.

    Args:
        path: a list of records with ``image_id``, ``category_id``, ``score``, and ``bbox`` or ``segmentation``.
        dataset: the ground truth as read from a COCO JSON file.

    Raises:
        UserError: if the file is missing or malformed, a record lacks a key, its image or category is unknown, or its
            segmentation cannot be decoded.
    """
    results = read_json(path)
    if isinstance(results, dict):
        hint = "; this looks like an annotation file" if "annotations" in results else ""
        raise UserError(f"{path}: a list of result records was expected, not an object{hint}")
    if not isinstance(results, list):
        raise UserError(f"{path}: a list of result records was expected, not {type(results).__name__}")
    check_results(results, dataset, str(path))
    return results


def kinds_of(results: Sequence[Record]) -> tuple[Kind, ...]:
    """Return what a results file can be scored for: masks only if every record has one."""
    return ("bbox", "segm") if all("segmentation" in record for record in results) else ("bbox",)


def check_results(results: Sequence[Any], dataset: Mapping[str, Any], source: str) -> None:
    """Check every record against the ground truth.

    Args:
        results: the records.
        dataset: see `load_results`.
        source: name of their source, for errors.

    Raises:
        UserError: see `load_results`.
    """
    images = {int(image["id"]): image for image in dataset["images"]}
    categories = {int(category["id"]) for category in dataset["categories"]}
    for index, record in enumerate(results):
        where = f"{source}: record {index}"
        if not isinstance(record, dict):
            raise UserError(f"{where} is {type(record).__name__}, not an object")
        if missing := [key for key in ("image_id", "category_id", "score") if key not in record]:
            raise UserError(f"{where} has no {' and no '.join(map(repr, missing))}; it has {', '.join(record)}")
        # Lists cannot be looked up, and floats equal the integers of the same value.
        if not _is_id(record["image_id"]) or record["image_id"] not in images:
            raise UserError(
                f"{where} is for image {shown(record['image_id'])}, which is not among the {len(images)} "
                "annotated images"
            )
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
            check_segmentation(record["segmentation"], images[record["image_id"]], where)


def check_segmentation(segmentation: Any, image: Mapping[str, Any], where: str) -> None:
    """Refuse a segmentation that does not decode to a mask of the image's size."""
    # A detector may find an object without any mask pixel.
    fault = segmentation_fault(segmentation, int(image["width"]), int(image["height"]), may_be_empty=True)
    if fault is not None:
        raise UserError(f"{where} has a segmentation that cannot be used: {fault}")


def _is_id(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _finite(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
