import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.fabric import Fabric
from lightning.fabric.plugins import MixedPrecision
from training_toy import ToyTask, config, new_run, same, state_of

from latentgnn.errors import UserError
from latentgnn.training.config import OptimizerConfig, TrainingConfig
from latentgnn.training.loop import fit
from latentgnn.training.runs import RunFolder
from latentgnn.training.stopping import STOP_SIGNALS, TrainingStopped


def stop_in_call(number: int, name: int = signal.SIGTERM) -> Any:
    """A hook that sends a stop signal in the number-th micro-batch."""

    def hook(call: int) -> None:
        if call == number:
            os.kill(os.getpid(), name)

    return hook


@pytest.fixture(scope="module", params=["sgd", "adamw"])
def whole(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, ...]:
    run = new_run(tmp_path_factory.mktemp("whole"))
    settings = config(optimizer=OptimizerConfig(name=request.param, learning_rate=0.05))
    metrics = fit(ToyTask(), settings, run)
    return settings, state_of(run), metrics


# Stopped in the first part of step 1, between the parts of step 2, at a validation's and a checkpoint's step, in the
# second epoch, and in the last step.
@pytest.mark.parametrize("call", [1, 3, 8, 11, 12, 18])
def test_resumed_run_is_the_uninterrupted_one(tmp_path: Path, whole: Any, call: int) -> None:
    settings, expected, expected_metrics = whole
    run = new_run(tmp_path)
    with pytest.raises(TrainingStopped, match=rf"SIGTERM after step {(call + 1) // 2} of 9"):
        fit(ToyTask(on_losses=stop_in_call(call)), settings, run)
    kept = torch.load(run.checkpoint("last"), weights_only=True)
    assert kept["latentgnn"]["step"] == (call + 1) // 2
    assert kept["latentgnn"]["config"] == {"model": {"width": 8}, "data": {"root": "here"}}

    metrics = fit(ToyTask(), settings, RunFolder.open(tmp_path), resume=True)
    assert same(state_of(run), expected)
    assert metrics == expected_metrics
    assert [record["step"] for record in run.validations()] == [4, 8, 9]


def test_the_comparison_can_fail(tmp_path: Path, whole: Any) -> None:
    settings, expected, _ = whole
    run = new_run(tmp_path)
    fit(ToyTask(), config(optimizer=settings.optimizer, seed=1), run)
    assert not same(state_of(run), expected)


@pytest.mark.parametrize("changes", [{"validate_every": None}, {"workers": 2, "log_every": 1, "checkpoint_every": 50}])
def test_what_may_change_changes_no_weight(tmp_path: Path, whole: Any, changes: dict[str, Any]) -> None:
    settings, expected, _ = whole
    run = new_run(tmp_path)
    with pytest.raises(TrainingStopped):
        fit(ToyTask(on_losses=stop_in_call(7, signal.SIGINT)), settings, run)
    fit(ToyTask(), config(optimizer=settings.optimizer, **changes), run, resume=True)
    assert same(state_of(run), expected)


def test_stopped_with_workers_several_times(tmp_path: Path, whole: Any) -> None:
    settings, expected, _ = whole
    run = new_run(tmp_path)
    settings = config(optimizer=settings.optimizer, workers=2)
    for number, resume in ((3, False), (1, True), (5, True)):
        with pytest.raises(TrainingStopped):
            fit(ToyTask(on_losses=stop_in_call(number)), settings, run, resume=resume)
    fit(ToyTask(), settings, run, resume=True)
    assert same(state_of(run), expected)


def test_stopped_in_the_last_validation(tmp_path: Path, whole: Any) -> None:
    settings, expected, expected_metrics = whole
    run = new_run(tmp_path)
    batches = []

    def stop() -> None:
        batches.append(1)
        if len(batches) == 10:  # 4 batches a validation; the tenth is in the third, after step 9
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(TrainingStopped, match="after step 9 of 9"):
        fit(ToyTask(on_predict=stop), settings, run)
    assert run.metrics() is None
    task = ToyTask()
    assert fit(task, settings, run, resume=True) == expected_metrics
    assert task.calls == 0
    assert same(state_of(run), expected)


