"""A layer's matrices and norms, as the plain path applies them.

Axes: B batch, N nodes, C and O channels before and after a matrix, F features, R reduced channels.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from latentgnn import modes
from latentgnn.core.layouts import is_plain
from latentgnn.core.routines import outer, takes_onednn
from latentgnn.modes import is_eager_on_gpu, is_exporting, is_known, is_seen, is_traced
from latentgnn.norms import is_per_node
from latentgnn.numerics import inverse_length, l2, to_dtype, wide
from latentgnn.plain.normalizing import normalize
from latentgnn.plain.samples import Nodes
from latentgnn.projections import Arrangement


class Step(NamedTuple):
    """A matrix and the norm that follows it.

    Args:
        weight: the matrix.
        norm: the norm after it.
        counted: the norm has counted this batch already.
    """

    weight: Tensor
    norm: nn.Module
    counted: bool = False


class Steps(NamedTuple):
    """A layer's projections in the order of the equations.

    Args:
        reduces: W of gather and, unless symmetric, of scatter.
        assigns: Psi of every kernel, for gather and, unless symmetric, for scatter.
        convs: G of every kernel; empty without graph convolution.
        expand: U.
    """

    reduces: Sequence[Step]
    assigns: Sequence[Sequence[Step]]
    convs: Sequence[Step]
    expand: Step


# Copying a matrix of up to this many elements costs no more than the call that it saves.
SMALL_MATRIX = 1 << 16
# On a CPU, a batched product is faster than a convolution below this many multiply-adds; and if nothing is recorded,
# than a product by oneDNN of a single sample (docs/results.md).
_SMALL_PRODUCT = 1 << 23
# From this many elements on, it pays to check whether a tensor's memory can be reused.
_MUCH_MEMORY = 1 << 12
# Channels last: from this many rows and multiply-adds on, a convolution is faster than a matrix product.
_MANY_ROWS, _LARGE_PRODUCT = 128, 1 << 22


def steps_of(layer: Arrangement, compute: torch.dtype, *, counted: bool = False) -> Steps:
    """The projections of a layer, with matrices in the dtype of the products."""
    kernels, ways = len(layer.config.latents), len(layer.reduces)
    weights = [to_dtype(weight, compute) for weight in layer.matrices]
    steps = [Step(weight, norm, counted) for weight, norm in zip(weights, layer.norms, strict=True)]
    assigns = [steps[ways + way * kernels : ways + (way + 1) * kernels] for way in range(ways)]
    return Steps(steps[:ways], assigns, steps[ways + ways * kernels : -1], steps[-1])


def is_large(weight_OC: Tensor, nodes: int) -> bool:
    """Whether a matrix is larger than its product for this many nodes, and too large to copy."""
    return weight_OC.shape[1] > nodes and weight_OC.numel() > SMALL_MATRIX


def projected(step: Step, x_BNC: Tensor, nodes: Nodes, compute: torch.dtype, groups: int = 1) -> Tensor:
    """norm(W x), in the dtype of the products."""
    return to_dtype(normalized(step, apply(x_BNC, step.weight, groups), nodes), compute)


def apply(x_BNC: Tensor, weight_OC: Tensor, groups: int = 1) -> Tensor:
    """x W^T; with groups, each group of rows of W is applied to one group of channels."""
    whole = groups == 1 and x_BNC.dtype == wide(x_BNC.dtype) and not is_traced()
    if whole and (x_BNC.is_cpu or is_eager_on_gpu(x_BNC)):
        return apply_whole(x_BNC, weight_OC)
    if x_BNC.stride(-1) != 1 and not is_exporting():
        return torch.conv1d(x_BNC.mT, weight_OC.unsqueeze(-1), groups=groups).mT
    if groups == 1:
        return F.linear(x_BNC, weight_OC)
    pairs = zip(x_BNC.chunk(groups, -1), weight_OC.chunk(groups), strict=True)
    return torch.cat([F.linear(x_BNr, weight_Or) for x_BNr, weight_Or in pairs], -1)


def apply_whole(x_BNC: Tensor, weight_OC: Tensor, shift_O: Tensor | None = None) -> Tensor:
    """x W^T + shift, of a float32 or float64 tensor, by the routine that suits its size and its device."""
    if x_BNC.stride(-1) == 1:
        return _applied_to_rows(x_BNC, weight_OC, shift_O)
    if torch.compiler.is_compiling():
        # PyTorch 2.11's compiler rejects a slice of a vector as a convolution's bias; it fuses the sum anyway.
        y_BON = torch.conv1d(x_BNC.mT, weight_OC.unsqueeze(-1))
        return (y_BON if shift_O is None else y_BON + shift_O.unsqueeze(1)).mT
    if not modes.is_on_gpu(x_BNC):
        if _is_small_product(x_BNC, weight_OC):
            weight_BOC = weight_OC.expand(len(x_BNC), -1, -1)
            if shift_O is None:
                return torch.bmm(weight_BOC, x_BNC.mT).mT
            return torch.baddbmm(shift_O.unsqueeze(1), weight_BOC, x_BNC.mT).mT
        if len(x_BNC) == 1 and _by_onednn(x_BNC, weight_OC) and not _records(x_BNC, weight_OC, shift_O):
            y_ON = outer(weight_OC, x_BNC[0])
            return (y_ON if shift_O is None else y_ON.add_(shift_O.unsqueeze(1))).mT.unsqueeze(0)
    return torch.conv1d(x_BNC.mT, weight_OC.unsqueeze(-1), shift_O).mT


def _applied_to_rows(x_BNC: Tensor, weight_OC: Tensor, shift_O: Tensor | None) -> Tensor:
    """`apply_whole` where channels lie innermost."""
    if is_traced():
        return F.linear(x_BNC, weight_OC, shift_O)
    if modes.is_on_gpu(x_BNC):
        convolves = not matrices_round_alike(x_BNC)
    else:
        onednn = x_BNC.is_contiguous() and _by_onednn(x_BNC, weight_OC)
        if onednn and not _records(x_BNC, weight_OC, shift_O):
            return outer(x_BNC.flatten(0, 1), weight_OC, shift_O).view(*x_BNC.shape[:2], -1)
        convolves = onednn and _is_worth_a_layout(x_BNC, weight_OC)
    if not convolves:
        return F.linear(x_BNC, weight_OC, shift_O)
    # Nodes as the width of channels-last images.
    y_BO1N = torch.conv2d(x_BNC.mT.unsqueeze(2), weight_OC[:, :, None, None], shift_O)
    return y_BO1N.squeeze(2).mT


def _by_onednn(x_BNC: Tensor, weight_OC: Tensor) -> bool:
    """Whether oneDNN multiplies a tensor on a CPU: only where nothing observes the operations."""
    return is_plain(x_BNC) and takes_onednn(weight_OC, x_BNC.shape[0] * x_BNC.shape[1]) and not is_seen()


def _is_small_product(x: Tensor, weight_OC: Tensor) -> bool:
    """Whether a product with a matrix is faster as a batched product than by a convolution, on a CPU."""
    return weight_OC.shape[0] * x.numel() < _SMALL_PRODUCT


def _is_worth_a_layout(x_BNC: Tensor, weight_OC: Tensor) -> bool:
    """Whether a convolution multiplies rows faster, although it must reorder its matrix."""
    nodes = x_BNC.shape[0] * x_BNC.shape[1]
    return nodes >= _MANY_ROWS and weight_OC.numel() * nodes >= _LARGE_PRODUCT


def _records(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors)


def rectified_(new: Tensor) -> Tensor:
    """relu of a tensor that nothing else reads, in place where allowed."""
    return torch.relu_(new) if _may_be_changed(new) else torch.relu(new)


def to_unit_length_(new: Tensor) -> Tensor:
    """`l2` along the last dimension of a tensor that nothing else reads, in place where allowed."""
    if new.dim() == 4 and not (modes.is_on_gpu(new) or is_traced()) and new.stride(1) == 1:
        # (B, N, G, r) with nodes innermost: PyTorch sums several times as fast with the strides in order.
        return _to_unit_length_(new.permute(0, 2, 3, 1), 2).permute(0, 3, 1, 2)
    return _to_unit_length_(new, -1)


def _to_unit_length_(new: Tensor, dim: int) -> Tensor:
    if _may_be_changed(new) and new.dtype == wide(new.dtype):
        return new.mul_(inverse_length(new, dim))
    return l2(new, dim)


def add_(new: Tensor, x: Tensor) -> Tensor:
    """x + new, where nothing else reads ``new``; in place where allowed."""
    return new.add_(x) if _may_be_changed(new) and new.dtype == x.dtype else x + new


def _may_be_changed(new: Tensor) -> bool:
    """Whether a tensor may be changed in place; only on a CPU, where new memory often costs more than arithmetic."""
    if torch.is_grad_enabled() or torch.compiler.is_compiling() or new.numel() < _MUCH_MEMORY:
        return False
    return new.is_cpu and is_plain(new) and not is_seen()


def matrices_round_alike(x: Tensor) -> bool:
    """Whether convolutions and matrix products of a tensor have the same precision on a GPU.

    By default, PyTorch lets float32 convolutions round to TF32, but not matrix products. The published layer's
    projections are convolutions, so they may run as convolutions here, which is faster, and round like them.
    """
    if x.dtype != torch.float32:
        return True
    conv: str = torch.backends.cudnn.conv.fp32_precision  # type: ignore[attr-defined]
    matmul: str = torch.backends.cuda.matmul.fp32_precision
    return (conv == "tf32") == (matmul == "tf32")


def normalized(step: Step, x_BNF: Tensor, nodes: Nodes, factor: Tensor | None = None) -> Tensor:
    """A step's norm times a factor; over the nodes of each sample, or for batch norm over all nodes."""
    norm = step.norm
    if not nodes.are_packed or is_per_node(norm) or isinstance(norm, _BatchNorm):
        return normalize(norm, x_BNF, nodes.mask_BN, nodes.group, counted=step.counted, factor=factor)
    parts = nodes.split(x_BNF)
    if nodes.member_SN is not None:
        return nodes.joined([normalize(norm, part, nodes.member_SN, factor=factor) for part in parts])
    parts = [part for part in parts if not is_known(part.shape[1] == 0)]
    return nodes.joined([normalize(norm, part, None, factor=factor) for part in parts])
