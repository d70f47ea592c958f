"""A model card: the ``README.md`` of a trained model, filled in with the figures of its run.

The Hugging Face hub reads its header (huggingface.co/docs/hub/model-cards). Choosing a licence is left to the user.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from latentgnn.configuration.recipes import to_yaml
from latentgnn.training.figures import UNDEFINED
from latentgnn.training.records import Titles
from latentgnn.training.report import Report
from latentgnn.training.runs import RunFolder
from latentgnn.training.sections import Table

_PAPER = "https://arxiv.org/abs/1905.11634"
_NO_LICENCE = "**Not chosen yet.** Choose one before you publish this, and write it into the first lines of this file."


@dataclass(frozen=True, kw_only=True)
class Subject:
    """What a card describes, as given by a task.

    Args:
        title: the kind of model, for example ``mask_rcnn with LatentGNN blocks at C4``.
        task: name of the task on the hub, if the hub has one.
        pipeline: whether the hub has a pipeline for this task.
        classes: names of the classes that the model predicts.
        usage: Python code that uses the model.
    """

    title: str
    task: str
    pipeline: bool
    classes: Sequence[str]
    usage: str


def model_card(
    subject: Subject,
    record: Mapping[str, Any],
    run: RunFolder | None,
    *,
    titles: Titles,
    export: Sequence[str] = (),
    usage: str | None = None,
) -> str:
    """Return the text of a card.

    Args:
        subject: see `Subject`.
        record: the model's record, see `latentgnn.saved.new_record`.
        run: the run folder with what is known of the training; ``None`` if there is none.
        titles: selects and names the figures that are shown first.
        export: lines about the export.
        usage: Python code that uses the exported model; ``None`` takes the subject's.
    """
    report = None if run is None else Report(run, titles)
    step = int(record.get("step", 0))
    metrics = {} if report is None else report.metrics_at(step)
    name = subject.title if run is None else run.path.resolve().name
    parts = [
        f"---\n{_head(subject, name, metrics, titles(list(metrics)))}---",
        f"# {name}",
        f"A {subject.title}, trained with [latentgnn](https://pypi.org/project/latentgnn/) {record['version']}: global "
        f"context at linear cost by LatentGNN blocks (Zhang, Yan and He, ICML 2019, [arXiv 1905.11634]({_PAPER})).",
        "## Licence",
        _NO_LICENCE,
        "## Use",
        f"```python\n{usage or subject.usage}\n```",
    ]
    if export:
        parts += ["## Files", "\n".join(f"- {_plain(line)}" for line in export)]
    parts += ["## Figures", *_figures(report, metrics, step)]
    parts += [f"## Classes ({len(subject.classes)})", _plain(", ".join(subject.classes))]
    if report is not None:
        for title, table in (("Data", report.sets()), ("Machine and versions", report.versions())):
            if table.rows:
                parts += [f"## {title}", _table(table)]
        if report.commands:
            parts += ["## Commands", "```\n" + "\n".join(report.commands) + "\n```"]
        parts += [f"> {_plain(note)}" for note in report.notes]
    settings = to_yaml(record["config"]).strip()
    summary = "<details><summary>Every setting of the training</summary>"
    parts += ["## Settings", summary, f"```yaml\n{settings}\n```", "</details>"]
    return "\n\n".join(parts) + "\n"


def _head(subject: Subject, name: str, metrics: Mapping[str, float], titles: Mapping[str, str]) -> str:
    head: dict[str, Any] = {
        "library_name": "latentgnn",
        "tags": ["latentgnn", "pytorch", subject.task],
    }
    if subject.pipeline:
        head["pipeline_tag"] = subject.task
    defined = {title: metrics[key] for key, title in titles.items() if metrics.get(key, UNDEFINED) != UNDEFINED}
    if defined:
        result = {
            "task": {"type": subject.task},
            "dataset": {"type": "custom", "name": "validation set"},
            "metrics": [{"type": title, "value": round(value, 6)} for title, value in defined.items()],
        }
        head["model-index"] = [{"name": name, "results": [result]}]
    return f"# license: CHOOSE ONE, such as mit, apache-2.0 or cc-by-nc-4.0\n{to_yaml(head)}"


def _figures(report: Report | None, metrics: Mapping[str, float], step: int) -> Iterable[str]:
    if report is None:
        yield "What its training measured is not known: the model was not exported from its run's folder."
    elif not metrics:
        yield f"Not known: these weights, of step {step:,}, were not validated."
    else:
        yield f"Of these weights, of step {step:,}, on the validation set. n/a: undefined on this set."
        yield _table(report.table("", metrics))


def _table(table: Table) -> str:
    """A Markdown table; Markdown requires a header row."""
    rows = [table.columns, tuple("---" for _ in table.columns), *table.rows]
    return "\n".join(f"| {' | '.join(map(_plain, row))} |" for row in rows)


def _plain(text: str) -> str:
    """Escape text from the user's files, so that it does not become markup."""
    return re.sub(r"([\\`*\[\]<>|#])", r"\\\1", " ".join(text.split()))
