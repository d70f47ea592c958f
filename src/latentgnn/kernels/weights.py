"""A matrix with the norm after it, as the kernels take them, and the gradients of what the norm has learnt."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Projected(NamedTuple):
    """A matrix and the norm after it.

    Args:
        matrix: (O, I).
        norm: weight, bias, mean and variance, (O,) each; ``None`` for what it does not have.
        eps: of the norm.
    """

    matrix: Tensor
    norm: Sequence[Tensor | None]
    eps: float

    @classmethod
    def of(cls, five: Sequence[Tensor | None], eps: float, dtype: torch.dtype) -> "Projected":
        """From the five tensors of a projection, with the matrix in the type of the products.

        A norm without statistics is none.
        """
        matrix, *norm = five
        assert matrix is not None
        known = norm if norm[2] is not None and norm[3] is not None else [None] * 4
        return cls(matrix.detach().to(dtype).contiguous(), known, eps)

    @property
    def learns(self) -> bool:
        """Whether the norm does."""
        return any(tensor is not None and tensor.requires_grad for tensor in self.norm[:2])

    def norm_gradients(self, scale_O: Tensor | None, shift_O: Tensor | None) -> list[Tensor | None]:
        """Of the norm's four tensors, from those of what it multiplies by and adds."""
        weight, bias, mean, var = self.norm
        grads: list[Tensor | None] = [None] * 4
        if not self.learns or scale_O is None or shift_O is None or mean is None or var is None:
            return grads
        if weight is not None:
            grads[0] = (scale_O - mean * shift_O) * (var.float() + self.eps).rsqrt()
        if bias is not None:
            grads[1] = shift_O
        return grads
