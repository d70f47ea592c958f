"""A run's folder and its checkpoints."""

import io
import json
from pathlib import Path
from typing import Any

import torch
from hypothesis import strategies as st

from latentgnn.configuration.settings import plain_data
from latentgnn.errors import UserError
from latentgnn.training.checkpoints import read_checkpoint
from latentgnn.training.report import write_report
from latentgnn.training.runs import RunFolder
from latentgnn.training.sections import Chart, Gallery, Line, Matrix, Picture, Section, Table
from tests.fuzzing.child import command, outcome
from tests.fuzzing.strategies import damaged, json_files, mutated

METRICS = {"step": 10, "metrics": {"bbox/AP": 0.5}}
VALIDATIONS = [
    {"step": 5, "metrics": {"bbox/AP": 0.4}, "best": True},
    {"step": 10, "metrics": {"bbox/AP": 0.5}, "best": True},
]
ENVIRONMENT = {"date": "2020-01-01", "command": ["latentgnn"], "earlier": [{"date": "2019-01-01"}]}
DATA = {"training set": {"root": "/data", "samples": 2, "digest": "00ff", "totals": {"points": 3}}}
ANALYSIS = plain_data(
    [
        Section(
            title="s",
            text="t",
            charts=(Chart(title="c", x="x", lines=(Line(name="l", x=(0, 1.5), y=(0.5, 1)),), limits=(0.0, 1.0)),),
            tables=(Table(title="t", columns=("a", "b"), rows=(("1", "2"),)),),
            matrices=(Matrix(title="m", rows=("a",), columns=("a", "b"), counts=((1, 2),)),),
            galleries=(Gallery(title="g", pictures=(Picture(path="a.png", caption="c"),)),),
        )
    ]
)
COURSE = b"step,loss,gamma/C4\n5,2.5,0.1\n10,1.5,\n10,,0.2\n"
CONFIG = "training: {steps: 10}\nmodel: {blocks: {C4: 8}}\n"


def _saved(value: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


CHECKPOINT = {
    "state_dict": {"model.weight": torch.ones(2, 3), "model.bias": torch.zeros(2)},
    "global_step": 10,
    "latentgnn": {"config": {"training": {"steps": 10}}, "course": {}},
}
CHECKPOINTS = [_saved(CHECKPOINT), _saved(torch.ones(3)), _saved({}), _saved([1, 2]), b""]


@st.composite
def folders(draw: st.DrawFn) -> dict[str, bytes]:
    """The text files of a run, as they may lie there."""
    return {
        "metrics.json": draw(json_files(METRICS)),
        "validations.json": draw(json_files(VALIDATIONS)),
        "environment.json": draw(json_files(ENVIRONMENT)),
        "data.json": draw(json_files(DATA)),
        "analysis.json": draw(json_files(ANALYSIS)),
        "metrics.csv": draw(damaged([COURSE])),
        "config.yaml": draw(damaged([CONFIG.encode()])),
    }


def run_folders(files: dict[str, bytes], folder: Path) -> None:
    """A run's files are read or refused; nothing else becomes of them, and they stay as they are."""
    for name, content in files.items():
        (folder / name).write_bytes(content)
    try:
        run = RunFolder.open(folder)
        write_report(run, lambda names: {name: name for name in names})
        run.write_environment()
        run.metrics()
        run.validations()
    except UserError:
        pass
    code, _ = command("evaluate", str(folder), "--data.root", "absent")
    assert code in (1, 2)
    for name in ("metrics.json", "validations.json", "config.yaml"):
        # What is damaged may be put aside, but is kept.
        kept = folder / name if (folder / name).exists() else folder / f"{name}.damaged"
        assert kept.read_bytes() == files[name]


@st.composite
def _any_checkpoint(draw: st.DrawFn) -> bytes:
    """What torch can save and is no checkpoint of ours, and damaged ones."""
    if draw(st.booleans()):
        return draw(damaged(CHECKPOINTS))
    plain = {"global_step": 10, "latentgnn": {"config": {"training": {"steps": 10}}, "course": {}}}
    changed = draw(mutated(plain))
    return _saved({**CHECKPOINT, **changed} if isinstance(changed, dict) else changed)


def checkpoints(content: bytes, folder: Path) -> None:
    """A checkpoint is read as what it is, or refused by name."""
    path = folder / "last.ckpt"
    path.write_bytes(content)
    if (checkpoint := outcome(read_checkpoint, path)) is not None:
        assert type(checkpoint.step) is int
        assert isinstance(checkpoint.config, dict)
        assert all(torch.isfinite(weight).all() for weight in checkpoint.weights.values() if weight.is_floating_point())
        json.dumps(checkpoint.config)
    code, _ = command("predict", str(path), "absent.png")
    assert code in (1, 2)


PROPERTIES = (
    (run_folders, folders(), 0.5),
    (checkpoints, _any_checkpoint(), 0.5),
)
