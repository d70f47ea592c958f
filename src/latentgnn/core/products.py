"""Products over nodes, by the routine that this machine runs fastest.

On a CPU, PyTorch's matrix product is MKL. On AMD's processors with AVX-512 oneDNN is faster, as a linear map of rows
that lie contiguously, or as a 1x1 convolution where a sample has few nodes. Which routine runs depends on the
processor, the type and the sizes alone, so that a resumed run takes the same and ends with the same bits.

Axes: s rows of the input, T nodes, E graphs (samples by groups); C, F, K, O channels.
"""

from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor

from latentgnn.core.nodes import empty_like_layout, nodes_innermost
from latentgnn.functional import cast, wide

# oneDNN's linear map takes over from so many nodes of a sample, and so many channels on; as measured.
_MANY_NODES = 400
_MANY_CHANNELS = 64
# A single sample's product takes it from so many multiply-adds on: below, a call costs more than it saves.
_MANY_OPERATIONS = 1 << 23
# From so many channels on, samples with fewer nodes go through a convolution.
_CONVOLUTION_CHANNELS = 512
# So many numbers of an output are made at once where a sum follows, so that they are still in a cache then.
_AT_ONCE = 1 << 19


@cache
def _has_onednn() -> bool:
    vector = torch.backends.cpu.get_cpu_capability() == "AVX512"
    return vector and torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def _onednn(x: Tensor) -> bool:
    return x.dtype == torch.float32 and x.device.type == "cpu" and _has_onednn()


def _linear(left_MK: Tensor, right_NK: Tensor, shift_N: Tensor | None = None) -> Tensor:
    """left right^T + shift; both must be dense: oneDNN is thousands of times slower on rows with gaps."""
    return torch.ops.mkldnn._linear_pointwise(left_MK, right_NK, shift_N, "none", [], "")


def project(x_sTC: Tensor, matrix_OC: Tensor, shift_O: Tensor | None = None) -> Tensor:
    """x W^T + shift, (s, T, O), with nodes innermost where they are in ``x``."""
    samples, nodes, channels = x_sTC.shape
    if not nodes_innermost(x_sTC):
        rows = x_sTC.reshape(-1, channels)
        if _onednn(x_sTC) and channels >= _MANY_CHANNELS:
            y = _linear(rows, matrix_OC, shift_O)
        else:
            y = torch.mm(rows, matrix_OC.mT) if shift_O is None else torch.addmm(shift_O, rows, matrix_OC.mT)
        return y.view(samples, nodes, matrix_OC.shape[0])
    x_sCT = x_sTC.mT
    if samples == 1 and not (nodes * channels * matrix_OC.shape[0] >= _MANY_OPERATIONS and _onednn(x_sTC)):
        if shift_O is None:
            return torch.mm(matrix_OC, x_sCT[0]).unsqueeze(0).mT
        return torch.addmm(shift_O.unsqueeze(1), matrix_OC, x_sCT[0]).unsqueeze(0).mT
    y_sTO = _project_innermost(x_sTC, matrix_OC)
    return y_sTO if shift_O is None else y_sTO.add_(shift_O)


def _project_innermost(x_sTC: Tensor, matrix_OC: Tensor) -> Tensor:
    """`project` where nodes lie innermost."""
    samples, nodes, channels = x_sTC.shape
    x_sCT = x_sTC.mT
    if samples == 1:
        return _linear(matrix_OC, x_sCT[0].contiguous().mT).unsqueeze(0).mT
    if nodes >= _MANY_NODES and channels >= _MANY_CHANNELS and samples <= 32 and _onednn(x_sTC):
        y_sTO = empty_like_layout(x_sTC, matrix_OC.shape[0])
        for x_CT, y_TO in zip(x_sCT, y_sTO, strict=True):
            y_TO.copy_(_linear(matrix_OC, x_CT.contiguous().mT).mT)
        return y_sTO
    if samples > 1 and _convolves(x_sTC, matrix_OC.shape[0]):
        return torch.conv1d(x_sCT, matrix_OC.unsqueeze(-1)).mT
    return torch.bmm(matrix_OC.expand(samples, -1, -1), x_sCT).mT


def project_back(grad_sTO: Tensor, matrix_OC: Tensor) -> Tensor:
    """g W, the gradient of x where `project` gave x W^T: (s, T, C), with nodes innermost where they are in ``grad``."""
    samples, nodes, outputs = grad_sTO.shape
    channels = matrix_OC.shape[1]
    few = samples * nodes < min(outputs, channels) // 2
    if not nodes_innermost(grad_sTO):
        rows = grad_sTO.reshape(-1, outputs)
        if _onednn(grad_sTO) and outputs >= _MANY_CHANNELS and not few:
            return _linear(rows, matrix_OC.mT.contiguous()).unflatten(0, (samples, nodes))
        return (rows @ matrix_OC).unflatten(0, (samples, nodes))
    if samples == 1 and (few or nodes < _MANY_NODES or not _onednn(grad_sTO)):
        return (matrix_OC.mT @ grad_sTO.mT[0]).unsqueeze(0).mT
    if _convolves(grad_sTO, channels) and samples > 1:
        # A convolution's own backward takes the matrix as it is.
        return _convolution_backward(grad_sTO, matrix_OC)
    return project(grad_sTO, matrix_OC.mT.contiguous())


