import csv
import json
import math
import random
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn
from training_toy import ToyTask, config, linear_model, new_run, same, state_of

from latentgnn.errors import UserError
from latentgnn.layer import LatentGNN
from latentgnn.training.checkpoints import read_checkpoint
from latentgnn.training.config import OptimizerConfig, ScheduleConfig
from latentgnn.training.loop import fit
from latentgnn.training.randomness import seed_generators
from latentgnn.training.steps import NonFiniteLoss


def block_model() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 16, 3), LatentGNN(16, num_latents=4, gamma_init=0.25), nn.Flatten(), nn.Linear(576, 1)
    )


def test_a_run_is_plain_sgd(tmp_path: Path) -> None:
    """Against a loop written out by hand: accumulated means, clipping, rates, decay."""
    task = ToyTask(noise=False, model=linear_model)
    settings = config(
        steps=6,
        optimizer=OptimizerConfig(learning_rate=0.01, weight_decay=0.1, norm_weight_decay=0.0),
        schedule=ScheduleConfig(warmup_steps=3, warmup_factor=0.5, milestones=(4,)),
        clip_norm=0.5,
    )
    fit(task, settings, new_run(tmp_path))

    by_hand = ToyTask(noise=False, model=linear_model)
    weight, bias = by_hand.model[1].weight, by_hand.model[1].bias
    momenta = [torch.zeros_like(weight), torch.zeros_like(bias)]
    epochs: dict[int, int] = {}
    for step, factor in enumerate([0.5, 0.5 + 0.5 / 3, 0.5 + 1 / 3, 1.0, 0.1, 0.1]):
        losses = []
        for ids in task.seen[2 * step : 2 * step + 2]:
            keys = [(epochs.setdefault(index, 0), index) for index in ids]
            for index in ids:
                epochs[index] += 1
            batch = by_hand.collate([by_hand.training_set[key] for key in keys])
            losses.append(sum(by_hand.losses(batch).values()))
        gradients = torch.autograd.grad(sum(losses) / 2, [weight, bias])
        scale = min(1.0, 0.5 / (math.sqrt(sum(float((g**2).sum()) for g in gradients)) + 1e-6))
        with torch.no_grad():
            for parameter, gradient, momentum, decay in zip(
                (weight, bias), gradients, momenta, (0.1, 0.0), strict=True
            ):
                momentum.mul_(0.9).add_(gradient * scale + decay * parameter)
                parameter.sub_(0.01 * factor * momentum)
    torch.testing.assert_close(task.model[1].weight, weight, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(task.model[1].bias, bias, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_non_finite_loss_stops_and_names_step_and_samples(tmp_path: Path, value: float) -> None:
    run = new_run(tmp_path)
    task = ToyTask(on_losses=lambda call: value if call == 10 else None)
    with pytest.raises(NonFiniteLoss, match=r"in step 5: square = (nan|inf) for samples") as raised:
        fit(task, config(), run)
    assert str(task.seen[-1]) in str(raised.value)
    assert "size" not in str(raised.value)
    kept = read_checkpoint(run.checkpoint("last"))
    assert kept.step == 4
    assert all(torch.isfinite(weight).all() for weight in kept.weights.values())
    fit(ToyTask(), config(), run, resume=True)


def test_non_finite_weights_are_not_kept(tmp_path: Path) -> None:
    class Explodes(ToyTask):
        def losses(self, batch: Any) -> dict[str, torch.Tensor]:
            losses = super().losses(batch)
            if self.calls == 11:
                # A finite loss whose gradient is not.
                weight = self.model[0].bias
                losses["root"] = (weight - weight.detach()).sum().sqrt()
            else:
                losses["root"] = losses["size"] * 0
            return losses

    run = new_run(tmp_path)
    with pytest.raises(UserError, match=r"after step 6, .* state are infinite or not numbers: 0"):
        fit(Explodes(), config(clip_norm=None), run)
    assert read_checkpoint(run.checkpoint("last")).step == 4


def test_files_of_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = new_run(tmp_path / "run")
    fit(ToyTask(model=block_model), config(), run)
    captured = capsys.readouterr()
    assert captured.err == ""
    parts, *lines = captured.out.splitlines()
    assert parts == "batch of 4 = 2 a process x 1 process x 2 parts; learning rate 0.05 for the whole batch"
    pattern = (
        r"step 2/9  loss \d+\.\d{4} \(square \d+\.\d{4}, size \d+\.\d{4}\)  rate 0\.0\d+  "
        r"\d+\.\d samples/s  left 0:00:\d\d"
    )
    assert re.fullmatch(pattern, lines[0])
    assert lines[2].startswith("step 4/9  validation: score ")
    assert [line.split("  ", 1)[1] for line in run.log.read_text().splitlines()] == [parts, *lines]

    with (run.path / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["step"] for row in rows] == ["2", "4", "4", "6", "8", "8", "9", "9"]
    # Warm-up from a third over four steps: the second step has a third and a quarter of the rest.
    assert float(rows[0]["rate"]) == pytest.approx(0.05 * (1 / 3 + 2 / 3 / 4))
    assert float(rows[0]["loss"]) == pytest.approx(float(rows[0]["loss/square"]) + float(rows[0]["loss/size"]))
    assert float(rows[0]["gamma/1"]) == pytest.approx(0.25, abs=0.1)
    assert float(rows[0]["gamma/1"]) != 0.25
    assert rows[2]["loss"] == ""
    assert float(rows[2]["count"]) == 7

    events = EventAccumulator(str(run.path / "tensorboard")).Reload()
    assert [event.step for event in events.Scalars("gamma/1")] == [2, 4, 6, 8, 9]
    assert [event.step for event in events.Scalars("score")] == [4, 8, 9]
    assert not (Path.cwd() / "lightning_logs").exists()
    assert {path.name for path in run.path.iterdir()} == {
        "checkpoints",
        "config.yaml",
        "data.json",
        "log.txt",
        "metrics.csv",
        "metrics.json",
        "tensorboard",
        "validations.json",
    }


def test_a_resumed_course_replaces_what_came_after(tmp_path: Path) -> None:
    run = new_run(tmp_path)
    with pytest.raises(NonFiniteLoss):
        fit(ToyTask(on_losses=lambda call: float("nan") if call == 15 else None), config(validate_every=None), run)
    assert read_checkpoint(run.checkpoint("last")).step == 6
    fit(ToyTask(), config(validate_every=None, log_every=1), run, resume=True)
    with (run.path / "metrics.csv").open() as file:
        steps = [int(row["step"]) for row in csv.DictReader(file)]
    assert steps == [2, 4, 6, 7, 8, 9, 9]


def test_logged_loss_is_the_mean_since_the_last_line(tmp_path: Path) -> None:
    class Counts(ToyTask):
        def losses(self, batch: Any) -> dict[str, torch.Tensor]:
            self.calls += 1
            return {"call": self.model(batch["images"]).sum() * 0 + self.calls}

    run = new_run(tmp_path)
    fit(Counts(), config(validate_every=None), run)
    with (run.path / "metrics.csv").open() as file:
        losses = [float(row["loss"]) for row in csv.DictReader(file) if row["loss"]]
    assert losses == [2.5, 6.5, 10.5, 14.5, 17.5]


def test_validation_sees_every_sample_once_in_evaluation_mode(tmp_path: Path) -> None:
    task = ToyTask()
    modes = []
    task.on_predict = lambda: modes.append((task.model.training, torch.is_grad_enabled()))
    task.model[1].eval()
    fit(task, config(workers=1), new_run(tmp_path))
    assert [[index for index, _ in results] for results in task.scored] == [list(range(7))] * 3
    assert set(modes) == {(False, False)}
    assert task.model.training


def test_without_a_validation_set(tmp_path: Path) -> None:
    task = ToyTask()
    task.validation_set.count = 0
    run = new_run(tmp_path)
    assert fit(task, config(), run) == {}
    assert json.loads((tmp_path / "metrics.json").read_text())["best"] is None


@pytest.mark.parametrize("precision", ["bf16-mixed"])
def test_precision_and_channels_last(tmp_path: Path, precision: Any, capfd: pytest.CaptureFixture[str]) -> None:
    types = set()

    class Watches(ToyTask):
        def losses(self, batch: Any) -> dict[str, torch.Tensor]:
            output = self.model[0](batch["images"])
            types.add((output.dtype, output.is_contiguous(memory_format=torch.channels_last)))
            return super().losses(batch)

    fit(Watches(), config(precision=precision, channels_last=True), new_run(tmp_path))
    assert types == {(torch.bfloat16, True)}
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch_size": 5}, "batch_size 5 is no multiple of 2 = 1 devices x 2 accumulated parts"),
        ({"accelerator": "tpu"}, "accelerator 'tpu', devices 1.* do not fit this machine"),
        ({"accelerator": "abacus"}, "do not fit this machine: .*abacus"),
    ],
)
def test_mistakes_in_the_configuration(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    run = new_run(tmp_path)
    with pytest.raises(UserError, match=message):
        fit(ToyTask(), config(**changes), run)
    assert [path.name for path in tmp_path.iterdir()] == ["config.yaml"]


def test_resume_with_channels_last_and_a_block(tmp_path: Path) -> None:
    settings = config(channels_last=True)
    whole, parts = new_run(tmp_path / "whole"), new_run(tmp_path / "parts")
    fit(ToyTask(model=block_model), settings, whole)
    with pytest.raises(NonFiniteLoss):
        fit(ToyTask(model=block_model, on_losses=lambda call: float("nan") if call == 9 else None), settings, parts)
    fit(ToyTask(model=block_model), settings, parts, resume=True)
    assert same(state_of(whole), state_of(parts))


def test_seeds_are_mixed() -> None:
    def draw(*words: int) -> tuple[float, float, float]:
        seed_generators(*words)
        return float(torch.rand(())), random.random(), float(np.random.rand())

    assert draw(1, 2, 3) == draw(1, 2, 3)
    draws = [draw(a, b, c) for a in range(3) for b in range(3) for c in range(3)]
    for generator in range(3):
        assert len({values[generator] for values in draws}) == 27
