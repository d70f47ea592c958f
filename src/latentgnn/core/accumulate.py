"""Products over nodes that are added to a base: out = base + (x W^T) * scale + shift.

Axes: s rows of the input, T nodes; C, K, O channels.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from latentgnn.core.layouts import empty_like_layout, from_columns, laid_out_like, nodes_innermost, not_a_view
from latentgnn.core.products import project
from latentgnn.core.routines import for_onednn, is_turned, outer, takes_onednn
from latentgnn.core.scaling import scaled_
from latentgnn.numerics import to_dtype

# An output of fewer elements than this is computed in one call: the allocator keeps up to 32 MB, so it mostly reuses
# memory. If one call is not possible and there are fewer features than this, writing takes as long as computing, and
# MKL adds in one pass.
_MANY_OUTPUTS = 1 << 23
_FEW_FEATURES = 64
# If a sum follows, this many elements of an output are computed at a time, so that they are still in a cache.
NUMBERS_AT_ONCE = 1 << 19


def add_projection(
    base_sTC: Tensor | None,
    x_sTK: Tensor,
    matrix_CK: Tensor,
    scale_C: Tensor | None,
    shift_C: Tensor | None,
    out_sTC: Tensor | None,
) -> Tensor:
    """base + (x W^T) * scale + shift, where ``None`` leaves a term out; ``base`` may be ``out``.

    It is written to ``out``, or if that is ``None`` to new memory in the layout of ``base``.
    """
    samples, nodes, features = x_sTK.shape
    channels = matrix_CK.shape[0]
    alike = x_sTK.dtype == matrix_CK.dtype
    onednn = alike and takes_onednn(matrix_CK, samples * nodes)
    if out_sTC is None:
        assert base_sTC is not None
        if onednn and samples * nodes >= features and _is_one_call(base_sTC, x_sTK):
            matrix_CK = matrix_CK if scale_C is None else matrix_CK * scale_C.unsqueeze(1)
            return _add_whole(base_sTC, x_sTK, matrix_CK, shift_C)
        out_sTC = empty_like_layout(base_sTC, channels)
    if features < _FEW_FEATURES and samples * nodes * channels <= _MANY_OUTPUTS:
        onednn = False
    # With few nodes the matrix is larger than the output, and scaling it takes longer.
    if not onednn and (scale_C is None or samples * nodes >= features or x_sTK.dtype != scale_C.dtype):
        matrix_CK = matrix_CK if scale_C is None else matrix_CK * scale_C.unsqueeze(1)
        _add_batch(base_sTC, x_sTK, to_dtype(matrix_CK, x_sTK.dtype), shift_C, out_sTC)
        return out_sTC
    if nodes_innermost(x_sTK) and not is_turned(matrix_CK, samples * nodes):
        # Once here, instead of once for each part below.
        matrix_CK = matrix_CK.contiguous()
    # In parts, so that each product is still in a cache when the base is added.
    length = max(NUMBERS_AT_ONCE // channels, 256)
    # An empty scene of packed points is a block without nodes.
    together = max(length // max(nodes, 1), 1)
    for first in range(0, samples, together):
        for start in range(0, nodes, length):
            part = slice(first, first + together), slice(start, start + length)
            y_stC = laid_out_like(project(x_sTK[part], matrix_CK, shift_C if scale_C is None else None), out_sTC)
            if scale_C is not None:
                y_stC = scaled_(y_stC, scale_C, shift_C)
            if base_sTC is None:
                out_sTC[part].copy_(y_stC)
            else:
                torch.add(base_sTC[part], y_stC, out=out_sTC[part])
    return out_sTC


def _is_one_call(base_sTC: Tensor, x_sTK: Tensor) -> bool:
    """Whether one product can give the whole output: dense, small enough, and one sample if nodes are innermost."""
    if base_sTC.numel() >= _MANY_OUTPUTS or base_sTC.dtype != x_sTK.dtype:
        return False
    if nodes_innermost(x_sTK):
        return x_sTK.shape[0] == 1 and base_sTC[0].mT.is_contiguous()
    return base_sTC.is_contiguous()


def _add_whole(base_sTC: Tensor, x_sTK: Tensor, matrix_CK: Tensor, shift_C: Tensor | None) -> Tensor:
    """base + x W^T + shift in new memory, where `_is_one_call` is true."""
    if nodes_innermost(x_sTK):
        out_CT = _plus(base_sTC[0].mT, matrix_CK, x_sTK[0], None)
        return not_a_view(from_columns(out_CT if shift_C is None else out_CT.add_(shift_C.unsqueeze(1)), 1))
    out_MC = _plus(base_sTC.flatten(0, 1), x_sTK.flatten(0, 1), matrix_CK, shift_C)
    return not_a_view(out_MC.view(base_sTC.shape))


def _plus(base_PQ: Tensor, left_PK: Tensor, right_QK: Tensor, shift_Q: Tensor | None) -> Tensor:
    """base + left right^T + shift."""
    if base_PQ.numel() > NUMBERS_AT_ONCE:
        return outer(left_PK, right_QK, shift_Q).add_(base_PQ)
    left_PK, right_QK = for_onednn(left_PK, right_QK)
    return torch.ops.mkldnn._linear_pointwise.binary(left_PK, base_PQ, right_QK, shift_Q, "add")


def _add_batch(
    base_sTC: Tensor | None, x_sTK: Tensor, matrix_CK: Tensor, shift_C: Tensor | None, out_sTC: Tensor
) -> None:
    """out = base + x W^T + shift, in one call where the types are alike."""
    shift_C = None if shift_C is None else to_dtype(shift_C, x_sTK.dtype)
    if base_sTC is None:
        out_sTC.copy_(project(x_sTK, matrix_CK, shift_C))
        return
    # cuBLAS refuses some strides that a single row or column may have.
    single = not x_sTK.is_cpu and len(x_sTK) == 1 and 1 in out_sTC.shape[1:]
    if single or not base_sTC.dtype == out_sTC.dtype == x_sTK.dtype:
        torch.add(base_sTC, project(x_sTK, matrix_CK, shift_C), out=out_sTC)
        return
    base, left, right, out = base_sTC, x_sTK, matrix_CK.mT.expand(len(x_sTK), -1, -1), out_sTC
    if nodes_innermost(out_sTC):
        base, left, right, out = base.mT, matrix_CK.expand(len(x_sTK), -1, -1), x_sTK.mT, out_sTC.mT
        shift_C = None if shift_C is None else shift_C.unsqueeze(-1)
    if len(x_sTK) == 1:
        torch.addmm(base[0], left[0], right[0], out=out[0])
    else:
        torch.baddbmm(base, left, right, out=out)
    if shift_C is not None:
        out.add_(shift_C)


def add_project_back(
    base_sTC: Tensor | None, grad_sTO: Tensor, matrices_RC: Sequence[Tensor], out_sTC: Tensor | None
) -> Tensor:
    """base + g W, for the matrices of `project_all`; written where `add_projection` would write it."""
    channels = matrices_RC[0].shape[1]
    if len(matrices_RC) > 1 and grad_sTO.shape[0] * grad_sTO.shape[1] >= channels // 2:
        matrices_RC = [torch.cat(list(matrices_RC))]
    parts = grad_sTO.split([matrix_RC.shape[0] for matrix_RC in matrices_RC], -1)
    for part, matrix_RC in zip(parts, matrices_RC, strict=True):
        base_sTC = add_projection(base_sTC, part, matrix_RC.mT, None, None, out_sTC)
    assert base_sTC is not None
    return base_sTC
