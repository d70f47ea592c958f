"""Imports what `torch.compile` needs, without calling CUDA, for a process that others are forked from.

A process forked from one that has called CUDA, even only to count devices, cannot use it. Import this module before any
other part of PyTorch's compiler, because the compiler reads these settings only once.
"""

import os

# Each side compiles in a process of its own; a pool inside it would take longer to start than it saves.
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")
# To choose this, PyTorch 2.11 looks for a CUDA device on import.
os.environ.setdefault("TORCHINDUCTOR_USE_EXPERIMENTAL_BENCHMARKER", "0")

import torch._dynamo
import torch._inductor.compile_fx  # noqa: F401
