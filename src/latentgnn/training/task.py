"""The interface between a task and the training loop, which knows nothing else of the task."""

from collections.abc import Collection, Mapping, Sequence
from typing import Any, Protocol

from torch import Tensor, nn

from latentgnn.training.fingerprint import Fingerprint


class TrainingSet(Protocol):
    """Samples whose content depends only on the epoch and the index."""

    def __len__(self) -> int: ...

    def __getitem__(self, key: tuple[int, int], /) -> Any:
        """Return the sample of ``(epoch, index)``."""

    def group_of(self, index: int) -> int:
        """Return a sample's group; only samples of one group share a batch."""


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
    """Names of the parameters that started from trained weights; the blocks are never among them."""

    def units(self) -> list[nn.Module]:
        """Return the model's repeated modules, see `latentgnn.training.large_models`; each must run in every batch."""

    def collate(self, samples: list[Any]) -> Any:
        """Make a batch of samples; the loop moves tensors in it to the device."""

    def sample_ids(self, batch: Any) -> list[Any]:
        """Return the names of a batch's samples, for messages."""

    def losses(self, batch: Any) -> dict[str, Tensor]:
        """Return the scalar losses of a batch in training mode; their sum is minimised."""

    def predict(self, batch: Any) -> list[Any]:
        """Return the results of a batch in evaluation mode, as plain data on the CPU."""

    def score(self, results: Sequence[Any]) -> dict[str, float]:
        """Return the metrics of all results of the validation set, gathered from all processes."""

    def fingerprints(self) -> Mapping[str, Fingerprint]:
        """Return fingerprints of the data sets, by name; called once, in the process that writes."""
