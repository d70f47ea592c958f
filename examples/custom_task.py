"""A task of your own on the training package: exact resume, checkpoints, logs and a run folder for any model.

python examples/custom_task.py    # counts dots: an image holds up to four, far apart
"""

import tempfile
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import latentgnn
from latentgnn.training.config import OptimizerConfig, ScheduleConfig, TrainingConfig
from latentgnn.training.fingerprint import Fingerprint, Record
from latentgnn.training.loop import fit
from latentgnn.training.runs import RunFolder
from latentgnn.training.task import TrainingSet, ValidationSet


def dots(number: int) -> tuple[Tensor, int, int]:
    """An image that depends on its number alone, so that a resumed run sees what an uninterrupted one would."""
    generator = torch.Generator().manual_seed(number)
    count = int(torch.randint(5, (), generator=generator))
    image = 0.2 * torch.randn(1, 32, 32, generator=generator)
    for place in torch.randperm(64, generator=generator)[:count].tolist():
        image[:, 4 * (place // 8) :][:, :3, 4 * (place % 8) :][..., :3] += 1
    return image, count, number


class Training:
    def __len__(self) -> int:
        return 256

    def __getitem__(self, key: tuple[int, int]) -> tuple[Tensor, int, int]:
        epoch, index = key
        return dots(1000 * epoch + index)

    def group_of(self, index: int) -> int:
        return 0  # all samples may share a batch


class Validation:
    def __len__(self) -> int:
        return 64

    def __getitem__(self, index: int) -> tuple[Tensor, int, int]:
        return dots(10**9 + index)


class Counting:
    """What `latentgnn.training.task.TrainingTask` asks for."""

    monitor = "accuracy"  # the best checkpoint is the one with the highest
    trained: Collection[str] = ()

    def __init__(self) -> None:
        torch.manual_seed(0)
        layers = [nn.Conv2d(1, 32, 4, stride=4), nn.BatchNorm2d(32), nn.ReLU()]
        self.model: nn.Module = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 5))
        latentgnn.insert(self.model, {"2": 8}, gamma_init=1.0, reduction=4, example_input=torch.zeros(1, 1, 32, 32))
        self.training_set: TrainingSet = Training()
        self.validation_set: ValidationSet = Validation()

    def collate(self, samples: list[Any]) -> dict[str, Any]:
        images, counts, numbers = zip(*samples, strict=True)
        return {"images": torch.stack(images), "counts": torch.tensor(counts), "numbers": numbers}

    def sample_ids(self, batch: Any) -> list[Any]:
        return list(batch["numbers"])

    def losses(self, batch: Any) -> dict[str, Tensor]:
        return {"count": nn.functional.cross_entropy(self.model(batch["images"]), batch["counts"])}

    def predict(self, batch: Any) -> list[Any]:
        return list((self.model(batch["images"]).argmax(1) == batch["counts"]).tolist())

    def score(self, results: Sequence[Any]) -> dict[str, float]:
        return {"accuracy": sum(results) / len(results)}

    def units(self) -> list[nn.Module]:
        return []  # none is large enough to be split over devices, or computed again

    def fingerprints(self) -> Mapping[str, Fingerprint]:
        return {"training set": Fingerprint.of("dots", [Record(name="made from their numbers")])}


def main() -> None:
    """Train in a new run folder; `fit(..., resume=True)` goes on with one that was stopped."""
    optimizer, schedule = OptimizerConfig(name="adamw", learning_rate=0.02), ScheduleConfig(warmup_steps=5)
    how = TrainingConfig(steps=60, batch_size=32, workers=0, log_every=20, optimizer=optimizer, schedule=schedule)
    run = RunFolder.create(Path(tempfile.mkdtemp()) / "run", task="counting")
    run.write_config({"model": {"latents": 8}, "data": {}})
    print(fit(Counting(), how, run), "in", run.path)


if __name__ == "__main__":
    main()
