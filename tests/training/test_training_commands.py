"""What the commands of every task say when a run ends early, with a task that only ends."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from training_toy import config

from latentgnn.errors import UserError
from latentgnn.training.commands import Job, train
from latentgnn.training.config import TrainingConfig
from latentgnn.training.lifeline import ProcessGone
from latentgnn.training.stopping import TrainingStopped


@dataclass(frozen=True)
class Config:
    training: TrainingConfig = field(default_factory=config)


@pytest.mark.parametrize(
    "error",
    [
        TrainingStopped("stopped by SIGTERM"),
        ProcessGone("process 1 of 2 is gone"),
        KeyboardInterrupt(),
        OSError(28, "No space left on device", "log.txt"),
    ],
)
def test_a_run_that_ends_early_says_how_to_continue(tmp_path: Path, error: BaseException) -> None:
    def end(*_: Any) -> dict[str, float]:
        raise error

    job: Job[None] = Job(load=lambda config, folder, resume: None, train=end, titles=lambda names: {})
    with pytest.raises(UserError, match=f"continue with: latentgnn train --resume {tmp_path / 'run'}$"):
        train(job, Config(), tmp_path / "run", name="toy")


@dataclass(frozen=True)
class WithBlocks(Config):
    model: dict[str, Any] = field(default_factory=lambda: {"blocks": {"C4": 16}})


@pytest.mark.parametrize(("made", "looks"), [(WithBlocks(), True), (WithBlocks(model={"blocks": {}}), False)])
def test_what_may_follow_a_training(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], made: WithBlocks, looks: bool
) -> None:
    job: Job[None] = Job(
        load=lambda config, folder, resume: None, train=lambda *_: {"score": 1.0}, titles=lambda names: {}
    )
    train(job, made, tmp_path / "run", name="toy")
    told = capsys.readouterr().out
    assert f"next: latentgnn evaluate {tmp_path / 'run'}\n" in told
    assert (f"next: latentgnn diagnose {tmp_path / 'run'}\n" in told) is looks
    assert (f"next: latentgnn explain {tmp_path / 'run'} INPUT ...\n" in told) is looks
