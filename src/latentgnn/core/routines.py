"""Products of two matrices, by the routine that this machine runs fastest.

On a CPU, PyTorch's matrix product is MKL's. With AVX-512, oneDNN's linear map of dense matrices is used where it is
faster (measured on AMD). The choice depends only on the processor, the dtype and the sizes, so a resumed run makes the
same choice and ends with the same bits.

Axes: P rows of the left matrix, Q of the right one, K columns of both.
"""

from functools import cache

import torch
from torch import Tensor

from latentgnn.core.layouts import is_plain

# From this many multiply-adds on, oneDNN is used; below, its call costs more than it saves (measured).
_MANY_OPERATIONS = 1 << 21
# Up to this many outputs, MKL is faster at sums over rows, because it needs no copies.
_SMALL_SUM = 96 * 96


@cache
def _has_onednn() -> bool:
    vector = torch.backends.cpu.get_cpu_capability() == "AVX512"
    return vector and torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def takes_onednn(left_PK: Tensor, outputs: int) -> bool:
    if left_PK.dtype != torch.float32 or left_PK.device.type != "cpu" or not _has_onednn():
        return False
    return is_plain(left_PK) and left_PK.numel() * outputs >= _MANY_OPERATIONS


def is_turned(left_PK: Tensor, outputs: int) -> bool:
    """Whether to compute the transposed product: the left matrix is transposed and much larger than the output."""
    return left_PK.stride(1) != 1 and 4 * outputs <= min(left_PK.shape)


def _is_small_sum(left_PK: Tensor, right_QK: Tensor) -> bool:
    """Whether a product is a sum over rows with few outputs, for which oneDNN's copies cost more than it saves."""
    return left_PK.stride(1) != 1 and right_QK.stride(1) != 1 and len(left_PK) * len(right_QK) <= _SMALL_SUM


def for_onednn(left_PK: Tensor, right_QK: Tensor) -> tuple[Tensor, Tensor]:
    """The two matrices as oneDNN takes them.

    It is thousands of times slower on rows with gaps, and slower where the left matrix is a transposed one.
    """
    right_QK = right_QK.contiguous() if right_QK.stride(1) == 1 else right_QK.mT.contiguous().mT
    return left_PK.contiguous(), right_QK


def outer(left_PK: Tensor, right_QK: Tensor, shift_Q: Tensor | None = None) -> Tensor:
    """left right^T + shift, (P, Q)."""
    if takes_onednn(left_PK, right_QK.shape[0]) and not _is_small_sum(left_PK, right_QK):
        if shift_Q is None and is_turned(left_PK, right_QK.shape[0]):
            return outer(right_QK, left_PK).mT.contiguous()
        left_PK, right_QK = for_onednn(left_PK, right_QK)
        return torch.ops.mkldnn._linear_pointwise.default(left_PK, right_QK, shift_Q, "none", [], "")
    if shift_Q is None:
        return torch.mm(left_PK, right_QK.mT)
    return torch.addmm(shift_Q, left_PK, right_QK.mT)
