"""Measures how much two outputs of a network differ, whatever their structure."""

from collections.abc import Mapping, Sequence
from typing import Any, TypeGuard

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten

from latentgnn.errors import require

_SAME_OBJECT = 0.5
"""Boxes of one category that overlap by this much (intersection over union) belong to the same object."""


def difference(output: Any, other: Any) -> float | None:
    """Return how much another output differs from an output; 0 if they are equal.

    For tensors, in any nesting of dicts, lists and tuples: the mean over tensors of ||other - output|| / ||output||;
    for integers, the fraction of elements that differ. For detections, one dict per image with ``boxes``, ``labels``
    and ``scores``: 1 minus their agreement, which is twice the sum of min(score, other score) over pairs of the same
    object, divided by the sum of all scores of both.

    Returns:
        ``None`` if the two cannot be compared: tensors of different shapes, or no tensors.

    Example:
        >>> difference({"out": torch.tensor([3.0, 4.0])}, {"out": torch.tensor([3.0, 3.0])})
        0.2
    """
    if _are_detections(output) and _are_detections(other):
        return _detection_difference(output, other)
    tensors = [
        [leaf.detach() for leaf in tree_flatten(side)[0] if isinstance(leaf, Tensor)] for side in (output, other)
    ]
    if not tensors[0] or [t.shape for t in tensors[0]] != [t.shape for t in tensors[1]]:
        return None
    parts = [_tensor_difference(*pair) for pair in zip(*tensors, strict=True) if pair[0].numel()]
    return sum(parts) / len(parts) if parts else None


def _tensor_difference(tensor: Tensor, other: Tensor) -> float:
    if not tensor.is_floating_point():
        return float((tensor != other).double().mean())
    length = float(tensor.double().norm())
    change = float((other.double() - tensor.double()).norm())
    return change / length if length else float(change > 0)


def _are_detections(output: Any) -> TypeGuard[Sequence[Mapping[str, Tensor]]]:
    return (
        isinstance(output, list | tuple)
        and len(output) > 0
        and all(isinstance(found, Mapping) and {"boxes", "labels", "scores"} <= set(found) for found in output)
    )


def _detection_difference(output: Sequence[Mapping[str, Tensor]], other: Sequence[Mapping[str, Tensor]]) -> float:
    total = sum(float(found["scores"].double().sum()) for found in (*output, *other))
    common = sum(_common_score(*pair) for pair in zip(output, other, strict=True))
    # Summing the same numbers in another order can give a slightly different result.
    return min(max(1 - 2 * common / total, 0.0), 1.0) if total else 0.0


def _common_score(found: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> float:
    """The sum over pairs of the smaller score; boxes with high scores choose first, each the best one that is left."""
    if not len(found["boxes"]) or not len(other["boxes"]):
        return 0.0
    box_iou = require("torchvision.ops", extra="detection").box_iou
    overlap: Tensor = box_iou(found["boxes"].double(), other["boxes"].double())
    overlap = overlap.masked_fill(found["labels"][:, None] != other["labels"], 0)
    common = 0.0
    for index in found["scores"].argsort(descending=True).tolist():
        best = int(overlap[index].argmax())
        if overlap[index, best] >= _SAME_OBJECT:
            common += float(torch.minimum(found["scores"][index], other["scores"][best]))
            overlap[:, best] = 0
    return common
