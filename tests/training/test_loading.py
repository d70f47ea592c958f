import errno
import multiprocessing
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from latentgnn.errors import UserError, is_lack_of_memory
from latentgnn.training.loading import batches, make_loader


class Files:
    """The texts of files; an index without a file is an error of the kind that its number says."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> str:
        if index == 4:
            raise UserError("scan.laz: it is cut short")
        if index == 5:
            raise ValueError("a fault of the program")
        if index == 6:
            raise OSError(errno.EMFILE, "Too many open files")
        if index == 7:
            raise OSError(errno.ENOMEM, "Cannot allocate memory")
        if index == 3:
            time.sleep(600)
        return (self.folder / str(index)).read_text()


def read(folder: Path, indices: list[int], *, workers: int) -> list[Any]:
    loader = make_loader(Files(folder), list, workers=workers, seed=0, sampler=indices, batch_size=1)
    with batches(loader) as stream:
        return list(stream)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for index in range(2):
        (tmp_path / str(index)).write_text(f"text {index}")
    return tmp_path


@pytest.mark.parametrize("workers", [0, 2])
def test_errors_in_loading_are_told_in_one_line(folder: Path, workers: int) -> None:
    assert read(folder, [0, 1, 0], workers=workers) == [["text 0"], ["text 1"], ["text 0"]]
    with pytest.raises(UserError) as raised:
        read(folder, [0, 4], workers=workers)
    assert str(raised.value) == "scan.laz: it is cut short"
    with pytest.raises(UserError) as raised:
        read(folder, [0, 2], workers=workers)
    assert str(raised.value) == f"{folder / '2'}: no such file or directory"
    with pytest.raises(UserError, match=r"^too many open files: raise `ulimit -n`"):
        read(folder, [0, 6], workers=workers)
    # Told by `latentgnn.training.faults`, which knows what to lower.
    with pytest.raises(OSError, match="Cannot allocate memory") as lack:
        read(folder, [0, 7], workers=workers)
    assert is_lack_of_memory(lack.value)
    assert multiprocessing.active_children() == []


def test_a_fault_of_the_program_keeps_its_traceback(folder: Path) -> None:
    with pytest.raises(ValueError, match="a fault of the program") as raised:
        read(folder, [5], workers=1)
    assert str(raised.value).count("Traceback") == 1
    assert 'raise ValueError("a fault of the program")' in str(raised.value)


def test_no_process_is_left_where_one_is_stuck(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # How long torch waits for each process that it has asked to end, and asks again.
    monkeypatch.setattr(torch.utils.data._utils, "MP_STATUS_CHECK_INTERVAL", 0.2)
    with pytest.raises(UserError, match="cut short"):
        read(folder, [4, 3], workers=2)
    assert multiprocessing.active_children() == []