@pytest.fixture
def heard() -> Iterator[None]:
    """No stop signal is ignored, as whoever runs the tests in the background has it, and as a run would respect."""
    before = {number: signal.signal(number, signal.default_int_handler) for number in STOP_SIGNALS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.usefixtures("heard")
@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP", "SIGQUIT", "SIGUSR1"])
def test_signals_stop_after_the_step_and_their_handlers_are_put_back(tmp_path: Path, name: str) -> None:
    before = [signal.getsignal(number) for number in STOP_SIGNALS]
    run = new_run(tmp_path)
    with pytest.raises(TrainingStopped, match=f"stopped by {name} after step 2 of 9"):
        fit(ToyTask(on_losses=stop_in_call(3, getattr(signal, name))), config(), run)
    assert torch.load(run.checkpoint("last"), weights_only=True)["latentgnn"]["step"] == 2
    assert [signal.getsignal(number) for number in STOP_SIGNALS] == before


def test_a_hang_up_that_is_ignored_on_purpose_stays_ignored(tmp_path: Path) -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        run = new_run(tmp_path)
        fit(ToyTask(on_losses=stop_in_call(3, signal.SIGHUP)), config(), run)
    finally:
        signal.signal(signal.SIGHUP, before)
    assert torch.load(run.checkpoint("last"), weights_only=True)["latentgnn"]["step"] == 9


def test_second_interrupt_stops_at_once(tmp_path: Path) -> None:
    def twice(call: int) -> None:
        if call == 8:
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)

    run = new_run(tmp_path)
    with pytest.raises(TrainingStopped, match="interrupted in step 4"):
        fit(ToyTask(on_losses=twice), config(), run)
    assert torch.load(run.checkpoint("last"), weights_only=True)["latentgnn"]["step"] == 3


def test_finished_run_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = new_run(tmp_path)
    metrics = fit(ToyTask(), config(), run)
    task = ToyTask()
    capsys.readouterr()
    assert fit(task, config(), run, resume=True) == metrics
    assert "finished: all 9 steps" in capsys.readouterr().out
    assert task.calls == 0


def test_resume_before_the_first_checkpoint_begins_anew(tmp_path: Path, whole: Any) -> None:
    settings, expected, _ = whole
    run = new_run(tmp_path)
    fit(ToyTask(), settings, run, resume=True)
    assert same(state_of(run), expected)


def test_another_course_is_refused(tmp_path: Path) -> None:
    run = new_run(tmp_path)
    with pytest.raises(TrainingStopped):
        fit(ToyTask(on_losses=stop_in_call(5)), config(), run)
    with pytest.raises(UserError, match=r"training.seed was 0, is 3\. "):
        fit(ToyTask(), config(seed=3), run, resume=True)
    with pytest.raises(UserError, match=r"training.steps was 9, is 12"):
        fit(ToyTask(), config(steps=12), run, resume=True)
    with pytest.raises(UserError, match="does not fit the model"):
        fit(ToyTask(model=lambda: torch.nn.Linear(2, 2)), config(), run, resume=True)
    with pytest.raises(UserError, match="already"):
        fit(ToyTask(), config(), run)
    run.write_config({"model": {"width": 9}, "data": {"root": "there"}})
    with pytest.raises(UserError, match=r"other settings: model.width was 8, is 9\. "):
        fit(ToyTask(), config(), run, resume=True, may_change=["data"])


def test_the_scale_of_losses_in_16_bits_is_resumed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def scaled(settings: TrainingConfig, loggers: list[Any], **_: Any) -> Fabric:
        # As on a GPU, but on the CPU; the scale doubles after every third step.
        scaler = torch.amp.GradScaler("cpu", init_scale=8.0, growth_interval=3)
        precision = MixedPrecision("16-mixed", "cpu", scaler)
        return Fabric(accelerator="cpu", devices=1, plugins=[precision], loggers=loggers)

    monkeypatch.setattr("latentgnn.training.loop.make_fabric", scaled)
    whole, parts = new_run(tmp_path / "whole"), new_run(tmp_path / "parts")
    fit(ToyTask(), config(), whole)
    with pytest.raises(TrainingStopped, match="after step 4"):
        fit(ToyTask(on_losses=stop_in_call(8)), config(), parts)
    kept = torch.load(parts.checkpoint("last"), weights_only=True)["precision"]
    assert (kept["scale"], kept["_growth_tracker"]) == (16.0, 1)
    fit(ToyTask(), config(), parts, resume=True)
    assert same(state_of(parts), state_of(whole))
    assert torch.load(parts.checkpoint("last"), weights_only=True)["precision"]["scale"] == 64.0


def test_a_run_that_ends_before_its_results_are_written_has_them_when_resumed(tmp_path: Path) -> None:
    class Ended(Exception):
        pass

    def end() -> None:
        raise Ended

    run, first = new_run(tmp_path / "run"), ToyTask()
    with pytest.raises(Ended):
        fit(first, config(), run, write_results=end)
    assert run.metrics() is None
    validations = run.validations()

    second, written = ToyTask(), []
    metrics = fit(second, config(), run, resume=True, write_results=lambda: written.append(second.scored[-1]))
    assert written == [first.scored[-1]]
    assert run.validations() == validations
    assert metrics == validations[-1]["metrics"]
    # A run that is finished leaves its results as they are.
    fit(ToyTask(), config(), run, resume=True, write_results=end)
