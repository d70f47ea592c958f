"""Report sections on scans or images: which classes are confused, and the scores of each sample."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from latentgnn.tasks.class_scores import Scores
from latentgnn.tasks.confusion import confusion_section
from latentgnn.training.figures import figure_text
from latentgnn.training.sections import Gallery, Picture, Section, Table

# Enough to see where the model fails; listing all of a large set would hide it.
_MOST_ROWS = 20


def sections(
    scores: Scores,
    samples: Mapping[str, NDArray[np.int64]],
    pictures: Mapping[str, Path] | None = None,
    *,
    kind: str = "scan",
) -> list[Section]:
    """Return the sections of a report.

    Args:
        scores: scores over all samples together.
        samples: the confusion matrix of each sample, shape (K, K), by its name.
        pictures: pictures of some samples, below ``pictures/``.
        kind: name of a sample, in the singular.
    """
    unit = scores.unit
    figures = {
        name: Scores(class_names=scores.class_names, confusion=counts, unit=unit) for name, counts in samples.items()
    }
    worst_first = sorted(figures, key=lambda name: figures[name].metrics["mIoU"])
    listed = [name for name in worst_first if name in (pictures or {})]
    shown = tuple(
        Picture(path=(pictures or {})[name].as_posix(), caption=_caption(name, figures[name])) for name in listed
    )
    return [
        Section(title="Classes", text=f"Over all {unit} of the validation {kind}s.", tables=(_classes(scores),)),
        confusion_section(
            f"{unit.capitalize()}. Rows are the true classes, columns what they were taken for. "
            "Colours are parts of a row.",
            list(scores.class_names),
            scores.confusion,
            unit=unit,
        ),
        Section(
            title=f"{kind.capitalize()}s",
            text="Worst first. The mIoU of one is the mean over the classes that occur in it or were predicted in it.",
            tables=(_samples(figures, worst_first, kind, unit),),
            galleries=(Gallery(title="Ground truth beside prediction", pictures=shown),) if shown else (),
        ),
    ]


def _classes(scores: Scores) -> Table:
    rows = zip(scores.class_names, scores.iou, scores.precision, scores.accuracy, scores.totals, strict=True)
    return Table(
        title="",
        columns=("", "IoU", "precision", "recall", scores.unit),
        rows=tuple((name, *map(figure_text, figures), f"{total:,}") for name, *figures, total in rows),
    )


def _samples(figures: Mapping[str, Scores], worst_first: list[str], kind: str, unit: str) -> Table:
    rows = tuple(
        (name, *_figures(figures[name]), f"{figures[name].totals.sum():,}") for name in worst_first[:_MOST_ROWS]
    )
    of = f" of {len(worst_first)}" if len(worst_first) > _MOST_ROWS else ""
    return Table(title=f"{len(rows)}{of} {kind}s", columns=("", "mIoU", "OA", unit), rows=rows)


def _figures(scores: Scores) -> tuple[str, str]:
    metrics = scores.metrics
    return figure_text(metrics["mIoU"]), figure_text(metrics["OA"])


def _caption(name: str, scores: Scores) -> str:
    mean, overall = _figures(scores)
    return f"{name}: mIoU {mean}, OA {overall}"
