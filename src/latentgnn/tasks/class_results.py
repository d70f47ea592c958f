"""Results at the end of a run that assigns classes: scores, pictures, and its sections of the report."""

from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from latentgnn.files.writing import write_json
from latentgnn.tasks.class_scores import Scores
from latentgnn.tasks.class_sections import sections
from latentgnn.training import commands
from latentgnn.training.report import write_analysis
from latentgnn.training.runs import RunFolder


def write_class_results(
    run: RunFolder,
    scores: Scores,
    names: Sequence[str],
    confusions: Mapping[int, NDArray[np.int64]],
    places: Mapping[int, Path],
    drawn: Iterable[tuple[Path, bytes]],
    *,
    reads: Collection[Path],
    kind: str,
) -> None:
    """Write ``scores.json``, pictures, and the report's sections on the validation set.

    Args:
        run: the run's folder.
        scores: scores over all samples together.
        names: names of the samples.
        confusions: the confusion matrix of each sample, by its number.
        places: paths below ``pictures/`` of the samples that are drawn.
        drawn: the pictures.
        reads: data files, which no picture may overwrite.
        kind: name of a sample, in the singular.
    """
    write_json(run.path / "scores.json", scores.to_json())
    commands.write_pictures(run, drawn, reads=reads)
    by_name = {names[index]: counts for index, counts in sorted(confusions.items())}
    pictures = {names[index]: place for index, place in places.items()}
    write_analysis(run, sections(scores, by_name, pictures, kind=kind))


def say_class_results(run: RunFolder, scores: Scores | None, metrics: Mapping[str, float]) -> None:
    """Print the table of scores, or the figures of a run that was validated before; only in the first process."""
    if not run.writes:
        return
    if scores is None:
        print("  ".join(f"{name} {metrics[name]:.3f}" for name in ("mIoU", "mAcc", "OA")))
    else:
        print(scores.table())
