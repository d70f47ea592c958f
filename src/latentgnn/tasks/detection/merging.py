"""Merges detections of the same object from several tiles of an image.

Two overlapping tiles have both seen the region that they share, so their detections of one object must look alike
there. That is the criterion: the overlap (intersection over union) of the two detections' masks, or boxes, within the
shared region. It works for a whole object and its cut half, for two halves, and for the parts of an object that spans
many tiles. It does not join a small object to a large one around it, unlike comparing the intersection with the smaller
of two detections.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torchvision.ops import batched_nms, box_iou

from latentgnn.tasks.detection.windows import Window, cut_mask, place_mask, united

Record = dict[str, Any]

_ALIKE = 0.5  # minimum overlap in the shared region for two detections to be one object
_NEAR = 0.1  # minimum overlap of boxes for masks to be compared
# Boxes of objects that a tile's edge cuts end slightly before it.
_CUT_MARGIN = 0.01


def merge_tiles(
    found: Sequence[tuple[Window, Sequence[Record]]], size: tuple[int, int], *, nms_threshold: float
) -> list[Record]:
    """Merge the records of an image's tiles into the records of the image.

    Detections of one category in two tiles are one object if they overlap by half or more in the region that both tiles
    show; at most one detection per tile, best overlaps first. If some tile shows the whole object, its detection is
    kept unchanged; among several, the one with the highest score. An object that every tile cuts gets the union of the
    boxes and of the masks, and the highest score. Finally, non-maximum suppression by boxes and category, as in the
    detector, removes duplicates left where one tile took an object for two.

    Args:
        found: tiles, and the COCO-results records of each in its own coordinates.
        size: (width, height) of the image.
        nms_threshold: overlap of boxes above which the lower-scoring of two records of one category is dropped.

    Returns:
        Records in the image's coordinates, highest scores first; masks are RLE of the image's size.
    """
    pieces = [
        _Piece(window, record, _is_cut(window, record["bbox"], size)) for window, records in found for record in records
    ]
    merged = [_merged([pieces[index] for index in group], size) for group in _groups(pieces)]
    if not merged:
        return []
    boxes = _corners([record["bbox"] for record in merged])
    scores = torch.tensor([record["score"] for record in merged], dtype=torch.float64)
    categories = torch.tensor([record["category_id"] for record in merged])
    return [merged[index] for index in batched_nms(boxes, scores, categories, nms_threshold).tolist()]


@dataclass(frozen=True)
class _Piece:
    """One tile's detection of an object."""

    window: Window
    record: Record
    is_cut: bool


def _groups(pieces: Sequence[_Piece]) -> list[list[int]]:
    """Group the indices of pieces by object."""
    group_of = [[index] for index in range(len(pieces))]
    for _, first, second in sorted(_pairs(pieces)):
        a, b = group_of[first], group_of[second]
        # If a tile shows two detections, they are two objects.
        if a is not b and {pieces[i].window for i in a}.isdisjoint(pieces[i].window for i in b):
            a += b
            for index in b:
                group_of[index] = a
    return [group for index, group in enumerate(group_of) if min(group) == index]


def _pairs(pieces: Sequence[_Piece]) -> list[tuple[float, int, int]]:
    """Pairs of pieces that are one object: their negated overlap in the shared region, and their indices."""
    by_tile: dict[Window, list[int]] = {}
    for index, piece in enumerate(pieces):
        by_tile.setdefault(piece.window, []).append(index)
    tiles = list(by_tile.items())
    pairs = []
    for number, (window, indices) in enumerate(tiles):
        for other, others in tiles[number + 1 :]:
            shared = window & other
            if not shared.width or not shared.height:
                continue
            overlap = box_iou(*(_within(shared, [pieces[i] for i in group]) for group in (indices, others)))
            for row, column in (overlap >= _NEAR).nonzero().tolist():
                a, b = indices[row], others[column]
                if pieces[a].record["category_id"] != pieces[b].record["category_id"]:
                    continue
                alike = _mask_overlap(pieces[a], pieces[b], shared)
                alike = float(overlap[row, column]) if alike is None else alike
                if alike >= _ALIKE:
                    pairs.append((-alike, a, b))
    return pairs


def _within(shared: Window, pieces: Sequence[_Piece]) -> Tensor:
    """The parts of boxes in a region, (n, 4) in the image's coordinates; without area if there is no overlap."""
    boxes = _corners([piece.record["bbox"] for piece in pieces])
    boxes += boxes.new_tensor([piece.window[:2] * 2 for piece in pieces])
    left, top, right, bottom = shared
    return torch.stack(
        [
            edges.clamp(*limits)
            for edges, limits in zip(boxes.unbind(1), [(left, right), (top, bottom)] * 2, strict=True)
        ],
        dim=1,
    )


def _mask_overlap(a: _Piece, b: _Piece, shared: Window) -> float | None:
    """Intersection over union of two masks in a region, or ``None`` if there are no masks."""
    if "segmentation" not in a.record or "segmentation" not in b.record:
        return None
    first, second = (
        cut_mask(piece.record["segmentation"], shared.moved(-piece.window.left, -piece.window.top)) for piece in (a, b)
    )
    union = int((first | second).sum())
    return int((first & second).sum()) / union if union else None


def _merged(pieces: Sequence[_Piece], size: tuple[int, int]) -> Record:
    ranked = sorted(pieces, key=lambda piece: -piece.record["score"])
    whole = next((piece for piece in ranked if not piece.is_cut), None)
    used = [whole] if whole is not None else ranked
    boxes = _corners([piece.record["bbox"] for piece in used])
    boxes += boxes.new_tensor([piece.window[:2] * 2 for piece in used])
    left, top, right, bottom = [*boxes[:, :2].amin(dim=0).tolist(), *boxes[:, 2:].amax(dim=0).tolist()]
    record = {**used[0].record, "bbox": [left, top, right - left, bottom - top]}
    masks = [
        place_mask(piece.record["segmentation"], piece.window, size) for piece in used if "segmentation" in piece.record
    ]
    if masks:
        record["segmentation"] = united(masks)
    return record


def _is_cut(window: Window, box: Sequence[float], size: tuple[int, int]) -> bool:
    """Whether a box in a tile's coordinates ends at an edge of the tile that is not an edge of the image."""
    x, y, w, h = box
    across, down = (max(2.0, _CUT_MARGIN * side) for side in (window.width, window.height))
    return (
        (window.left > 0 and x < across)
        or (window.top > 0 and y < down)
        or (window.right < size[0] and x + w > window.width - across)
        or (window.bottom < size[1] and y + h > window.height - down)
    )


def _corners(boxes: Sequence[Sequence[float]]) -> Tensor:
    """Boxes (x, y, width, height) as (n, 4) with two corners."""
    xywh = torch.tensor(boxes, dtype=torch.float64).reshape(-1, 4)
    return torch.cat([xywh[:, :2], xywh[:, :2] + xywh[:, 2:]], dim=1)
