import os
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import pytest

from latentgnn.errors import UserError
from latentgnn.files import writing


def test_what_is_written_and_what_was_there(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b" / "text"
    writing.write_text(path, "Zürich")
    assert path.read_bytes() == "Zürich".encode()
    writing.write_json(path, {"a": [1]})
    assert path.read_text() == '{\n  "a": [\n    1\n  ]\n}\n'

    def fail() -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError), writing.replacing(path, before=fail) as file:
        file.write(b"other")
    assert path.read_text().startswith("{")
    assert list(path.parent.iterdir()) == [path]


def test_content_is_on_the_disk_before_its_name_and_the_name_before_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []
    fsync, replace = os.fsync, os.replace

    def noting_fsync(descriptor: int) -> None:
        calls.append("folder" if os.path.isdir(f"/proc/self/fd/{descriptor}") else "file")
        fsync(descriptor)

    def noting_replace(source: Path, target: Path) -> None:
        calls.append(f"{Path(source).read_text()} becomes {Path(target).name}")
        replace(source, target)

    monkeypatch.setattr(os, "fsync", noting_fsync)
    monkeypatch.setattr(os, "replace", noting_replace)
    with writing.replacing(tmp_path / "name", before=lambda: calls.append("before")) as file:
        file.write(b"content")
    assert calls == ["file", "before", "content becomes name", "folder"]


def test_the_longest_names_can_be_written(tmp_path: Path) -> None:
    longest = tmp_path / ("ü" * 127 + "x")
    writing.write_text(longest, "text")
    assert longest.read_text() == "text"


def test_leftovers_are_those_of_processes_that_have_ended(tmp_path: Path) -> None:
    program = (
        "import sys, pathlib; from latentgnn.files.writing import temporary_name; "
        "print(temporary_name(pathlib.Path(sys.argv[1])))"
    )
    path = tmp_path / "inside" / "last.ckpt"
    done = subprocess.run([sys.executable, "-c", program, str(path)], capture_output=True, text=True, check=True)
    ended = Path(done.stdout.strip())
    assert ended.parent == path.parent
    own = writing.temporary_name(path)
    host, _, number = own.name.split(".")[-2].partition("-")
    running = own.with_name(own.name.replace(f"-{number}.", f"-{os.getppid()}."))
    elsewhere = own.with_name(own.name.replace(host, "00000000"))
    long_ago = own.with_name(own.name.replace(host, "00000001"))
    others = [own.with_name(name) for name in ("a.tmp", ".a.tmp", ".last.ckpt.12.tmp", "last.ckpt")]
    path.parent.mkdir()
    for file in (ended, own, elsewhere, long_ago, running, *others):
        file.touch()
    os.utime(long_ago, (0, time.time() - 2 * 24 * 60 * 60))
    folder = ended.with_name(f"{ended.name[:1]}data{ended.name[10:]}")
    folder.mkdir()
    (folder / ended.name).touch()
    assert set(writing.leftovers(tmp_path)) == {ended, own, long_ago, folder}
    assert [file for file in others if writing.is_temporary(file)] == []


def test_appending_names_the_file_in_errors_and_does_not_follow_links(
    tmp_path: Path, files_up_to: Callable[[int], AbstractContextManager[None]]
) -> None:
    path = tmp_path / "log.txt"
    for text in ("first\n", "Zürich\n"):
        writing.append_text(path, text)
    assert path.read_bytes() == "first\nZürich\n".encode()
    with files_up_to(20), pytest.raises(OSError, match="File too large") as raised:
        writing.append_text(path, "third\n" * 10)
    assert raised.value.filename == str(path)
    users = tmp_path / "users.txt"
    users.write_text("own")
    (tmp_path / "link.txt").symlink_to(users)
    with pytest.raises(UserError, match=r"link\.txt is a link to another file"):
        writing.append_text(tmp_path / "link.txt", "more")
    assert users.read_text() == "own"