def _convolution_backward(grad_sTO: Tensor, matrix_OC: Tensor) -> Tensor:
    samples, nodes, _ = grad_sTO.shape
    like = grad_sTO.new_empty(1).expand(samples, matrix_OC.shape[1], nodes, 1)
    grad_x, _, _ = torch.ops.aten.convolution_backward(
        *(grad_sTO.mT.unsqueeze(-1), like, matrix_OC[:, :, None, None], None),
        *([1, 1], [0, 0], [1, 1], False, [0, 0], 1, [True, False, False]),
    )
    return grad_x.squeeze(-1).mT


def _convolves(x_sTC: Tensor, channels: int) -> bool:
    """Whether a sample has so few nodes, and so many channels, that a convolution is faster."""
    many = max(channels, x_sTC.shape[-1]) >= _CONVOLUTION_CHANNELS
    return _onednn(x_sTC) and many and 1 < x_sTC.shape[1] < _MANY_NODES


def project_all(x_sTC: Tensor, matrices_RC: Sequence[Tensor]) -> Tensor:
    """x W^T for matrices below one another, (s, T, rows of all)."""
    if len(matrices_RC) == 1:
        return project(x_sTC, matrices_RC[0])
    samples, nodes, channels = x_sTC.shape
    if samples * nodes >= channels // 2:
        return project(x_sTC, torch.cat(list(matrices_RC)))
    # Few nodes: the matrices are the larger part, and to join them would take longer than what it saves.
    parts = [project(x_sTC, matrix_RC) for matrix_RC in matrices_RC]
    return torch.cat([part.mT for part in parts], 1).mT if nodes_innermost(x_sTC) else torch.cat(parts, -1)


def add_project_back(base_sTC: Tensor | None, grad_sTO: Tensor, matrices_RC: Sequence[Tensor], out_sTC: Tensor) -> None:
    """out = base + g W, for the matrices of `project_all`."""
    samples, nodes, channels = out_sTC.shape
    if samples * nodes >= channels // 2:
        matrix_OC = matrices_RC[0] if len(matrices_RC) == 1 else torch.cat(list(matrices_RC))
        if not _convolves(grad_sTO, channels) or base_sTC is None or base_sTC.dtype != grad_sTO.dtype:
            matrix_CO = matrix_OC.mT.contiguous() if _onednn(grad_sTO) else matrix_OC.mT
            add_projection(base_sTC, grad_sTO, matrix_CO.unsqueeze(0), None, out_sTC)
        else:
            torch.add(base_sTC, project_back(grad_sTO, matrix_OC), out=out_sTC)
        return
    parts = grad_sTO.split([matrix_RC.shape[0] for matrix_RC in matrices_RC], -1)
    for part, matrix_RC in zip(parts, matrices_RC, strict=True):
        product_sTC = project_back(part, matrix_RC)
        if base_sTC is None:
            out_sTC.copy_(product_sTC)
        else:
            torch.add(base_sTC, product_sTC, out=out_sTC)
        base_sTC = out_sTC


def project_each(x_ETK: Tensor, matrix_EOK: Tensor) -> Tensor:
    """x W^T with a matrix for each graph, (E, T, O), with nodes innermost where they are in ``x``."""
    if x_ETK.shape[0] == 1:
        return project(x_ETK, matrix_EOK[0])
    if nodes_innermost(x_ETK):
        return torch.bmm(matrix_EOK, x_ETK.mT).mT
    return torch.bmm(x_ETK, matrix_EOK.mT)


def add_scaled_projection(
    base_sTC: Tensor | None,
    x_sTK: Tensor,
    matrix_CK: Tensor,
    scale_C: Tensor | None,
    shift_C: Tensor | None,
    out_sTC: Tensor,
) -> None:
    """out = base + (x W^T) * scale + shift."""
    samples, nodes, _ = out_sTC.shape
    if scale_C is None:
        return add_projection(base_sTC, x_sTK, cast(matrix_CK, x_sTK.dtype).unsqueeze(0), shift_C, out_sTC)
    if samples * nodes >= x_sTK.shape[-1] or out_sTC.dtype != x_sTK.dtype or scale_C.dtype != x_sTK.dtype:
        matrix_CK = cast(matrix_CK * scale_C.unsqueeze(1), x_sTK.dtype)
        return add_projection(base_sTC, x_sTK, matrix_CK.unsqueeze(0), shift_C, out_sTC)
    # Few nodes: the matrix is larger than the output.
    y_sTC = project(x_sTK, matrix_CK)
    if base_sTC is None:
        torch.mul(y_sTC, scale_C, out=out_sTC)
    else:
        torch.addcmul(base_sTC, y_sTC, scale_C, out=out_sTC)
    if shift_C is not None:
        out_sTC.add_(shift_C)
    return None


