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
        """From the five tensors of a projection, with the matrix in the dtype of the products.

        A norm without stored statistics is ignored. Vectors become contiguous, because the kernels ignore strides.
        """
        matrix, *norm = five
        assert matrix is not None
        known = [None if tensor is None else tensor.contiguous() for tensor in norm]
        known = known if known[2] is not None and known[3] is not None else [None] * 4
        return cls(matrix.detach().to(dtype).contiguous(), known, eps)

    def norm_gradients(
        self, scale_O: Tensor | None, shift_O: Tensor | None, *, needs: Sequence[bool]
    ) -> list[Tensor | None]:
        """Gradients of the norm's four tensors, from those of its scale and shift.

        Args:
            scale_O: of what it multiplies by; ``None`` where none is needed, like ``shift_O``.
            shift_O: of what it adds.
            needs: whether each of the five tensors of the projection needs one.
        """
        _, _, mean, var = self.norm
        if scale_O is None or shift_O is None or mean is None or var is None:
            return [None] * 4
        weight_O = (scale_O - mean * shift_O) * (var.float() + self.eps).rsqrt() if needs[1] else None
        return [weight_O, shift_O if needs[2] else None, None, None]
