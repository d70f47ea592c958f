"""Where the layer runs: on which kind of device, and which of PyTorch's modes are active."""

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils._python_dispatch import is_in_torch_dispatch_mode


def is_on_gpu(x: Tensor) -> bool:
    """Whether a tensor is on a GPU, where a call often costs more than its arithmetic."""
    return x.is_cuda


def is_exporting() -> bool:
    """Whether `torch.export` traces.

    In PyTorch 2.11, `torch.compiler.is_exporting` is true in all that Dynamo traces; the flag behind it is not.
    """
    return torch.compiler._is_exporting_flag


def is_in_function_transform() -> bool:
    """Whether a transform of `torch.func` is active; a compiler looks after that itself."""
    return not torch.compiler.is_compiling() and torch._C._functorch.peek_interpreter_stack() is not None


def is_transformed() -> bool:
    """Whether derivatives are wanted that only PyTorch's own operations have."""
    return is_in_function_transform() or (not torch.compiler.is_compiling() and forward_ad._current_level >= 0)


def is_traced() -> bool:
    """Whether what runs becomes a program or is transformed, for which the operations are to stay as they are."""
    return torch.compiler.is_compiling() or is_exporting() or is_transformed()


def is_seen() -> bool:
    """Whether something sees each operation: what traces, and modes that count or record operations."""
    return is_traced() or torch._C._is_tracing() or is_in_torch_dispatch_mode()
