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
from latentgnn.norms import affines, normalize
from latentgnn.projections import Arrangement
from latentgnn.samples import Nodes


class Step(NamedTuple):
    """A matrix and what follows it: a norm, or where that is an affine map folded into the matrix, its shift alone."""

    weight: Tensor
    norm: nn.Module | None
    shift: Tensor | None = None


class Steps(NamedTuple):
    """A layer's projections in the order of the equations.

    Args:
        reduces: W of gather and, unless symmetric, of scatter.
        assigns: Psi of every kernel, likewise for each way.
        convs: G of every kernel, if there are any.
        expand: U.
        gamma: where it is not in U.
    """

    reduces: Sequence[Step]
    assigns: Sequence[Sequence[Step]]
    convs: Sequence[Step]
    expand: Step
    gamma: Tensor | None


# Numbers of a matrix up to which folding a norm into it costs no more than the call that it saves.
_SMALL_MATRIX = 1 << 16


def steps_of(layer: Arrangement, compute: torch.dtype, nodes: int) -> Steps:
    """The projections of a layer, with affine norms and gamma folded in where that saves calls.

    Args:
        layer: the parameters.
        compute: type of the products.
        nodes: of all samples; with few of them, a large matrix's norm follows its product.
    """
    kernels, ways, gamma = len(layer.config.latents), len(layer.reduces), layer.gamma
    weights = [cast(weight, compute) for weight in cast_type(list[Tensor], layer.tensors[::5])]
    if layer.norm_kind == "affine" and compute == wide(compute) and not is_traced():
        scales, shifts = affines([layer.tensors[place::5] for place in range(1, 5)], layer.eps, compute)
        large = [is_large(weight, nodes) for weight in weights]
        if gamma is not None and not large[-1]:
            scale_C, shift_C = scales[-1], shifts[-1]
            scales[-1] = gamma.expand(len(weights[-1])) if scale_C is None else scale_C * gamma
            shifts[-1], gamma = None if shift_C is None else shift_C * gamma, None
        steps = [
            Step(weight, norm)
            if follows
            else Step(weight if scale is None else weight * scale.unsqueeze(1), None, shift)
            for weight, norm, follows, scale, shift in zip(weights, layer.norms, large, scales, shifts, strict=True)
        ]
    else:
        steps = [Step(weight, norm) for weight, norm in zip(weights, layer.norms, strict=True)]
    assigns = [steps[ways + way * kernels : ways + (way + 1) * kernels] for way in range(ways)]
    return Steps(steps[:ways], assigns, steps[ways + ways * kernels : -1], steps[-1], gamma)


def is_traced() -> bool:
    """Whether what runs becomes a program or is transformed, for which the operations are to stay as they are."""
    return torch.compiler.is_compiling() or is_exporting() or is_transformed()


def is_large(weight_OC: Tensor, nodes: int) -> bool:
    """Whether a matrix has more numbers than its product with so many nodes, and too many to be copied."""
    return weight_OC.shape[1] > nodes and weight_OC.numel() > _SMALL_MATRIX


def projected(step: Step, x_BNC: Tensor, nodes: Nodes, compute: torch.dtype, groups: int = 1) -> Tensor:
    """norm(W x), in the type of the products."""
    y_BNO = apply(x_BNC, step.weight, groups, step.shift)
    return y_BNO if step.norm is None else cast(normalized(step.norm, y_BNO, nodes), compute)


def apply(x_BNC: Tensor, weight_OC: Tensor, groups: int = 1, shift_O: Tensor | None = None) -> Tensor:
    """x W^T + shift; with groups, each group of rows of W takes a group of channels."""
    if x_BNC.stride(-1) != 1 and not is_exporting():
        return torch.conv1d(x_BNC.mT, weight_OC.unsqueeze(-1), shift_O, groups=groups).mT
    if groups == 1:
        return F.linear(x_BNC, weight_OC, shift_O)
    pairs = zip(x_BNC.chunk(groups, -1), weight_OC.chunk(groups), strict=True)
    y_BNO = torch.cat([F.linear(x_BNr, weight_Or) for x_BNr, weight_Or in pairs], -1)
    return y_BNO if shift_O is None else y_BNO + shift_O


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
