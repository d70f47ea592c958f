"""Triton kernels for the forward pass between its two large products, and why a layer does not take them.

`latentgnn.core` leaves the reduction and the expansion to PyTorch's own routines. Between them it makes about ten
passes over tensors of R or D numbers a node (norms, lengths, rectifiers, sums). Here `gather` reads the reduced
channels once for each block of latents and writes only sums, and `scatter` reads them once for each kernel and writes
what the output is expanded from. Importing this package does not import Triton; its files do.
"""

import os

import torch

from latentgnn.core.parameters import Matrices
from latentgnn.core.plan import Plan
from latentgnn.errors import UserError
from latentgnn.kernels.sizes import fits

# The types of devices that Triton compiles for.
DEVICES = ("cuda",)


def wants_triton(device: torch.device) -> bool:
    """Whether the kernels are asked for: ``LATENTGNN_TRITON=1`` in the environment, and a CUDA device.

    Example:
        >>> wants_triton(torch.device("cpu"))
        False
    """
    return device.type in DEVICES and os.environ.get("LATENTGNN_TRITON", "0") == "1"


def why_not_kernels(matrices: Matrices, plan: Plan, *, keep: bool) -> str | None:
    """Why the forward pass of a layer does not take the kernels, ``None`` if it does.

    Args:
        matrices: of the layer.
        plan: of the layer.
        keep: a backward pass will follow.
    """
    device = matrices.expand.device
    if device.type not in DEVICES:
        return f"Triton compiles for CUDA, the layer is on {device.type}"
    if not wants_triton(device):
        return "LATENTGNN_TRITON=1 is not set in the environment"
    if plan.takes_statistics:
        return "norms need their statistics between the steps that a kernel joins"
    if keep and plan.holds:
        return "the kernels write nothing of what is to be held for the backward pass"
    if plan.symmetric:
        return "gather and scatter of a symmetric layer share their assignments, which the kernels do not write"
    if plan.compute == torch.float64:
        return "the kernels' sums are of float32"
    width, latents = matrices.assigns[0].shape[-1], max(plan.latents)
    if not fits(width, latents, plan.compute):
        return (
            f"a matrix of {width} reduced channels of a group by {latents} latents of a kernel in {plan.compute} does "
            f"not fit in shared memory"
        )
    return None


def require_triton() -> None:
    """Import Triton.

    Raises:
        UserError: Triton is not installed.
    """
    try:
        import triton  # noqa: F401
    except ModuleNotFoundError as error:
        if error.name != "triton":
            raise
        raise UserError(
            "LATENTGNN_TRITON=1 needs Triton, which is not installed: pip install triton, or unset LATENTGNN_TRITON"
        ) from None
