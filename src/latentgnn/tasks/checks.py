"""What the checks of data sets have in common, whatever the task: the splits, and how faults are listed."""

from collections.abc import Callable, Iterable, Sequence
from typing import Literal, Protocol

Split = Literal["train", "val"]


class Report(Protocol):
    """What the check of a split says."""

    @property
    def faults(self) -> Sequence[object]: ...

    def text(self) -> str: ...


def fault_lines(faults: Iterable[object], limit: int | None) -> list[str]:
    """A line for each fault, and one that says how many are left out.

    Args:
        faults: with messages as their text.
        limit: how many to list; ``None`` lists all.

    Example:
        >>> fault_lines(["a.las: no points", "b.las: no points", "c.las: cut short"], 1)
        ['a.las: no points', '... and 2 more']
    """
    lines = [str(fault) for fault in faults]
    left_out = len(lines[limit:]) if limit is not None else 0
    return [*lines[:limit], f"... and {left_out} more"] if left_out else lines


def check_splits(check: Callable[[Split], Report]) -> bool:
    """Check the training and the validation split, print both reports, and return whether neither has faults."""
    splits: tuple[Split, Split] = ("train", "val")
    faultless = True
    for split in splits:
        report = check(split)
        print(report.text())
        faultless = faultless and not report.faults
    return faultless
