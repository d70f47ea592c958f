from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from training_toy import ToyTask, config, new_run

import latentgnn.files.writing
from latentgnn.errors import UserError
from latentgnn.training.checkpoints import read_checkpoint, write_checkpoint
from latentgnn.training.loop import fit


def test_checkpoint_loads_without_code_and_fits_the_model(tmp_path: Path) -> None:
    run = new_run(tmp_path)
    task = ToyTask()
    fit(task, config(), run)
    checkpoint = read_checkpoint(run.checkpoint("last"))
    assert checkpoint.step == 9
    assert checkpoint.config == run.config
    fresh = ToyTask().model
    checkpoint.load_into(fresh)
    for name, value in task.model.state_dict().items():
        assert torch.equal(fresh.state_dict()[name], value)


def test_best_checkpoint_is_the_best_validations(tmp_path: Path) -> None:
    run = new_run(tmp_path)
    task = ToyTask()
    scores = iter([0.3, float("nan"), 0.7, 0.5])
    task.score = lambda results: {"score": next(scores)}  # type: ignore[method-assign]
    assert fit(task, config(steps=8, validate_every=2), run) == {"score": 0.5}
    assert read_checkpoint(run.checkpoint("best")).step == 6
    assert read_checkpoint(run.checkpoint("last")).step == 8
    assert run.metrics() == {
        "step": 8,
        "metrics": {"score": 0.5},
        "best": {"step": 6, "monitor": "score", "metrics": {"score": 0.7}},
    }


def test_unknown_monitor(tmp_path: Path) -> None:
    run = new_run(tmp_path)
    with pytest.raises(UserError, match="monitor: the task has no metric 'other'; it has score, count"):
        fit(ToyTask(), config(monitor="other"), run)
    assert read_checkpoint(run.checkpoint("last")).step == 4
    fit(ToyTask(), config(monitor="count"), run, resume=True)


def test_crash_in_the_write_keeps_the_file_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "last.ckpt"

    def content(step: int) -> dict[str, Any]:
        return {"latentgnn": {"step": step, "config": {}, "course": {}}, "state_dict": {}, "optimizer": {}}

    write_checkpoint(path, content(1))

    def fail(number: int) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(latentgnn.files.writing.os, "fsync", fail)
    with pytest.raises(OSError, match="disk full"):
        write_checkpoint(path, content(2))
    assert torch.load(path, weights_only=True) == content(1)
    assert [file.name for file in tmp_path.iterdir()] == ["last.ckpt"]


def test_errors_name_the_file_and_the_fault(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no checkpoint .*absent\.ckpt"):
        read_checkpoint(tmp_path / "absent.ckpt")
    damaged = tmp_path / "damaged.ckpt"
    torch.save({"latentgnn": {}}, damaged)
    damaged.write_bytes(damaged.read_bytes()[:100])
    with pytest.raises(UserError, match=r"damaged.ckpt is damaged \(its end is not a checkpoint's: it was cut short"):
        read_checkpoint(damaged)
    torch.save({"weights": torch.zeros(2)}, tmp_path / "other.ckpt")
    with pytest.raises(UserError, match="not an intact checkpoint of a latentgnn run"):
        read_checkpoint(tmp_path / "other.ckpt")
    torch.save(nn.Linear(2, 2), tmp_path / "code.ckpt")
    with pytest.raises(UserError, match=r"code.ckpt cannot be read"):
        read_checkpoint(tmp_path / "code.ckpt")


def test_weights_of_another_model(tmp_path: Path) -> None:
    run = new_run(tmp_path)
    fit(ToyTask(), config(steps=1), run)
    other = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Linear(2, 2))
    expected = r"unexpected: 1.running_mean, .*; 4 of another shape: 0.weight \(8, 3, 3, 3\) instead of \(4, 3, 3, 3\)"
    with pytest.raises(UserError, match=expected):
        read_checkpoint(run.checkpoint("last")).load_into(other)
