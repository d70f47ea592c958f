"""Properties of the machine."""

import os
import platform
from pathlib import Path


def processor_name() -> str:
    """Return the name of the processor, with its instruction sets that matter for matrix products."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    model = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())
    flags = next((line.split() for line in lines if line.startswith("flags")), [])
    known = [flag for flag in ("avx2", "avx512f", "amx_tile") if flag in flags]
    return f"{model} ({', '.join(known)})" if known else model


def memory_bytes() -> int | None:
    """Return the machine's memory in bytes, ``None`` if the system does not report it."""
    if not hasattr(os, "sysconf") or "SC_PHYS_PAGES" not in os.sysconf_names:
        return None
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
