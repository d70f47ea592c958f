import os
import resource
import subprocess
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
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


@pytest.fixture(autouse=True)
def core_for_small_inputs(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the layer take the core for the tests' tiny inputs too, as it does for a user's larger ones."""
    if "small_inputs" not in request.keywords:
        monkeypatch.setattr("latentgnn.by_size.SMALL_OPERATIONS", 0)
        monkeypatch.setattr("latentgnn.by_size.CHANNELS_FIRST", {})
        monkeypatch.setattr("latentgnn.by_size.CHANNELS_LAST", {})


@pytest.fixture(scope="session")
def shared() -> Callable[[str], Path]:
    """A folder of real data or published vectors that lies beside the project, or a skip that names it."""

    def find(name: str) -> Path:
        for folder in (SHARED / "data" / name, SHARED / name):
            if folder.is_dir():
                return folder
        pytest.skip(f"needs the data set {name!r} beside the project, in {SHARED}")

    return find


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Callable[[str], Path]]:
    """A file system of a size such as ``200k``, or a skip where this process may not mount one."""
    mounted: list[Path] = []

    def mount(size: str) -> Path:
        place = tmp_path / f"disk{len(mounted)}"
        place.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(place)]
        try:
            done = subprocess.run(command, capture_output=True, text=True)
        except FileNotFoundError:
            pytest.skip("needs the program `mount`")
        if done.returncode:
            pytest.skip(f"needs the right to mount a file system: {done.stderr.strip()}")
        mounted.append(place)
        return place

    yield mount
    for place in mounted:
        subprocess.run(["umount", "--lazy", str(place)], check=True)


@pytest.fixture
def files_up_to() -> Callable[[int], AbstractContextManager[None]]:
    """A limit on the size of the files that this process writes, in bytes."""

    @contextmanager
    def limited(size: int) -> Iterator[None]:
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)

    return limited
