import pytest
import torch
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR, MultiStepLR, PolynomialLR

from latentgnn.training.config import ScheduleConfig
from latentgnn.training.schedule import rate_factor

PUBLISHED = ScheduleConfig(name="steps", warmup_steps=500, warmup_factor=1 / 3, milestones=(60_000, 80_000), decay=0.1)


# maskrcnn-benchmark's WarmupMultiStepLR, by hand: 0.02 x (1/3 (1 - i/500) + i/500), then tenths.
@pytest.mark.parametrize(
    ("step", "rate"),
    [
        (0, 0.02 / 3),
        (1, 0.02 * (1 / 3 + 2 / 3 / 500)),
        (250, 0.02 * 2 / 3),
        (499, 0.02 * (1 / 3 + 2 / 3 * 499 / 500)),
        (500, 0.02),
        (59_999, 0.02),
        (60_000, 0.002),
        (79_999, 0.002),
        (80_000, 0.0002),
        (89_999, 0.0002),
    ],
)
def test_published_schedule(step: int, rate: float) -> None:
    assert 0.02 * rate_factor(PUBLISHED, step, steps=90_000) == pytest.approx(rate, rel=1e-12)


def test_steps_agree_with_torch() -> None:
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    schedules = [LinearLR(optimizer, start_factor=0.25, total_iters=5), MultiStepLR(optimizer, [8, 12], gamma=0.5)]
    config = ScheduleConfig(warmup_steps=5, warmup_factor=0.25, milestones=(8, 12), decay=0.5)
    for step in range(15):
        assert rate_factor(config, step, steps=15) == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-9)
        optimizer.step()
        for schedule in schedules:
            schedule.step()


def test_cosine_agrees_with_torch_and_ends_at_zero() -> None:
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    schedule = CosineAnnealingLR(optimizer, T_max=20)
    config = ScheduleConfig(name="cosine", warmup_steps=4, warmup_factor=0.1)
    for step in range(21):
        assert rate_factor(config, step + 4, steps=24) == pytest.approx(optimizer.param_groups[0]["lr"], abs=1e-9)
        optimizer.step()
        schedule.step()
    assert rate_factor(config, 2, steps=24) == pytest.approx(0.55)


def test_polynomial_agrees_with_torch_and_ends_at_zero() -> None:
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    schedule = PolynomialLR(optimizer, total_iters=20, power=0.9)
    config = ScheduleConfig(name="polynomial", warmup_steps=4, power=0.9)
    for step in range(21):
        assert rate_factor(config, step + 4, steps=24) == pytest.approx(optimizer.param_groups[0]["lr"], abs=1e-9)
        optimizer.step()
        schedule.step()


def test_constant_and_no_warm_up() -> None:
    config = ScheduleConfig(name="constant", warmup_steps=0)
    assert [rate_factor(config, step, steps=10) for step in (0, 5, 9)] == [1.0, 1.0, 1.0]
