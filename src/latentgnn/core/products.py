"""Products over nodes, by the routine that this machine runs fastest.

On a CPU, PyTorch's matrix product is MKL. On AMD's processors with AVX-512 oneDNN is faster, as a linear map of dense
matrices. Which routine runs depends on the processor, the type and the sizes alone, so that a resumed run takes the
same and ends with the same bits.

Where nodes lie innermost, what is computed for several samples on a CPU has the nodes of all of them side by side in
memory, (channels, s * T): what is done to each node is then one matrix product, and not one for each sample.

Axes: s rows of the input, T nodes, M = s * T; E graphs (samples by groups); C, F, K, O channels.
"""

from collections.abc import Iterator, Sequence
from functools import cache

import torch
from torch import Tensor, nn

from latentgnn.core.nodes import empty_like_layout, nodes_innermost
from latentgnn.functional import cast, wide

# oneDNN takes over from so many multiply-adds on, as measured: below, its call costs more than it saves.
_MANY_OPERATIONS = 1 << 21
# Samples are put side by side up to so many nodes: more are as fast by themselves, and need no copy.
_NODES_AT_ONCE = 2048
# With fewer features, an output of up to so many numbers is as fast to write as to compute: MKL adds it in one pass.
_FEW_FEATURES = 64
_MANY_OUTPUTS = 1 << 23
# So many numbers of an output are made at once where a sum follows, so that they are still in a cache then.
NUMBERS_AT_ONCE = 1 << 19


# A DTensor, say, has no oneDNN products of its own.
_PLAIN = (Tensor, nn.Parameter)


@cache
def _has_onednn() -> bool:
    vector = torch.backends.cpu.get_cpu_capability() == "AVX512"
    return vector and torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def _takes_onednn(left_PK: Tensor, outputs: int) -> bool:
    if left_PK.dtype != torch.float32 or left_PK.device.type != "cpu" or not _has_onednn():
        return False
    if type(left_PK) not in _PLAIN:
        return False
    return left_PK.numel() * outputs >= _MANY_OPERATIONS


def _is_turned(left_PK: Tensor, outputs: int) -> bool:
    """Whether a product is so much smaller than its left matrix, a transposed one, that it is turned about instead."""
    return left_PK.stride(1) != 1 and 4 * outputs <= min(left_PK.shape)


def _outer(left_PK: Tensor, right_QK: Tensor, shift_Q: Tensor | None = None) -> Tensor:
    """left right^T + shift, (P, Q)."""
    if _takes_onednn(left_PK, right_QK.shape[0]):
        if shift_Q is None and _is_turned(left_PK, right_QK.shape[0]):
            return _outer(right_QK, left_PK).mT.contiguous()
        # oneDNN is thousands of times slower on rows with gaps, and slower where the left matrix is a transposed one.
        right_QK = right_QK.contiguous() if right_QK.stride(1) == 1 else right_QK.mT.contiguous().mT
        return torch.ops.mkldnn._linear_pointwise(left_PK.contiguous(), right_QK, shift_Q, "none", [], "")
    if shift_Q is None:
        return torch.mm(left_PK, right_QK.mT)
    return torch.addmm(shift_Q, left_PK, right_QK.mT)


def columns(x_sTC: Tensor) -> Tensor:
    """(C, M): a view where the nodes of all samples lie side by side, or channels innermost."""
    return x_sTC[0].mT if x_sTC.shape[0] == 1 else x_sTC.permute(2, 0, 1).reshape(x_sTC.shape[2], -1)


def from_columns(x_CM: Tensor, samples: int) -> Tensor:
    """(s, T, C), a view with nodes innermost."""
    return x_CM.mT.unsqueeze(0) if samples == 1 else x_CM.unflatten(1, (samples, -1)).permute(1, 2, 0)


def laid_out_like(x_sTC: Tensor, like_sTC: Tensor) -> Tensor:
    """A dense tensor with nodes innermost where they are in ``like``: what is not is turned about in one copy."""
    innermost = nodes_innermost(like_sTC)
    if nodes_innermost(x_sTC) == innermost:
        return x_sTC
    return x_sTC.mT.contiguous().mT if innermost else x_sTC.contiguous()


def lie_together(x_sTC: Tensor) -> bool:
    """Whether the nodes of all samples follow one another, so that `_columns` is a view."""
    return x_sTC.shape[0] == 1 or x_sTC.stride(0) == x_sTC.shape[1] * x_sTC.stride(1)


