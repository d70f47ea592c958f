"""The latents' sums over chunks of nodes: adding, saving, loading.

Axes: S samples, G groups, D latents of all kernels in a group, r channels of a group.
"""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from latentgnn.errors import UserError, first_line, system_error
from latentgnn.files.reading import regular_file
from latentgnn.files.writing import write_bytes

_FORMAT = "latentgnn sums 1"
_TENSORS = ("sums", "weights", "counts", "checksums")


@dataclass(frozen=True, eq=False)
class LatentSums:
    """The result of gather over some chunks: a few numbers per latent, whatever the number of nodes.

    Sums of different chunks can be added: ``a + b`` equals the result of one sweep over the chunks of both. They also
    contain what is needed to detect another layer, or chunks that have changed.

    Args:
        sums: sums of values weighted by assignments, (S, G, D, r), float64, on the CPU.
        weights: what they will be divided by, (S, G, D), float64, on the CPU.
        layer: a fingerprint of the layer's options and weights.
        compute: dtype of the products over nodes, such as ``float32``.
        counts: number of nodes of each chunk, int64.
        checksums: checksum of each chunk, int64; empty if chunks are not checked.
    """

    sums: Tensor
    weights: Tensor
    layer: str
    compute: str
    counts: Tensor
    checksums: Tensor

    @property
    def nodes(self) -> int:
        """Number of nodes of all chunks."""
        return int(self.counts.sum())

    @property
    def is_finite(self) -> bool:
        """Whether all sums are finite; a single node that is not would make the results of all nodes useless."""
        return bool(self.sums.isfinite().all() and self.weights.isfinite().all())

    @cached_property
    def seen(self) -> frozenset[tuple[int, int]]:
        """Count and checksum of each chunk."""
        checked = len(self.checksums) == len(self.counts)
        return frozenset(zip(self.counts.tolist(), self.checksums.tolist(), strict=True)) if checked else frozenset()

    def requires_grad_(self) -> "LatentSums":
        """Collect the gradients of losses of `latentgnn.streaming.scatter_chunk`'s outputs here; returns itself."""
        self.sums.requires_grad_()
        self.weights.requires_grad_()
        return self

    def __add__(self, other: "LatentSums") -> "LatentSums":
        """Return the sums over the chunks of both.

        Raises:
            UserError: if layers or dtypes differ, or only one of them was checked.
            ValueError: if samples differ.
        """
        for name in ("layer", "compute"):
            one, two = getattr(self, name), getattr(other, name)
            if one != two:
                what = "layers, or other weights of one" if name == "layer" else "types"
                raise UserError(f"these sums are of two {what} ({one}, {two}): gather all chunks with the same")
        if self.sums.shape != other.sums.shape:
            raise ValueError(
                f"these sums are of {len(self.sums)} and {len(other.sums)} samples: each chunk has nodes of the same"
            )
        if (len(self.checksums) == len(self.counts)) != (len(other.checksums) == len(other.counts)):
            raise UserError("some of these sums have checksums and some not: gather all with the same check")
        return LatentSums(
            sums=self.sums + other.sums,
            weights=self.weights + other.weights,
            layer=self.layer,
            compute=self.compute,
            counts=torch.cat([self.counts, other.counts]),
            checksums=torch.cat([self.checksums, other.checksums]),
        )

    def save(self, path: Path | str) -> None:
        """Write a safetensors file, in one step."""
        tensors = {name: getattr(self, name).detach().contiguous() for name in _TENSORS}
        metadata = {"format": _FORMAT, "layer": self.layer, "compute": self.compute}
        write_bytes(path, safetensors.torch.save(tensors, metadata))

    @classmethod
    def load(cls, path: Path | str) -> "LatentSums":
        """Read what `save` wrote.

        Raises:
            UserError: if it is something else, or damaged.
        """
        regular_file(Path(path))
        try:
            with safetensors.safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except Exception as error:  # OSError, or the reader's own errors for other content
            if system_error(error) is not None:
                raise
            raise UserError(f"{path} cannot be read as a safetensors file ({first_line(error)})") from error
        if metadata.get("format") != _FORMAT or set(tensors) != set(_TENSORS) or not _fit(**tensors):
            raise UserError(f"{path} holds no sums of a layer: expected what LatentSums.save wrote; gather again")
        return cls(layer=metadata.get("layer", ""), compute=metadata.get("compute", ""), **tensors)


def _fit(sums: Tensor, weights: Tensor, counts: Tensor, checksums: Tensor) -> bool:
    floats = all(tensor.dtype == torch.float64 for tensor in (sums, weights))
    counted = all(tensor.dtype == torch.int64 and tensor.dim() == 1 for tensor in (counts, checksums))
    shapes = sums.dim() == 4 and weights.shape == sums.shape[:-1] and len(checksums) in (0, len(counts))
    return floats and counted and shapes
