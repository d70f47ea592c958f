"""Sides are checked before they are timed: those that are wrong are refused."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch
from torch import Tensor, nn

from benchmarks.peers import Side
from latentgnn.errors import UserError


@contextmanager
def full_precision() -> Iterator[None]:
    """Turn off TF32 for float32 products and convolutions within a ``with`` block.

    Call no compiled function inside: it would be compiled for this setting, or keep another one.
    """
    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
    allowed, precision = matmul.allow_tf32, matmul.fp32_precision
    as_they_are = {"enabled": cudnn.enabled, "benchmark": cudnn.benchmark, "deterministic": cudnn.deterministic}
    # If PyTorch's own tests are imported, cuDNN's flags can be set only this way.
    with cudnn.flags(**as_they_are, allow_tf32=False):
        matmul.allow_tf32 = False
        try:
            yield
        finally:
            matmul.allow_tf32 = allowed
            # Forbidden and never set mean the same, but compilers' caches on disk tell them apart.
            matmul.fp32_precision = precision


def check(name: str, side: Side, x: Tensor, expected: Tensor) -> None:
    """Refuse to time a side that is wrong.

    Args:
        name: of the side.
        side: in the mode that it is timed in.
        x: the input.
        expected: the layer's output in `full_precision`. Exact sides must give it to 1e-4 of its largest value in
            float32, computed likewise; any other side must give finite numbers of the input's shape.

    Raises:
        UserError: the output is another.
    """
    with nullcontext() if is_compiled(name) else full_precision():
        output = side.module(x)
    if output.shape != x.shape or not output.isfinite().all():
        raise UserError(f"{name}: the output is not finite and of shape {tuple(x.shape)}; it was not timed")
    if side.exact:
        error = float((output - expected).abs().max() / expected.abs().max())
        if error > tolerance(name, x):
            raise UserError(f"{name}: its output differs by {error:.1e} from the layer's; it was not timed")


def is_compiled(name: str) -> bool:
    """Whether a side of that name goes through `torch.compile`."""
    return name.startswith("compiled ")


def tolerance(name: str, x: Tensor) -> float:
    """How much an exact side's output may differ from the layer's, over the largest value.

    Args:
        name: of the side.
        x: the input.
    """
    if x.dtype not in (torch.float32, torch.float64):
        return 5e-2
    # A compiled side is checked as it is timed, and on a GPU its convolutions may use TF32: with batch norm in
    # training, this makes errors of up to 1e-2.
    return 2e-2 if is_compiled(name) and x.device.type == "cuda" else 1e-4


def check_context(name: str, module: nn.Module, x: Tensor) -> None:
    """Refuse to time another kind of peer if its first output does not depend on the last node.

    Args:
        name: of the side.
        module: in evaluation mode, for in training batch norm lets every node feel every other.
        x: the input, (B, C, *spatial).

    Raises:
        UserError: it is no context over all nodes.
    """
    moved = x.flatten(2).clone()
    moved[..., -1] += 100
    if torch.equal(module(moved.view_as(x)).flatten(2)[..., 0], module(x).flatten(2)[..., 0]):
        raise UserError(f"{name}: the first node does not feel the last; it was not timed")