def side_by_side(x_sTC: Tensor, memory_sTC: Tensor | None) -> Tensor:
    """The same numbers with the nodes of all samples side by side, where several products of a few nodes follow.

    Args:
        x_sTC: the tensor; it comes back as it is where it is large, lies so already, or has channels innermost.
        memory_sTC: of the same shape and dense, to write to what is needed until it gets its own numbers.
    """
    samples, nodes, channels = x_sTC.shape
    if x_sTC.device.type != "cpu" or type(x_sTC) not in _PLAIN or samples * nodes > _NODES_AT_ONCE:
        return x_sTC
    if lie_together(x_sTC) or not nodes_innermost(x_sTC):
        return x_sTC
    if memory_sTC is None or memory_sTC.dtype != x_sTC.dtype:
        return from_columns(columns(x_sTC), samples)
    columns_CsT = memory_sTC.new_empty(0).set_(
        memory_sTC.untyped_storage(), 0, (channels, samples, nodes), (samples * nodes, nodes, 1)
    )
    return columns_CsT.copy_(x_sTC.permute(2, 0, 1)).permute(1, 2, 0)


def _sample_parts(x_sTC: Tensor) -> Iterator[slice]:
    """Samples that are put side by side at once."""
    together = x_sTC.shape[0] if lie_together(x_sTC) else max(_NODES_AT_ONCE // max(x_sTC.shape[1], 1), 1)
    return (slice(first, first + together) for first in range(0, x_sTC.shape[0], together))


def _by_samples(x_sTC: Tensor) -> bool:
    """Whether samples that lie apart are better multiplied in a batch than put side by side first."""
    return x_sTC.device.type != "cpu" and not lie_together(x_sTC)


def project(x_sTC: Tensor, matrix_OC: Tensor, shift_O: Tensor | None = None) -> Tensor:
    """x W^T + shift, (s, T, O), with nodes innermost where they are in ``x``."""
    samples, nodes, channels = x_sTC.shape
    if not nodes_innermost(x_sTC):
        return _outer(x_sTC.reshape(-1, channels), matrix_OC, shift_O).view(samples, nodes, matrix_OC.shape[0])
    if _by_samples(x_sTC):
        y_sTO = torch.bmm(matrix_OC.expand(samples, -1, -1), x_sTC.mT).mT
        return y_sTO if shift_O is None else y_sTO.add_(shift_O)
    if shift_O is not None and samples == 1 and not _takes_onednn(matrix_OC, nodes):
        return torch.addmm(shift_O.unsqueeze(1), matrix_OC, x_sTC[0].mT).mT.unsqueeze(0)
    if samples == 1:
        y_OM = _outer(matrix_OC, x_sTC[0])
    elif len(parts := list(_sample_parts(x_sTC))) == 1:
        y_OM = _outer(matrix_OC, columns(x_sTC).mT)
    else:
        y_OM = x_sTC.new_empty(matrix_OC.shape[0], samples * nodes)
        for part in parts:
            columns_CM = columns(x_sTC[part])
            y_OM.narrow(1, part.start * nodes, columns_CM.shape[1]).copy_(_outer(matrix_OC, columns_CM.mT))
    if shift_O is not None:
        y_OM.add_(shift_O.unsqueeze(1))
    return from_columns(y_OM, samples)


def project_back(grad_sTO: Tensor, matrix_OC: Tensor) -> Tensor:
    """g W, the gradient of x where `project` gave x W^T: (s, T, C), with nodes innermost where they are in ``grad``."""
    return project(grad_sTO, matrix_OC.mT)


def project_all(x_sTC: Tensor, matrices_RC: Sequence[Tensor]) -> Tensor:
    """x W^T for matrices below one another, (s, T, rows of all)."""
    if len(matrices_RC) == 1:
        return project(x_sTC, matrices_RC[0])
    samples, nodes, channels = x_sTC.shape
    if samples * nodes >= channels // 2:
        return project(x_sTC, torch.cat(list(matrices_RC)))
    # Few nodes: the matrices are the larger part, and to join them would take longer than what it saves.
    if not nodes_innermost(x_sTC):
        return torch.cat([project(x_sTC, matrix_RC) for matrix_RC in matrices_RC], -1)
    if _by_samples(x_sTC):
        return torch.cat([project(x_sTC, matrix_RC).mT for matrix_RC in matrices_RC], 1).mT
    columns_MC = columns(x_sTC).mT
    return from_columns(torch.cat([_outer(matrix_RC, columns_MC) for matrix_RC in matrices_RC]), samples)


def add_project_back(
    base_sTC: Tensor | None, grad_sTO: Tensor, matrices_RC: Sequence[Tensor], out_sTC: Tensor | None
) -> Tensor:
    """base + g W, for the matrices of `project_all`; as `add_projection`, also in where it is written."""
    channels = matrices_RC[0].shape[1]
    if len(matrices_RC) > 1 and grad_sTO.shape[0] * grad_sTO.shape[1] >= channels // 2:
        matrices_RC = [torch.cat(list(matrices_RC))]
    parts = grad_sTO.split([matrix_RC.shape[0] for matrix_RC in matrices_RC], -1)
    for part, matrix_RC in zip(parts, matrices_RC, strict=True):
        base_sTC = add_projection(base_sTC, part, matrix_RC.mT, None, None, out_sTC)
    assert base_sTC is not None
    return base_sTC


def project_each(x_ETK: Tensor, matrix_EOK: Tensor) -> Tensor:
    """x W^T with a matrix for each graph, (E, T, O), with nodes innermost where they are in ``x``."""
    graphs, nodes, _ = x_ETK.shape
    if graphs == 1:
        return project(x_ETK, matrix_EOK[0])
    if not nodes_innermost(x_ETK):
        return torch.bmm(x_ETK, matrix_EOK.mT)
    if x_ETK.device.type != "cpu":
        return torch.bmm(matrix_EOK, x_ETK.mT).mT
    y_EOT = x_ETK.new_empty(matrix_EOK.shape[1], graphs, nodes).transpose(0, 1)
    return torch.bmm(matrix_EOK, x_ETK.mT, out=y_EOT).mT


def add_projection(
    base_sTC: Tensor | None,
    x_sTK: Tensor,
    matrix_CK: Tensor,
    scale_C: Tensor | None,
    shift_C: Tensor | None,
    out_sTC: Tensor | None,
) -> Tensor:
    """base + (x W^T) * scale + shift, with ``None`` for ones and zeros; ``base`` may be ``out``.

    It is written to ``out``, or without that to new memory in the layout of ``base``.
    """
    samples, nodes, features = x_sTK.shape
    channels = matrix_CK.shape[0]
    alike = x_sTK.dtype == matrix_CK.dtype
    onednn = alike and _takes_onednn(matrix_CK, samples * nodes)
    if out_sTC is None:
        assert base_sTC is not None
        if onednn and samples * nodes >= features and _is_one_call(base_sTC, x_sTK):
            matrix_CK = matrix_CK if scale_C is None else matrix_CK * scale_C.unsqueeze(1)
            return _add_rows(base_sTC, x_sTK, matrix_CK, shift_C)
        out_sTC = empty_like_layout(base_sTC, channels)
    if features < _FEW_FEATURES and samples * nodes * channels <= _MANY_OUTPUTS:
        onednn = False
    # With few nodes the matrix is larger than the output, and scaling it takes longer.
    if not onednn and (scale_C is None or samples * nodes >= features or x_sTK.dtype != scale_C.dtype):
        matrix_CK = matrix_CK if scale_C is None else matrix_CK * scale_C.unsqueeze(1)
        _add_batch(base_sTC, x_sTK, cast(matrix_CK, x_sTK.dtype), shift_C, out_sTC)
        return out_sTC
    if not _is_turned(matrix_CK, samples * nodes):
        matrix_CK = matrix_CK.contiguous()
    # In parts, whose product is still in a cache when the base is added.
    length = max(NUMBERS_AT_ONCE // channels, 256)
    together = max(length // nodes, 1)
    for first in range(0, samples, together):
        for start in range(0, nodes, length):
            part = slice(first, first + together), slice(start, start + length)
            y_stC = laid_out_like(project(x_sTK[part], matrix_CK), out_sTC)
            if shift_C is not None:
                y_stC = y_stC.add_(shift_C) if scale_C is None else torch.addcmul(shift_C, y_stC, scale_C, out=y_stC)
            elif scale_C is not None:
                y_stC = y_stC.mul_(scale_C)
            if base_sTC is None:
                out_sTC[part].copy_(y_stC)
            else:
                torch.add(base_sTC[part], y_stC, out=out_sTC[part])
    return out_sTC


def _is_one_call(base_sTC: Tensor, x_sTK: Tensor) -> bool:
    """Whether oneDNN can add a base in the same call: dense, not much, and of one sample where nodes are innermost."""
    if base_sTC.numel() > NUMBERS_AT_ONCE or base_sTC.dtype != x_sTK.dtype:
        return False
    if nodes_innermost(x_sTK):
        return x_sTK.shape[0] == 1 and base_sTC[0].mT.is_contiguous()
    return x_sTK.is_contiguous() and base_sTC.is_contiguous()


def _add_rows(base_sTC: Tensor, x_sTK: Tensor, matrix_CK: Tensor, shift_C: Tensor | None) -> Tensor:
    """base + x W^T + shift in one call, for what `_is_one_call` says."""
    if nodes_innermost(x_sTK):
        x_TK = x_sTK[0]
        x_TK = x_TK if x_TK.stride(0) == 1 and x_TK.stride(1) == x_TK.shape[0] else x_TK.mT.contiguous().mT
        out = torch.ops.mkldnn._linear_pointwise(matrix_CK.contiguous(), base_sTC[0].mT, x_TK, None, "add")
        out = out if shift_C is None else out.add_(shift_C.unsqueeze(1))
        return not_a_view(from_columns(out, 1))
    rows, base = x_sTK.flatten(0, 1), base_sTC.flatten(0, 1)
    right = matrix_CK if matrix_CK.stride(1) == 1 else matrix_CK.mT.contiguous().mT
    out = torch.ops.mkldnn._linear_pointwise(rows, base, right, shift_C, "add")
    return not_a_view(out.view(base_sTC.shape))


def not_a_view(new: Tensor) -> Tensor:
    """A view of new memory as a tensor of its own: autograd refuses operations in place on views from a function."""
    if type(new) is not Tensor:
        return new
    return new.new_empty(0).set_(new.untyped_storage(), new.storage_offset(), new.shape, new.stride())


def _add_batch(
    base_sTC: Tensor | None, x_sTK: Tensor, matrix_CK: Tensor, shift_C: Tensor | None, out_sTC: Tensor
) -> None:
    """out = base + x W^T + shift, in one call where the types are alike."""
    shift_C = None if shift_C is None else cast(shift_C, x_sTK.dtype)
    if base_sTC is None:
        out_sTC.copy_(project(x_sTK, matrix_CK, shift_C))
        return
    if not base_sTC.dtype == out_sTC.dtype == x_sTK.dtype:
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


def contract(left_ETF: Tensor, right_ETK: Tensor) -> Tensor:
    """left^T right, the sum over the nodes of each graph, (E, F, K), in the wide type."""
    if left_ETF.dtype == torch.float16:
        # Sums over many nodes leave float16's range; 1 / sqrt(T) keeps them inside.
        root = max(left_ETF.shape[1], 1) ** 0.5
        return torch.bmm(left_ETF.mT, right_ETK * (1 / root)).float() * root
    if left_ETF.shape[0] == 1:
        return contract_all(left_ETF, right_ETK).unsqueeze(0)
    return cast(torch.bmm(left_ETF.mT, right_ETK), wide(left_ETF.dtype))


def contract_all(left_sTF: Tensor, right_sTK: Tensor) -> Tensor:
    """left^T right, the sum over the nodes of all rows, (F, K), in the wide type."""
    if left_sTF.dtype == torch.float16:
        return contract(left_sTF, right_sTK).sum(0)
    dtype = wide(left_sTF.dtype)
    if _by_samples(left_sTF) or _by_samples(right_sTK):
        return cast(torch.bmm(left_sTF.mT, right_sTK), dtype).sum(0)
    if lie_together(left_sTF) and lie_together(right_sTK):
        return cast(_outer(columns(left_sTF), columns(right_sTK)), dtype)
    total_FK: Tensor | None = None
    apart = right_sTK if lie_together(left_sTF) else left_sTF
    for part in _sample_parts(apart):
        product_FK = cast(_outer(columns(left_sTF[part]), columns(right_sTK[part])), dtype)
        total_FK = product_FK if total_FK is None else total_FK.add_(product_FK)
    assert total_FK is not None
    return total_FK


def sum_of_nodes(x_sTF: Tensor, dtype: torch.dtype) -> Tensor:
    """Sum over rows and nodes, (F,)."""
    if nodes_innermost(x_sTF):
        return x_sTF.sum(1, dtype=dtype).sum(0)
    return x_sTF.sum((0, 1), dtype=dtype)
