"""Where the layer runs: on which kind of device, and which of PyTorch's modes are active."""

import torch
from torch import Tensor
from torch.autograd import forward_ad


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