def add_projection(
    base_sTC: Tensor | None, x_sTK: Tensor, matrix_SCK: Tensor, shift_C: Tensor | None, out_sTC: Tensor
) -> None:
    """out = base + x W^T + shift, with one matrix (1, C, K) for all rows or one for each."""
    samples, nodes, channels = out_sTC.shape
    shared = matrix_SCK.shape[0] == 1
    if shift_C is not None:
        shift_C = cast(shift_C, x_sTK.dtype)
    if base_sTC is not None and (base_sTC.dtype != x_sTK.dtype or out_sTC.dtype != x_sTK.dtype):
        matrix_sCK = matrix_SCK.expand(samples, -1, -1)
        y_sTC = project_each(x_sTK, matrix_sCK)
        torch.add(base_sTC, y_sTC if shift_C is None else y_sTC + shift_C, out=out_sTC)
        return
    if shared and channels >= _MANY_CHANNELS and samples * nodes >= _MANY_NODES and _onednn(x_sTK):
        # In parts, whose product is still in a cache when the base is added.
        length = max(_AT_ONCE // channels, _MANY_NODES)
        rows = max(length // nodes, 1)
        for first in range(0, samples, rows):
            for start in range(0, nodes, length):
                part = slice(first, first + rows), slice(start, start + length)
                y_sTC = project(x_sTK[part], matrix_SCK[0])
                if shift_C is not None:
                    y_sTC = y_sTC.add_(shift_C)
                if base_sTC is None:
                    out_sTC[part].copy_(y_sTC)
                else:
                    torch.add(base_sTC[part], y_sTC, out=out_sTC[part])
        return
    left, right, out = x_sTK, matrix_SCK.mT.expand(samples, -1, -1), out_sTC
    base = base_sTC
    if nodes_innermost(out_sTC):
        left, right, out = matrix_SCK.expand(samples, -1, -1), x_sTK.mT, out_sTC.mT
        base = None if base is None else base.mT
        shift_C = None if shift_C is None else shift_C.unsqueeze(-1)
    if base is None:
        torch.bmm(left, right, out=out)
    elif samples == 1:
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
    samples, nodes, _ = left_sTF.shape
    if left_sTF.dtype == torch.float16:
        return contract(left_sTF, right_sTK).sum(0)
    innermost = nodes_innermost(left_sTF) and nodes_innermost(right_sTK)
    if not innermost:
        return (left_sTF.reshape(-1, left_sTF.shape[-1]).mT @ right_sTK.reshape(-1, right_sTK.shape[-1])).to(
            wide(left_sTF.dtype)
        )
    onednn = _onednn(left_sTF)
    large = max(left_sTF.shape[-1], right_sTK.shape[-1]) >= 4 * _MANY_CHANNELS
    if onednn and ((nodes >= _MANY_NODES and (samples == 1 or large)) or (samples == 1 and large)):
        total_FK: Tensor | None = None
        for left_TF, right_TK in zip(left_sTF, right_sTK, strict=True):
            product_FK = _linear(left_TF.mT.contiguous(), right_TK.mT.contiguous())
            total_FK = product_FK if total_FK is None else total_FK.add_(product_FK)
        assert total_FK is not None
        return total_FK
    if samples == 1:
        return cast(torch.mm(left_sTF[0].mT, right_sTK[0]), wide(left_sTF.dtype))
    if large:
        # Samples of few nodes side by side: one product over all of them.
        left_FM = left_sTF.permute(2, 0, 1).reshape(left_sTF.shape[-1], -1)
        right_KM = right_sTK.permute(2, 0, 1).reshape(right_sTK.shape[-1], -1)
        return _linear(left_FM, right_KM) if onednn else (left_FM @ right_KM.mT).to(wide(left_sTF.dtype))
    return torch.bmm(left_sTF.mT, right_sTK).to(wide(left_sTF.dtype)).sum(0)


def sum_of_nodes(grad_sTF: Tensor, dtype: torch.dtype) -> Tensor:
    """Sum over rows and nodes, (F,)."""
    if nodes_innermost(grad_sTF):
        return grad_sTF.sum(1, dtype=dtype).sum(0)
    return grad_sTF.sum((0, 1), dtype=dtype)
