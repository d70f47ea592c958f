"""What the training loop asks of a task; the loop knows nothing else of it."""

from collections.abc import Collection, Mapping, Sequence
from typing import Any, Protocol

from torch import Tensor, nn

from latentgnn.training.fingerprint import Fingerprint


class TrainingSet(Protocol):
    """Samples whose content depends on the epoch and the index alone."""

    def __len__(self) -> int: ...

    def __getitem__(self, key: tuple[int, int], /) -> Any:
        """The sample of ``(epoch, index)``."""

    def group_of(self, index: int) -> int:
        """The group that a sample may share a batch with."""


class ValidationSet(Protocol):
    """Samples to evaluate on, in a fixed order."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Any: ...


class TrainingTask(Protocol):
    """A model, its data and its scores."""

    model: nn.Module
    training_set: TrainingSet
    validation_set: ValidationSet
    monitor: str
    trained: Collection[str]
    """Names of the parameters that began with trained weights; the blocks are never among them."""

    def units(self) -> list[nn.Module]:
        """The modules that large models repeat, see `latentgnn.training.large_models`; each runs in every batch."""

    def collate(self, samples: list[Any]) -> Any:
        """A batch; tensors in it move to the device by themselves."""

    def sample_ids(self, batch: Any) -> list[Any]:
        """What names the samples of a batch to a person."""

    def losses(self, batch: Any) -> dict[str, Tensor]:
        """The scalar losses of a batch in training mode; their sum is what is minimised."""

    def predict(self, batch: Any) -> list[Any]:
        """The plain-data results of a batch in evaluation mode, on the CPU."""

    def score(self, results: Sequence[Any]) -> dict[str, float]:
        """The metrics of all results of the validation set, gathered from all processes."""

    def fingerprints(self) -> Mapping[str, Fingerprint]:
        """What the sets consist of, by names for people; asked once, by the process that writes."""
