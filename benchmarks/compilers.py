"""What `torch.compile` imports, imported without a call of CUDA, for a process that others are forked from.

A process forked from one that has called CUDA, even only to count the devices, cannot use it. This module is imported
where nothing else of PyTorch's compiler has been yet, for the compiler reads these settings once.
"""

import os

# One process a side compiles; a pool of them in each would take longer to start than what it is for.
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")
# PyTorch 2.11 looks for a CUDA device to choose this, when it is imported.
os.environ.setdefault("TORCHINDUCTOR_USE_EXPERIMENTAL_BENCHMARKER", "0")

import torch._dynamo
import torch._inductor.compile_fx  # noqa: F401
