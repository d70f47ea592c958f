"""Figures of semantic segmentation: IoU of every class, their mean, accuracies, and the confusion matrix."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from latentgnn.tasks.pointcloud.scans import IGNORE

UNDEFINED = -1.0
"""The value of a figure that nothing defines, such as the IoU of a class that occurs nowhere."""


def confusion_matrix(labels: NDArray[np.int64], predictions: NDArray[np.int64], num_classes: int) -> NDArray[np.int64]:
    """How many points of each class, by row, were taken for each class, by column; (K, K).

    Args:
        labels: classes or `IGNORE`, shape (N,); ignored points do not count.
        predictions: classes, shape (N,).
        num_classes: K.
    """
    scored = labels != IGNORE
    cells = labels[scored] * num_classes + predictions[scored]
    return np.bincount(cells, minlength=num_classes**2).reshape(num_classes, num_classes).astype(np.int64)


@dataclass(frozen=True, kw_only=True, eq=False)
class Scores:
    """The figures of an evaluation.

    Args:
        class_names: in the order of the labels.
        confusion: true classes by row, predicted by column, int64, shape (K, K).
    """

    class_names: Sequence[str]
    confusion: NDArray[np.int64]

    @property
    def iou(self) -> NDArray[np.float64]:
        """Points of a class that were found, over those of the class or taken for it, (K,)."""
        found = self.confusion.diagonal()
        return _ratio(found, self.confusion.sum(axis=1) + self.confusion.sum(axis=0) - found)

    @property
    def accuracy(self) -> NDArray[np.float64]:
        """Points of a class that were found, over those of the class, (K,)."""
        return _ratio(self.confusion.diagonal(), self.confusion.sum(axis=1))

    @property
    def metrics(self) -> dict[str, float]:
        """``mIoU``, ``OA`` (overall accuracy), ``mAcc`` (mean of the classes' accuracies) and ``IoU/CLASS``.

        Means are over the classes that occur: in the labels or predictions for ``mIoU``, in the labels for ``mAcc``.
        -1 where nothing defines a figure.
        """
        overall = _ratio(self.confusion.trace()[None], self.confusion.sum()[None])[0]
        figures = {"mIoU": _mean(self.iou), "OA": float(overall), "mAcc": _mean(self.accuracy)}
        return figures | {f"IoU/{name}": float(value) for name, value in zip(self.class_names, self.iou, strict=True)}

    def table(self) -> str:
        """The figures as a plain text table; ``n/a`` for undefined ones."""
        width = max(map(len, self.class_names))
        lines = [f"{'class':{width}}  {'IoU':>6}  {'acc.':>6}  {'points':>12}"]
        rows = zip(self.class_names, self.iou, self.accuracy, self.confusion.sum(axis=1), strict=True)
        lines += [f"{name:{width}}  {_shown(iou)}  {_shown(right)}  {points:>12,}" for name, iou, right, points in rows]
        figures = self.metrics
        lines.append("  ".join(f"{name} {_shown(figures[name]).strip()}" for name in ("mIoU", "mAcc", "OA")))
        return "\n".join(lines)

    def to_json(self) -> dict[str, Any]:
        """The figures as plain data for a JSON file; undefined ones are -1."""
        return {
            "metrics": self.metrics,
            "classes": list(self.class_names),
            "accuracy": self.accuracy.tolist(),
            "confusion": self.confusion.tolist(),
        }


def _ratio(above: NDArray[np.int64], below: NDArray[np.int64]) -> NDArray[np.float64]:
    return np.divide(above, below, out=np.full(above.shape, UNDEFINED), where=below > 0)


def _mean(values: NDArray[np.float64]) -> float:
    defined = values[values != UNDEFINED]
    return float(defined.mean()) if len(defined) else UNDEFINED


def _shown(value: float) -> str:
    return f"{value:6.3f}" if value != UNDEFINED else "   n/a"
