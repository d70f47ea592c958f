"""Recorded values as named NumPy arrays, as written to NPZ files."""

from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from latentgnn.inspection.recording import SeenBlock


def arrays_of(blocks: Iterable[SeenBlock]) -> Iterator[tuple[str, NDArray[Any]]]:
    """Yield name and values of every array: see `latentgnn.inspection.Seen.save`."""
    for block in blocks:
        if block.gamma is not None:
            yield f"{block.name}/gamma", np.array(block.gamma)
        for number, sample in enumerate(block.samples):
            place = f"{block.name}/{number}"
            yield f"{place}/shape", np.array(sample.shape)
            yield f"{place}/change", np.array(sample.change)
            yield f"{place}/values", _array(sample.values)
            if sample.mask is not None:
                yield f"{place}/mask", _array(sample.mask)
            for index, kernel in enumerate(sample.kernels):
                for what in ("gather", "scatter", "affinity", "latents", "mixed"):
                    yield f"{place}/kernel{index}/{what}", _array(getattr(kernel, what))


def _array(tensor: Tensor) -> NDArray[Any]:
    # NumPy has no bfloat16.
    tensor = tensor.float() if tensor.dtype in (torch.bfloat16, torch.float16) else tensor
    return tensor.cpu().numpy()
