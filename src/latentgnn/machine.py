"""What the machine is."""

import platform
from pathlib import Path


def processor_name() -> str:
    """The name of the processor, with the flags that matter to products."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    name = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())
    flags = next((line for line in lines if line.startswith("flags")), "").split()
    return f"{name} ({', '.join(flag for flag in ('avx2', 'avx512f', 'amx_tile') if flag in flags)})"
