"""Triton kernels for the layer on a GPU, forward and backward, and why a layer cannot use them.

Between the reduction and the expansion, PyTorch's operations make some twenty passes over tensors of R or D numbers a
node (norms, lengths, rectifiers, sums), each a call of its own. Here `gather` reads the reduced channels once and
writes only sums, `mix` is one call, `scatter` reads the reduced channels once and writes what the output is expanded
from, and `expand` adds the product to the input where it is written. Importing this package does not import Triton;
its files do.
"""

import os
from functools import cache
from importlib.util import find_spec

import torch

from latentgnn.kernels.sizes import WIDEST, padded, shared_bytes
from latentgnn.norms import NormKind

# The device types that the kernels support.
DEVICES = ("cuda",)
# The first compute capability whose tensor cores multiply TF32 and bfloat16.
_CAPABILITY = (8, 0)


def why_not_layer(
    device: torch.device,
    compute: torch.dtype,
    *,
    latents: tuple[int, ...],
    width: int,
    groups: int,
    symmetric: bool,
    norm: NormKind | None,
    shared: bool,
) -> str | None:
    """Why a layer cannot use the kernels; ``None`` if it can. Compilers can trace this.

    Args:
        device: of the input.
        compute: dtype of products over nodes.
        latents: of each kernel of the layer.
        width: reduced channels of a group.
        groups: of channels.
        symmetric: gather and scatter share their assignments.
        norm: kind of the norms.
        shared: whether several processes share the nodes.

    Example:
        >>> kind = {"groups": 1, "symmetric": False, "norm": "affine", "shared": False}
        >>> why_not_layer(torch.device("cpu"), torch.float32, latents=(100,), width=64, **kind)
        'Triton compiles for CUDA, the layer is on cpu'
    """
    if device.type not in DEVICES:
        return f"Triton compiles for CUDA, the layer is on {device.type}"
    if norm != "affine":
        return "norms need their statistics between the steps that a kernel joins"
    if symmetric:
        return "gather and scatter of a symmetric layer share their assignments, which the kernels do not write"
    if groups > 1 or len(latents) > 1:
        return "the kernels are for one group of channels and one kernel of latents"
    if compute == torch.float64:
        return "the kernels' sums are of float32"
    if shared:
        return "the nodes are shared by several processes"
    if padded(width) > WIDEST:
        return f"a program of the kernels holds at most {WIDEST} reduced channels, the layer has {width}"
    return None


def why_not_device(device: torch.device, compute: torch.dtype, width: int) -> str | None:
    """Why a device cannot or must not run the kernels for this many reduced channels; ``None`` if it can."""
    if _is_switched_off():
        return "LATENTGNN_TRITON=0 is set in the environment"
    if not _has_triton():
        return "Triton is not installed"
    return _why_not_properties(device, shared_bytes(width, compute.itemsize)) if device.type == "cuda" else None


@cache
def _is_switched_off() -> bool:
    # Read once: a backward pass must take the path of its forward pass.
    return os.environ.get("LATENTGNN_TRITON", "1") == "0"


@cache
def _has_triton() -> bool:
    return find_spec("triton") is not None


@cache
def _why_not_properties(device: torch.device, shared: int) -> str | None:
    if torch.version.hip is not None:
        return "the kernels were written for NVIDIA's GPUs"
    properties = torch.cuda.get_device_properties(device)
    if (properties.major, properties.minor) < _CAPABILITY:
        return "the GPU's matrix units do not multiply float32"
    if properties.shared_memory_per_block_optin < shared:  # type: ignore[attr-defined]
        return f"the kernels take {shared >> 10} KiB of shared memory, the GPU has less"
    return None
