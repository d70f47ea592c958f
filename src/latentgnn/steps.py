"""A layer's matrices and norms as the plain path applies them, one after the other.

Axes: B batch, N nodes, C and O channels before and after a matrix, F features, R reduced channels.
"""

from collections.abc import Sequence
from typing import NamedTuple
from typing import cast as cast_type

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from latentgnn.functional import cast, wide
from latentgnn.modes import is_exporting, is_transformed
from latentgnn.norms import normalize
from latentgnn.projections import Arrangement
from latentgnn.samples import Nodes


class Step(NamedTuple):
    """A matrix and the norm that follows it."""

    weight: Tensor
    norm: nn.Module


class Steps(NamedTuple):
    """A layer's projections in the order of the equations.

    Args:
        reduces: W of gather and, unless symmetric, of scatter.
        assigns: Psi of every kernel, likewise for each way.
        convs: G of every kernel, if there are any.
        expand: U.
    """

    reduces: Sequence[Step]
    assigns: Sequence[Sequence[Step]]
    convs: Sequence[Step]
    expand: Step


# Numbers of a matrix up to which copying it costs no more than the call that this saves.
SMALL_MATRIX = 1 << 16
# Multiply-adds below which a batched product takes less time on a CPU than a convolution. As measured: docs/results.md.
_SMALL_PRODUCT = 1 << 23


def steps_of(layer: Arrangement, compute: torch.dtype) -> Steps:
    """The projections of a layer, with matrices in the type of the products."""
    kernels, ways = len(layer.config.latents), len(layer.reduces)
    weights = [cast(weight, compute) for weight in cast_type(list[Tensor], layer.tensors[::5])]
    steps = [Step(weight, norm) for weight, norm in zip(weights, layer.norms, strict=True)]
    assigns = [steps[ways + way * kernels : ways + (way + 1) * kernels] for way in range(ways)]
    return Steps(steps[:ways], assigns, steps[ways + ways * kernels : -1], steps[-1])


def is_traced() -> bool:
    """Whether what runs becomes a program or is transformed, for which the operations are to stay as they are."""
    return torch.compiler.is_compiling() or is_exporting() or is_transformed()


def is_large(weight_OC: Tensor, nodes: int) -> bool:
    """Whether a matrix has more numbers than its product with so many nodes, and too many to be copied."""
    return weight_OC.shape[1] > nodes and weight_OC.numel() > SMALL_MATRIX


def projected(step: Step, x_BNC: Tensor, nodes: Nodes, compute: torch.dtype, groups: int = 1) -> Tensor:
    """norm(W x), in the type of the products."""
    return cast(normalized(step.norm, apply(x_BNC, step.weight, groups), nodes), compute)


def apply(x_BNC: Tensor, weight_OC: Tensor, groups: int = 1) -> Tensor:
    """x W^T; with groups, each group of rows of W takes a group of channels."""
    if x_BNC.stride(-1) != 1 and not is_exporting():
        wide_on_cpu = x_BNC.device.type == "cpu" and x_BNC.dtype == wide(x_BNC.dtype)
        if groups == 1 and wide_on_cpu and not is_traced():
            return apply_whole(x_BNC, weight_OC)
        return torch.conv1d(x_BNC.mT, weight_OC.unsqueeze(-1), groups=groups).mT
    if groups == 1:
        return F.linear(x_BNC, weight_OC)
    pairs = zip(x_BNC.chunk(groups, -1), weight_OC.chunk(groups), strict=True)
    return torch.cat([F.linear(x_BNr, weight_Or) for x_BNr, weight_Or in pairs], -1)


def apply_whole(x_BNC: Tensor, weight_OC: Tensor, shift_O: Tensor | None = None) -> Tensor:
    """x W^T + shift, of a float32 or float64 tensor on a CPU, by the routine that suits its size."""
    if x_BNC.stride(-1) == 1:
        return F.linear(x_BNC, weight_OC, shift_O)
    x_BCN = x_BNC.mT
    if weight_OC.shape[0] * x_BCN.numel() >= _SMALL_PRODUCT:
        return torch.conv1d(x_BCN, weight_OC.unsqueeze(-1), shift_O).mT
    weight_BOC = weight_OC.expand(x_BCN.shape[0], -1, -1)
    if shift_O is None:
        return torch.bmm(weight_BOC, x_BCN).mT
    return torch.baddbmm(shift_O.unsqueeze(1), weight_BOC, x_BCN).mT


def laid_out_as(x_BNC: Tensor, out_BNC: Tensor) -> Tensor:
    """A tensor with nodes or channels innermost in memory, whichever are in another."""
    # A compiler's strides may be symbols, and it lays out by itself.
    if torch.compiler.is_compiling() or (x_BNC.stride(-1) != 1) == (out_BNC.stride(-1) != 1):
        return out_BNC
    return out_BNC.contiguous() if x_BNC.stride(-1) == 1 else out_BNC.mT.contiguous().mT


def normalized(norm: nn.Module, x_BNF: Tensor, nodes: Nodes) -> Tensor:
    """A norm over the nodes of each sample; a batch norm over those of all."""
    if not nodes.are_packed or not _differs_by_sample(norm):
        return normalize(norm, x_BNF, nodes.mask_BN, nodes.group)
    parts = nodes.split(x_BNF)
    if nodes.member_SN is not None:
        return nodes.joined([normalize(norm, part, nodes.member_SN) for part in parts])
    return nodes.joined([normalize(norm, part, None) for part in parts if part.shape[1] > 0])


def _differs_by_sample(norm: nn.Module) -> bool:
    return not isinstance(norm, nn.Identity | nn.LayerNorm | nn.RMSNorm | nn.modules.batchnorm._BatchNorm)
