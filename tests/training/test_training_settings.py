"""Settings of a training of sound types and no sense: refused where they are read, by their whole names."""

import math
import re
from collections.abc import Callable

import pytest

from latentgnn.configuration.settings import parse_config
from latentgnn.errors import UserError
from latentgnn.training.config import OptimizerConfig, ScheduleConfig, TrainingConfig


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("steps", "0", "1 to 2,147,483,647"),
        ("batch_size", "0", "1 to 2,147,483,647"),
        ("accumulate", "-1", "1 to 2,147,483,647"),
        ("validate_every", "0", "1 to 2,147,483,647, or null"),
        ("log_every", "0", "1 to 2,147,483,647"),
        ("checkpoint_every", "10000000000", "1 to 2,147,483,647"),
        ("devices", "0", "1 to 4,096, or auto"),
        ("machines", "5000", "1 to 4,096"),
        ("workers", "-1", "0 to 4,096"),
        ("workers", "1000000000", "0 to 4,096"),
        ("seed", "-1", "0 to 9223372036854775807"),
        ("clip_norm", "-1.0", "a number above 0, or null"),
        ("clip_norm", "0", "a number above 0, or null"),
        ("optimizer.learning_rate", "-0.1", "0 or more"),
        ("optimizer.momentum", "1.5", "from 0 to 1"),
        ("optimizer.weight_decay", "-0.0001", "0 or more"),
        ("optimizer.norm_weight_decay", "-1.0", "0 or more, or null"),
        ("optimizer.block_factor", "-1.0", "0 or more"),
        ("schedule.warmup_steps", "-1", "0 to 2,147,483,647"),
        ("schedule.warmup_factor", "-1", "0 or more"),
        ("schedule.decay", "-1", "0 or more"),
        ("schedule.milestones", "[5, 3]", "ascending steps from 0 on"),
        ("schedule.milestones", "[-3, 5]", "ascending steps from 0 on"),
    ],
)
def test_settings_without_sense(name: str, text: str, expected: str) -> None:
    with pytest.raises(UserError, match=rf"^{re.escape(name)}: expected {re.escape(expected)}.*; got "):
        parse_config(TrainingConfig, {}, [(name, text)])


def test_a_warm_up_leaves_steps_for_the_cosine() -> None:
    cosine = [("steps", "9"), ("schedule.name", "cosine"), ("schedule.warmup_steps", "8")]
    assert parse_config(TrainingConfig, {}, cosine).schedule.warmup_steps == 8
    with pytest.raises(UserError, match=r"^schedule\.warmup_steps: expected fewer than all 9 steps.*; got 9"):
        parse_config(TrainingConfig, {}, [*cosine, ("schedule.warmup_steps", "9")])


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (lambda value: TrainingConfig(clip_norm=value), "clip_norm"),
        (lambda value: OptimizerConfig(learning_rate=value), "learning_rate"),
        (lambda value: OptimizerConfig(weight_decay=value), "weight_decay"),
        (lambda value: ScheduleConfig(decay=value), "decay"),
    ],
)
def test_numbers_are_finite_without_a_parser_too(make: Callable[[float], object], name: str) -> None:
    for value in (math.inf, math.nan):
        with pytest.raises(UserError, match=f"^{name}: expected .*; got {value}"):
            make(value)
