"""``check-data`` for detection: faults, then the content of the set, then what does not fit the recipe."""

import textwrap
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from latentgnn.files.outputs import Results, say_end
from latentgnn.tasks.checks import SPLITS, is_faultless
from latentgnn.tasks.detection.check import Report, check
from latentgnn.tasks.detection.coco import CocoAnnotations
from latentgnn.tasks.detection.config import DetectionConfig
from latentgnn.tasks.detection.fit import misfits
from latentgnn.tasks.detection.sample_sheet import sample_sheet
from latentgnn.tasks.detection.sets import DetectionSet
from latentgnn.tasks.detection.sound_sets import sound_part
from latentgnn.tasks.detection.summary import Summary, summarize
from latentgnn.tasks.images import png_bytes


@dataclass(frozen=True, kw_only=True)
class _Part:
    """A split, or a whole set without splits."""

    report: Report
    notes: list[str]
    sound: CocoAnnotations | None
    summary: Summary | None

    def to_json(self) -> dict[str, Any]:
        summary = self.summary.to_json() if self.summary is not None else None
        return {**self.report.to_json(), "notes": self.notes, "summary": summary}


def check_data(config: DetectionConfig, *, recipe: str, out: Path | None, overwrite: bool) -> dict[str, Any]:
    """Check every record and image; print faults, the set's content, and what does not fit the recipe.

    Args:
        config: the configuration, which says where the set is and what is trained on it.
        recipe: the recipe that the configuration comes from.
        out: output folder, new or empty, for pictures of samples and ``summary.json``; ``None`` writes nothing.
        overwrite: replace the results of an earlier command in ``out``.

    Returns:
        The printed result as plain data, with ``faultless``: true if there are no faults.
    """
    opened = DetectionSet(config.data)
    with ExitStack() as stack:
        written = stack.enter_context(Results(out, overwrite=overwrite)) if out is not None else None
        parts: dict[str, _Part] = {}
        for split in SPLITS if opened.is_split else ("all",):
            parts[split] = part = _part(opened, split, config)
            print(part.report.text())
        summaries = {split: part.summary for split, part in parts.items() if part.summary is not None}
        notes = misfits(config, summaries) + _shared(parts) if len(summaries) == len(parts) else []
        told = {
            "faultless": is_faultless({split: part.report for split, part in parts.items()}),
            "root": str(opened.root),
            "format": opened.format,
            "recipe": recipe,
            "splits": {split: part.to_json() for split, part in parts.items()},
            "misfits": notes,
        }
        print(_text(parts, opened.format, recipe, notes))
        if written is not None:
            _write(written, parts, told, config.evaluation.sample_pictures)
    if out is not None:
        say_end(out)
    return told


def _part(opened: DetectionSet, split: str, config: DetectionConfig) -> _Part:
    reading = opened.reading(split) if split in SPLITS else opened.whole()
    report = check(reading, whole=config.data.is_whole)
    sound = sound_part(reading, report)
    window = config.evaluation.tiles if split == "val" else config.data.crop.size
    summary = summarize(sound, config.model, window=window) if sound is not None else None
    return _Part(report=report, notes=reading.notes, sound=sound, summary=summary)


def _shared(parts: dict[str, _Part]) -> list[str]:
    """A line if some images are in both splits."""
    paths = [{image.path.resolve() for image in part.sound.images} for part in parts.values() if part.sound is not None]
    both = set.intersection(*paths) if len(paths) == 2 else set()
    return (
        [f"{len(both)} images are in both splits, such as {min(both)}: their scores will be too good"] if both else []
    )


def _text(parts: dict[str, _Part], format: str, recipe: str, notes: list[str]) -> str:
    lines = []
    for split, part in parts.items():
        if part.summary is not None:
            lines += ["", f"{split} ({format}):", textwrap.indent(part.summary.text(), "  ")]
    all_notes = [f"note: {note}" for part in parts.values() for note in part.notes]
    if all_notes:
        lines += ["", *all_notes]
    if not lines:
        return ""
    title = f"what does not fit the recipe {recipe}:"
    if notes:
        lines += ["", title, *(f"  - {note}" for note in notes)]
    elif all(part.summary is not None for part in parts.values()):
        lines += ["", f"the recipe {recipe} fits the data"]
    return "\n".join(lines[1:])


def _write(written: Results, parts: dict[str, _Part], told: dict[str, Any], number: int) -> None:
    for part in parts.values():
        if part.sound is not None:
            written.reads(image.path for image in part.sound.images)
    written.write_json("summary.json", told)
    for split, part in parts.items():
        if part.sound is not None and number:
            written.write(f"samples_{split}.png", png_bytes(sample_sheet(part.sound, number)))
