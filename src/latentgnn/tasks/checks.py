"""Code shared by the data set checks of all tasks: the splits, and how faults are listed."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

from latentgnn.errors import UserError

Split = Literal["train", "val"]
SPLITS: tuple[Split, Split] = ("train", "val")

SHOWN = 20
"""Number of faults that an error lists; the others are only counted."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Fault:
    """An error in a sample: in a scan, or in an image with its labels.

    Args:
        record: the sample's name.
        file: where it is.
        message: what is wrong.
    """

    record: str
    file: Path
    message: str

    def to_json(self) -> dict[str, Any]:
        """Return plain data."""
        return {"file": str(self.file), "record": self.record, "message": str(self)}

    def __str__(self) -> str:
        # Messages of readers begin with the file, which may be another one than the sample's.
        return self.message if self.message.startswith(str(self.file)) else f"{self.file}: {self.message}"


class Report(Protocol):
    """The result of checking a split."""

    @property
    def faults(self) -> Sequence[object]: ...

    def text(self, limit: int | None = None) -> str: ...

    def to_json(self) -> dict[str, Any]: ...


def fault_lines(faults: Iterable[object], limit: int | None) -> list[str]:
    """Return one line per fault, and one that says how many are left out.

    Args:
        faults: faults whose ``str`` is their message.
        limit: maximum number of faults to list; ``None`` lists all.

    Example:
        >>> fault_lines(["a.las: no points", "b.las: no points", "c.las: cut short"], 1)
        ['a.las: no points', '... and 2 more']
    """
    lines = [str(fault) for fault in faults]
    left_out = len(lines[limit:]) if limit is not None else 0
    return [*lines[:limit], f"... and {left_out} more"] if left_out else lines


def faults_left_out(report: Report, kind: str, *, on_fault: str, samples: int, sound: int) -> str:
    """Return a message about samples that are left out because of faults; empty if there are none.

    Args:
        report: the check of a split.
        kind: name of a sample, in the singular.
        on_fault: value of ``data.on_fault``.
        samples: total number of samples.
        sound: number of samples without faults.

    Raises:
        UserError: with the first faults, if ``on_fault`` is to stop, or every sample has faults.
    """
    if report.faults and on_fault == "stop":
        raise UserError(f"{report.text(SHOWN)}\nmend these {kind}s, or leave them out with --data.on_fault skip")
    if not sound:
        raise UserError(f"{report.text(SHOWN)}\nno {kind} is left without these")
    return f"{report.text(SHOWN)}\nleft out: {kind}s {samples - sound}" if report.faults else ""


def is_faultless(reports: Mapping[str, Report]) -> bool:
    """Whether no split has a fault."""
    return not any(report.faults for report in reports.values())


def check_splits(check: Callable[[Split], Report]) -> dict[str, Any]:
    """Check the training and the validation split, and print both reports.

    Args:
        check: returns the report of a split.

    Returns:
        ``faultless``, true if neither split has faults, and both reports as plain data.
    """
    reports: dict[str, Report] = {}
    for split in SPLITS:
        reports[split] = check(split)
        print(reports[split].text())
    told = {split: report.to_json() for split, report in reports.items()}
    return {"faultless": is_faultless(reports), "splits": told}
