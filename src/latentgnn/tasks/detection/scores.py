"""COCO's figures, and how they are shown and written."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from latentgnn.tasks.detection.results import Kind
from latentgnn.training.figures import figure_text

AREAS = ("small", "medium", "large")
"""Object sizes with separate figures."""

_ROW_NAMES = {"bbox": "box", "segm": "mask"}


@dataclass(frozen=True, kw_only=True)
class Scores:
    """The figures of an evaluation.

    Args:
        metrics: ``bbox/AP``, ``bbox/AP50``, ``bbox/AP75``, ``bbox/AP_small``, ``bbox/AP_medium``, ``bbox/AP_large``,
            ``bbox/AR_1``, ``bbox/AR_10``, ``bbox/AR_100`` (named after the limits in use), ``bbox/AR_small``,
            ``bbox/AR_medium``, ``bbox/AR_large``; likewise ``segm/...``. -1 if there is no ground truth for the figure.
        per_category: ``bbox/AP``, ``bbox/AP50`` and so on of each category, by its name; empty unless requested.
        kinds: what was scored.
        max_detections: limits of detections per image.
        precision: precision of each kind, at T = 10 IoU thresholds from 0.5 to 0.95, R = 101 recalls from 0 to 1 and K
            categories in the order of their ids, float64, shape (T, R, K); -1 for a category without ground truth.
    """

    metrics: dict[str, float]
    per_category: dict[str, dict[str, float]] = field(default_factory=dict)
    kinds: tuple[Kind, ...] = ("bbox", "segm")
    max_detections: tuple[int, ...] = (1, 10, 100)
    precision: Mapping[Kind, NDArray[np.float64]] = field(default_factory=dict, compare=False, repr=False)

    def table(self) -> str:
        """Return the figures as a text table, with ``APs`` for ``AP_small`` and so on; undefined ones are ``n/a``."""
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
        """Return the figures as plain data for a JSON file; undefined ones stay -1."""
        data: dict[str, Any] = {"max_detections": list(self.max_detections), "metrics": dict(self.metrics)}
        if self.per_category:
            data["per_category"] = {name: dict(values) for name, values in self.per_category.items()}
        return data


def _short(name: str) -> str:
    """Shorten ``AP_small`` to ``APs`` and ``AR_100`` to ``AR100``."""
    head, _, tail = name.partition("_")
    return head + (tail[0] if tail in AREAS else tail)


def _aligned(rows: Sequence[Sequence[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = (
        "  ".join([row[0].ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(row[1:], widths[1:], strict=True))])
        for row in rows
    )
    return "\n".join(line.rstrip() for line in lines)
