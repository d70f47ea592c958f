"""Where the layer runs: on which kind of device, and which of PyTorch's modes are active."""

from typing import cast

import torch
from torch import Tensor
from torch._subclasses import FakeTensor
from torch.autograd import forward_ad
from torch.utils._python_dispatch import is_in_torch_dispatch_mode, is_traceable_wrapper_subclass


def is_on_gpu(x: Tensor) -> bool:
    """Whether a tensor is on a GPU, where a call often costs more than its arithmetic."""
    return x.is_cuda


def has_values(tensor: Tensor) -> bool:
    """Whether a tensor has numbers: those on the meta device and in FakeTensorMode have only a shape."""
    return not (tensor.is_meta or isinstance(tensor, FakeTensor))


def is_exporting() -> bool:
    """Whether `torch.export` traces.

    In PyTorch 2.11, `torch.compiler.is_exporting` is true in all that Dynamo traces; the flag behind it is not.
    """
    return torch.compiler._is_exporting_flag


def is_in_function_transform() -> bool:
    """Whether a transform of `torch.func` is active; not under a compiler, which handles transforms itself."""
    return not torch.compiler.is_compiling() and torch._C._functorch.peek_interpreter_stack() is not None


def is_transformed() -> bool:
    """Whether a transform or forward-mode differentiation is active, which only PyTorch's own operations support."""
    # A compiler knows the level of forward mode too; operators without a formula for it would give zeros in silence.
    return is_in_function_transform() or forward_ad._current_level >= 0


def is_traced() -> bool:
    """Whether a compiler, an export or a transform is active, so that operations must be PyTorch's, out of place."""
    return torch.compiler.is_compiling() or is_exporting() or is_transformed()


def is_seen() -> bool:
    """Whether something observes each operation: a tracer, or a mode that counts or records operations."""
    return is_traced() or torch._C._is_tracing() or is_in_torch_dispatch_mode()


def is_eager(x: Tensor) -> bool:
    """Whether a tensor's operations run eagerly, with no compiler, export, transform or subclass."""
    if torch.compiler.is_compiling():
        return False
    return not (is_exporting() or is_transformed() or is_traceable_wrapper_subclass(cast(object, x)))


def is_eager_on_gpu(x: Tensor) -> bool:
    """Whether a tensor is on a GPU and its operations run eagerly."""
    return is_on_gpu(x) and is_eager(x)


def is_known(condition: bool) -> bool:
    """Whether a condition on sizes holds; false in a compiler that does not know it, as with sizes of packed scenes."""
    if not torch.compiler.is_compiling():
        return condition
    # Imported here: it takes as long as half of PyTorch.
    from torch.fx.experimental.symbolic_shapes import guard_or_false

    return guard_or_false(condition)
