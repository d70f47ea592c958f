"""A tiny task for the tests of training: dropout, batch norm, random draws, two groups of samples."""

import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from latentgnn.training.config import OptimizerConfig, ScheduleConfig, TrainingConfig
from latentgnn.training.fingerprint import Fingerprint, Record
from latentgnn.training.large_models import units
from latentgnn.training.runs import RunFolder


class ToyTrainingSet:
    def __init__(self, count: int = 22) -> None:
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, key: tuple[int, int]) -> tuple[Tensor, Tensor, int]:
        epoch, index = key
        generator = torch.Generator().manual_seed(1000 * epoch + index)
        image = torch.randn(3, 8, 8, generator=generator)
        return image, image.mean(), index

    def group_of(self, index: int) -> int:
        return index % 2


class ToyValidationSet:
    def __init__(self, count: int = 7) -> None:
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor, int]:
        image = torch.randn(3, 8, 8, generator=torch.Generator().manual_seed(index))
        return image, image.mean(), index


def toy_model() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Dropout(0.3), nn.Linear(288, 1)
    )


def linear_model() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(192, 1))


class ToyTask:
    """`on_losses` is called with the number of the call, from 1 on, and may return a factor on the loss."""

    monitor = "score"
    trained = ()

    def __init__(
        self,
        *,
        model: Callable[[], nn.Module] | None = None,
        on_losses: Callable[[int], float | None] = lambda call: None,
        noise: bool = True,
        count: int = 22,
        on_predict: Callable[[], None] = lambda: None,
    ) -> None:
        torch.manual_seed(5)
        self.model = (model or toy_model)()
        self.training_set = ToyTrainingSet(count)
        self.validation_set = ToyValidationSet()
        self.on_losses = on_losses
        self.on_predict = on_predict
        self.noise = noise
        self.calls = 0
        self.seen: list[list[int]] = []
        self.scored: list[list[Any]] = []

    def units(self) -> list[nn.Module]:
        return units(self.model)

    @staticmethod
    def collate(samples: list[Any]) -> Any:
        images, targets, ids = zip(*samples, strict=True)
        return {"images": torch.stack(images), "targets": torch.stack(targets), "ids": list(ids)}

    def sample_ids(self, batch: Any) -> list[Any]:
        return list(batch["ids"])

    def losses(self, batch: Any) -> dict[str, Tensor]:
        self.calls += 1
        self.seen.append(batch["ids"])
        factor = self.on_losses(self.calls)
        # Draws from all three generators: none of their states may matter to a resumed run.
        noise = random.random() + np.random.rand() + torch.rand(()) if self.noise else 0.0
        error = self.model(batch["images"]).squeeze(1) - batch["targets"] + noise
        return {"square": (error**2).mean() * (1.0 if factor is None else factor), "size": 0.1 * error.abs().mean()}

    def predict(self, batch: Any) -> list[Any]:
        self.on_predict()
        torch.rand(7), random.random(), np.random.rand()
        return [(index, float(value)) for index, value in zip(batch["ids"], self.model(batch["images"]), strict=True)]

    def score(self, results: Sequence[Any]) -> dict[str, float]:
        self.scored.append(list(results))
        return {"score": -sum(abs(value) for _, value in results), "count": len(results)}

    def fingerprints(self) -> dict[str, Fingerprint]:
        records = [Record(name=f"sample {index}") for index in range(len(self.training_set))]
        return {"training set": Fingerprint.of("toys", records)}


def config(**changes: Any) -> TrainingConfig:
    settings: dict[str, Any] = {
        "steps": 9,
        "batch_size": 4,
        "accumulate": 2,
        "accelerator": "cpu",
        "devices": 1,
        "workers": 0,
        "log_every": 2,
        "validate_every": 4,
        "checkpoint_every": 3,
        "clip_norm": 1.0,
        "optimizer": OptimizerConfig(learning_rate=0.05),
        "schedule": ScheduleConfig(warmup_steps=4, milestones=(7,)),
    }
    return TrainingConfig(**{**settings, **changes})


def new_run(path: Path) -> RunFolder:
    run = RunFolder.create(path, task="toy")
    run.write_config({"model": {"width": 8}, "data": {"root": "here"}})
    return run


def state_of(run: RunFolder) -> dict[str, Any]:
    """Weights and optimizer state of the last checkpoint, read with nothing of ours."""
    content = torch.load(run.checkpoint("last"), weights_only=True)
    return {"weights": content["state_dict"], "optimizer": content["optimizer"]["state"]}


def same(a: Any, b: Any) -> bool:
    """Equality bit for bit of nested dicts of tensors."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    return torch.equal(a, b) if isinstance(a, Tensor) else a == b
