"""Damaged files of a run: set aside where the run can do without them, named where it cannot."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from training_toy import ToyTask, config, new_run, same, state_of

from latentgnn.errors import UserError
from latentgnn.training.checkpoints import read_checkpoint
from latentgnn.training.loop import fit
from latentgnn.training.run_files import LARGEST, Damaged, check_mapping, read_json
from latentgnn.training.runs import RunFolder
from latentgnn.training.stopping import TrainingStopped


def huge(path: Path) -> None:
    with path.open("wb") as file:
        file.truncate(LARGEST + 1)


def fifo(path: Path) -> None:
    path.unlink(missing_ok=True)
    os.mkfifo(path)


DAMAGES: dict[str, Callable[[Path], Any]] = {
    "empty": lambda path: path.write_text(""),
    "cut short": lambda path: path.write_bytes(path.read_bytes()[:-3] if path.exists() else b'{"a": '),
    "no text": lambda path: path.write_bytes(b'{"a": "\xff"}'),
    "another shape": lambda path: path.write_text('"text"'),
    "numbers": lambda path: path.write_text('[1, {"step": 2}]'),
    "wrong fields": lambda path: path.write_text('{"step": "4", "metrics": {"a": "b"}, "earlier": 3}'),
    "deep": lambda path: path.write_text("[" * 100_000),
    "deep and whole": lambda path: path.write_text('{"a":' * 500 + "1" + "}" * 500),
    "digits": lambda path: path.write_text('{"a": ' + "9" * 10_000 + "}"),
    "huge": huge,
    "pipe": fifo,
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_file_is_told_in_a_line(tmp_path: Path, damage: str) -> None:
    path = tmp_path / "environment.json"
    DAMAGES[damage](path)
    with pytest.raises(Damaged, match=r"environment\.json is damaged \(") as caught:
        read_json(path, check_mapping)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < len(str(path)) + 200


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    run = new_run(tmp_path_factory.mktemp("whole"))
    fit(ToyTask(), config(), run)
    return run


def stopped_run(path: Path) -> RunFolder:
    def stop(call: int) -> None:
        if call == 13:
            raise KeyboardInterrupt

    run = new_run(path)
    run.write_environment()
    with pytest.raises(TrainingStopped):
        fit(ToyTask(on_losses=stop), config(), run)
    return run


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("name", ["environment.json", "metrics.json", "validations.json"])
def test_damaged_files_do_not_stop_a_resumed_run(
    tmp_path: Path, whole: RunFolder, capsys: pytest.CaptureFixture[str], name: str, damage: str
) -> None:
    run = stopped_run(tmp_path)
    DAMAGES[damage](run.path / name)
    capsys.readouterr()
    run.write_environment()
    metrics = fit(ToyTask(), config(), run, resume=True)
    said = capsys.readouterr().out
    assert said.count(f"{name} is damaged (") == 1
    assert f"; it is kept as {name}.damaged, and the run goes on without it\n" in said
    assert f"{name} is damaged (" in run.log.read_text()
    assert os.path.lexists(run.path / f"{name}.damaged")
    assert same(state_of(run), state_of(whole))
    assert run.metrics()["metrics"] == metrics == whole.metrics()["metrics"]  # type: ignore[index]
    if name == "validations.json":
        assert [record["step"] for record in run.validations()] == [8, 9]
        # What was best before is not lost: the next validation's may be worse.
        assert read_checkpoint(run.checkpoints / "earlier-best.ckpt").step == 4
        assert "earlier-best.ckpt" in said
    else:
        assert run.validations() == whole.validations()
    assert isinstance(json.loads((run.path / "environment.json").read_text())["python"], str)


@pytest.mark.parametrize(
    ("text", "steps"),
    [
        ("step,loss\n2,0.5\n4,0.", ["2", "4", "8", "8", "9", "9"]),
        ("step,loss\n2,0.5\n4", ["2", "8", "8", "9", "9"]),
        ("step,loss\n2,0.5\n4,1,2,3\n", ["2", "8", "8", "9", "9"]),
        ("loss\n2\n", ["8", "8", "9", "9"]),
        ("step,loss\nx,2\n", ["8", "8", "9", "9"]),
        ("\0\0\0", ["8", "8", "9", "9"]),
        ("", ["8", "8", "9", "9"]),
    ],
)
def test_a_damaged_course_does_not_stop_a_resumed_run(tmp_path: Path, text: str, steps: list[str]) -> None:
    run = stopped_run(tmp_path)
    path = run.path / "metrics.csv"
    path.write_text(text)
    fit(ToyTask(), config(), run, resume=True)
    assert [line.partition(",")[0] for line in path.read_text().splitlines()[1:]] == steps


def test_a_damaged_configuration_is_taken_from_a_checkpoint(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = stopped_run(tmp_path)
    expected = yaml.safe_load((run.path / "config.yaml").read_text())
    for text in ("a: [1", "- 1", None):
        (run.path / "config.yaml").unlink()
        if text is not None:
            (run.path / "config.yaml").write_text(text)
        assert RunFolder.open(run.path).config == expected
        said = capsys.readouterr().out
        assert "config.yaml" in said
        assert f"the configuration is taken from {run.checkpoint('last')}\n" in said
    for path in run.checkpoints.iterdir():
        path.unlink()
    with pytest.raises(UserError, match=r"it has no config\.yaml"):
        RunFolder.open(run.path)
