import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

os.environ.setdefault("HF_HUB_OFFLINE", "1")
# Read when Triton is first imported: without a GPU, its interpreter runs the kernels.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
# The tests' tensors are tiny: more threads only wait for one another, the more so on a busy machine.
torch.set_num_threads(1)

SHARED = Path(__file__).resolve().parents[2] / "shared"


@pytest.fixture(scope="session")
def shared() -> Callable[[str], Path]:
    """A folder of real data or published vectors that lies beside the project, or a skip that names it."""

    def find(name: str) -> Path:
        for folder in (SHARED / "data" / name, SHARED / name):
            if folder.is_dir():
                return folder
        pytest.skip(f"needs the data set {name!r} beside the project, in {SHARED}")

    return find
