"""Figures of semantic segmentation: IoU of each class, mean IoU, accuracies, and the confusion matrix.

It also has the results for a scored sample and for a predicted file.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from latentgnn.tasks.classes import IGNORE
from latentgnn.training.figures import UNDEFINED, figure_text, mean_of_defined


def confusion_matrix(labels: NDArray[np.int64], predictions: NDArray[np.int64], num_classes: int) -> NDArray[np.int64]:
    """Count the nodes of each class (row) that were predicted as each class (column), (K, K).

    Args:
        labels: classes or `IGNORE`, shape (N,); ignored nodes do not count.
        predictions: classes, shape (N,).
        num_classes: K.
    """
    scored = labels != IGNORE
    cells = labels[scored] * num_classes + predictions[scored]
    return np.bincount(cells, minlength=num_classes**2).reshape(num_classes, num_classes).astype(np.int64)


class Result(NamedTuple):
    """The result for a sample.

    Args:
        number: the sample's index in its set.
        confusion: int64, (K, K), see `confusion_matrix`.
        predicted: predicted classes of all its points or pixels, if a picture is made of them.
    """

    number: int
    confusion: NDArray[np.int64]
    predicted: NDArray[np.int64] | None


class Predicted(NamedTuple):
    """The prediction for a file.

    Args:
        source: the input file.
        path: the written file, with the predicted classes.
        counts: number of points or pixels predicted as each class, (K,).
    """

    source: Path
    path: Path
    counts: NDArray[np.int64]


@dataclass(frozen=True, kw_only=True, eq=False)
class Scores:
    """The figures of an evaluation.

    Args:
        class_names: class names in the order of the labels.
        confusion: counts with true classes by row and predicted classes by column, int64, shape (K, K).
        unit: what is counted, in the plural.
    """

    class_names: Sequence[str]
    confusion: NDArray[np.int64]
    unit: str = "points"

    @property
    def iou(self) -> NDArray[np.float64]:
        """For each class, correctly predicted nodes over nodes that are labelled or predicted as the class, (K,)."""
        correct = self.confusion.diagonal()
        return _ratio(correct, self.confusion.sum(axis=1) + self.confusion.sum(axis=0) - correct)

    @property
    def accuracy(self) -> NDArray[np.float64]:
        """For each class, correctly predicted nodes over nodes labelled as the class, (K,)."""
        return _ratio(self.confusion.diagonal(), self.confusion.sum(axis=1))

    @property
    def precision(self) -> NDArray[np.float64]:
        """For each class, correctly predicted nodes over nodes predicted as the class, (K,)."""
        return _ratio(self.confusion.diagonal(), self.confusion.sum(axis=0))

    @property
    def totals(self) -> NDArray[np.int64]:
        """Number of nodes of each class, (K,)."""
        return self.confusion.sum(axis=1)

    @property
    def metrics(self) -> dict[str, float]:
        """``mIoU``, ``OA`` (overall accuracy), ``mAcc`` (mean of the classes' accuracies) and ``IoU/CLASS``.

        Means are over the classes that occur: in labels or predictions for ``mIoU``, in labels for ``mAcc``. Undefined
        figures are -1.
        """
        overall = _ratio(self.confusion.trace()[None], self.confusion.sum()[None])[0]
        figures = {"mIoU": mean_of_defined(self.iou), "OA": float(overall), "mAcc": mean_of_defined(self.accuracy)}
        return figures | {f"IoU/{name}": float(value) for name, value in zip(self.class_names, self.iou, strict=True)}

    def table(self) -> str:
        """Return the figures as a plain text table; undefined ones are ``n/a``."""
        width = max(map(len, self.class_names))
        lines = [f"{'class':{width}}  {'IoU':>6}  {'acc.':>6}  {self.unit:>12}"]
        rows = zip(self.class_names, self.iou, self.accuracy, self.totals, strict=True)
        lines += [
            f"{name:{width}}  {figure_text(iou):>6}  {figure_text(accuracy):>6}  {total:>12,}"
            for name, iou, accuracy, total in rows
        ]
        figures = self.metrics
        lines.append("  ".join(f"{name} {figure_text(figures[name])}" for name in ("mIoU", "mAcc", "OA")))
        return "\n".join(lines)

    def to_json(self) -> dict[str, Any]:
        """Return the figures as plain data for a JSON file; undefined ones are -1."""
        return {
            "metrics": self.metrics,
            "classes": list(self.class_names),
            "accuracy": self.accuracy.tolist(),
            "confusion": self.confusion.tolist(),
        }


def _ratio(above: NDArray[np.int64], below: NDArray[np.int64]) -> NDArray[np.float64]:
    return np.divide(above, below, out=np.full(above.shape, UNDEFINED), where=below > 0)
