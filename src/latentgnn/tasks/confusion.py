"""The report section with the confusion matrix."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from latentgnn.training.sections import Matrix, Section, Table

# Larger matrices cannot be read on a screen.
_MOST_NAMES = 20
_MOST_PAIRS = 12


def confusion_section(
    text: str,
    names: Sequence[str],
    counts: NDArray[np.int64],
    *,
    unit: str,
    absent: tuple[str, str] | None = None,
) -> Section:
    """Return a section with a confusion matrix and its largest off-diagonal entries.

    If there are more than 20 names, the matrix shows those with the most mistakes; the others are merged.

    Args:
        text: explains what is counted.
        names: K names of rows and columns.
        counts: counts with truth by row and prediction by column, shape (K, K), or (K + 1, K + 1) with ``absent``.
        unit: what is counted, in the plural.
        absent: names of an extra last row, for predictions where there is nothing, and of an extra last column, for
            what was not found.
    """
    row_names = [*names, absent[0]] if absent else list(names)
    column_names = [*names, absent[1]] if absent else list(names)
    mistakes = counts.copy()
    np.fill_diagonal(mistakes, 0)
    order = np.argsort(-mistakes, axis=None, kind="stable")[:_MOST_PAIRS]
    pairs = [divmod(int(place), len(counts)) for place in order if mistakes.flat[place] > 0]
    totals = counts.sum(axis=1)
    rows = tuple(
        (
            row_names[truth],
            column_names[found],
            f"{counts[truth, found]:,}",
            f"{counts[truth, found] / totals[truth]:.1%}" if totals[truth] else "n/a",
        )
        for truth, found in pairs
    )
    tables = (Table(title="Most frequent mistakes", columns=("truth", "taken for", unit, "of the row"), rows=rows),)
    kept, shown = _smaller(len(names), counts, mistakes)
    others = [f"{len(names) - len(kept)} others"] if len(kept) < len(names) else []
    matrix = Matrix(
        title="Confusion",
        rows=(*(names[index] for index in kept), *others, *row_names[len(names) :]),
        columns=(*(names[index] for index in kept), *others, *column_names[len(names) :]),
        counts=tuple(tuple(row) for row in shown.tolist()),
    )
    return Section(title="Confusion", text=text, tables=tables if rows else (), matrices=(matrix,))


def _smaller(names: int, counts: NDArray[np.int64], mistakes: NDArray[np.int64]) -> tuple[list[int], NDArray[np.int64]]:
    """The names with the most mistakes, and the matrix in which all others are merged into one."""
    if names <= _MOST_NAMES:
        return list(range(names)), counts
    weight = (mistakes.sum(axis=0) + mistakes.sum(axis=1))[:names]
    kept = np.sort(np.argsort(-weight, kind="stable")[:_MOST_NAMES])
    # Order of rows: the names that are kept, all others as one, and the one for nothing.
    place = np.full(len(counts), _MOST_NAMES)
    place[kept] = np.arange(_MOST_NAMES)
    place[names:] = np.arange(_MOST_NAMES + 1, _MOST_NAMES + 1 + len(counts) - names)
    summed = np.zeros((_MOST_NAMES + 1 + len(counts) - names,) * 2, np.int64)
    np.add.at(summed, (place[:, None], place[None, :]), counts)
    return kept.tolist(), summed
