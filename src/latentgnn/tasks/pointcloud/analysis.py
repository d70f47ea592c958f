"""What the report of a run says of its scans: which classes are taken for which, and how each scan went."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from latentgnn.tasks.confusion import confusion_section
from latentgnn.tasks.figures import figure_text
from latentgnn.tasks.pointcloud.evaluation import Scores
from latentgnn.training.sections import Gallery, Picture, Section, Table

# Enough to see where it fails; the list of a large set would hide it.
_MOST_SCANS = 20


def sections(
    scores: Scores, scans: Mapping[str, NDArray[np.int64]], pictures: Mapping[str, Path] | None = None
) -> list[Section]:
    """The sections of a report.

    Args:
        scores: of all scans together.
        scans: the confusion matrix of each scan, shape (K, K), by its name.
        pictures: of some scans, below ``pictures/``.
    """
    figures = {name: Scores(class_names=scores.class_names, confusion=counts) for name, counts in scans.items()}
    worst_first = sorted(figures, key=lambda name: figures[name].metrics["mIoU"])
    listed = [name for name in worst_first if name in (pictures or {})]
    shown = tuple(
        Picture(path=(pictures or {})[name].as_posix(), caption=_caption(name, figures[name])) for name in listed
    )
    return [
        Section(title="Classes", text="Over all points of the validation scans.", tables=(_classes(scores),)),
        confusion_section(
            "Points. Rows are the true classes, columns what they were taken for. Colours are parts of a row.",
            list(scores.class_names),
            scores.confusion,
            unit="points",
        ),
        Section(
            title="Scans",
            text="Worst first. A scan's mIoU is the mean over the classes that occur in it or were predicted in it.",
            tables=(_scans(figures, worst_first),),
            galleries=(Gallery(title="Ground truth beside prediction", pictures=shown),) if shown else (),
        ),
    ]


def _classes(scores: Scores) -> Table:
    rows = zip(scores.class_names, scores.iou, scores.precision, scores.accuracy, scores.points, strict=True)
    return Table(
        title="",
        columns=("", "IoU", "precision", "recall", "points"),
        rows=tuple((name, *map(figure_text, figures), f"{points:,}") for name, *figures, points in rows),
    )


def _scans(figures: Mapping[str, Scores], worst_first: list[str]) -> Table:
    rows = tuple(
        (name, *_figures(figures[name]), f"{figures[name].points.sum():,}") for name in worst_first[:_MOST_SCANS]
    )
    of = f" of {len(worst_first)}" if len(worst_first) > _MOST_SCANS else ""
    return Table(title=f"{len(rows)}{of} scans", columns=("", "mIoU", "OA", "points"), rows=rows)


def _figures(scores: Scores) -> tuple[str, str]:
    metrics = scores.metrics
    return figure_text(metrics["mIoU"]), figure_text(metrics["OA"])


def _caption(name: str, scores: Scores) -> str:
    mean, overall = _figures(scores)
    return f"{name}: mIoU {mean}, OA {overall}"
