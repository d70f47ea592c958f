"""Memory of this process and of others, as Linux counts it."""

from pathlib import Path
from typing import Literal

from latentgnn.errors import UserError


def process_bytes(name: Literal["VmRSS", "VmHWM"]) -> int:
    """This process's resident memory in bytes.

    `resource.getrusage` also knows the most, but starts at the memory of the process that started this one.

    Args:
        name: ``VmRSS``, the memory now, or ``VmHWM``, the most so far.

    Raises:
        UserError: the system is not Linux.
    """
    path = Path("/proc/self/status")
    if not path.exists():
        raise UserError(f"resident memory is read from {path}, which this system does not have: measure on Linux")
    return _bytes_of(path, name)


def private_bytes(process: int) -> int:
    """Bytes of memory that a process shares with no other.

    Args:
        process: the number of the process.
    """
    path = Path(f"/proc/{process}/smaps_rollup")
    return sum(_bytes_of(path, name) for name in ("Private_Clean", "Private_Dirty"))


def _bytes_of(path: Path, name: str) -> int:
    (line,) = (line for line in path.read_text(encoding="ascii").splitlines() if line.startswith(f"{name}:"))
    return 1024 * int(line.split()[1])
