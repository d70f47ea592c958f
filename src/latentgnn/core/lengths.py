"""Unit length and ReLU over a block's nodes: in place forward, and backward.

Axes: s rows of the input, T nodes, C channels, G groups, H = ways * G (gather's groups before scatter's), r channels
of a group, D latents of all kernels in a group.
"""

import torch
from torch import Tensor

from latentgnn.core.graphs import of_kernel
from latentgnn.core.layouts import cat_nodes
from latentgnn.core.plan import Plan
from latentgnn.numerics import inverse_length, to_dtype


def unit_backward(grad: Tensor, unit: Tensor, scale: Tensor) -> Tensor:
    """The gradient of rows before they got unit length, from that after; in the wide dtype."""
    grad, unit = to_dtype(grad, scale.dtype), to_dtype(unit, scale.dtype)
    along = (grad * unit).sum(-1, keepdim=True)
    return torch.addcmul(grad, unit, along, value=-1).mul_(scale)


def rectifier_backward_(grad: Tensor, value: Tensor) -> Tensor:
    """Zero the gradient in place where a ReLU gave zero."""
    return torch.ops.aten.threshold_backward.grad_input(grad, value, 0, grad_input=grad)


def to_unit_length_(assign_sGTD: Tensor, plan: Plan) -> list[Tensor]:
    """Scale each kernel's assignments to unit length over its latents, in place; returns the factors."""
    scales = []
    for kernel in plan.kernels:
        part = of_kernel(assign_sGTD, kernel, plan)
        scales.append(inverse_length(part, -1))
        part.mul_(scales[-1])
    return scales


def assign_unit_backward(grad_sGTD: Tensor, assign_sGTD: Tensor, scales: list[Tensor], plan: Plan) -> Tensor:
    """The gradient of assignments before they got unit length, from that after; in the ddtype of the products."""
    parts = [
        to_dtype(unit_backward(grad_sGTD[..., kernel], assign_sGTD[..., kernel], scale), plan.compute)
        for kernel, scale in zip(plan.kernels, scales, strict=True)
    ]
    return cat_nodes(parts, 3)
