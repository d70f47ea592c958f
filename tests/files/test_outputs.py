import errno
import json
import os
from contextlib import suppress
from pathlib import Path

import pytest
import torch

from latentgnn.errors import UserError, concerning, is_lasting, system_error, told
from latentgnn.files.outputs import LIST, Results, refuse_to_replace
from latentgnn.files.writing import write_bytes


def content(folder):
    """All files below a folder, but for the list of results."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and path.name != LIST
    }


def write(folder, *names, data=b"new", **options):
    with Results(folder, names, **options) as results:
        for name in names:
            results.write(name, data)


def test_results_are_written_into_a_new_folder_and_an_empty_one(tmp_path):
    (tmp_path / "empty").mkdir()
    for name in ("empty", "new/deep"):
        write(tmp_path / name, "a.txt", "pictures/b/c.png")
        assert content(tmp_path / name) == {"a.txt": b"new", "pictures/b/c.png": b"new"}


def test_a_folder_that_holds_something_else_is_refused_with_or_without_overwrite(tmp_path):
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures" / "y.png").write_bytes(b"mine")
    for overwrite in (False, True):
        with pytest.raises(UserError, match=r"is not empty, and what it holds \(pictures\)"):
            write(tmp_path, "pictures/y.png", overwrite=overwrite)
    assert content(tmp_path) == {"pictures/y.png": b"mine"}
    assert not (tmp_path / LIST).exists()


def test_earlier_results_are_replaced_only_when_that_is_told(tmp_path):
    out = tmp_path / "out"
    write(out, "a.txt", "pictures/old.png", "pictures/deep/old.png", data=b"old")
    (out / "mine.txt").write_bytes(b"mine")
    before = content(out)
    with pytest.raises(UserError, match=r"results of an earlier command \(a\.txt, pictures/old\.png.*--overwrite"):
        write(out, "a.txt")
    assert content(out) == before
    write(out, "a.txt", "pictures/new.png", overwrite=True)
    assert content(out) == {"a.txt": b"new", "pictures/new.png": b"new", "mine.txt": b"mine"}
    assert not (out / "pictures" / "deep").exists()


def test_earlier_results_stay_until_the_first_new_one(tmp_path):
    out = tmp_path / "out"
    write(out, "a.txt", data=b"old")
    with pytest.raises(ZeroDivisionError), Results(out, overwrite=True):
        raise ZeroDivisionError
    assert content(out) == {"a.txt": b"old"}
    with suppress(ZeroDivisionError), Results(out, overwrite=True) as results:
        results.write("b.txt", b"new")
        raise ZeroDivisionError
    assert content(out) == {"b.txt": b"new"}


def test_the_users_own_file_beside_results_is_never_written_to(tmp_path):
    out = tmp_path / "out"
    write(out, "a.txt", data=b"old")
    (out / "metrics.json").write_bytes(b"mine")
    # Known before any work, or met only then.
    with pytest.raises(UserError, match=r"metrics\.json is there already"):
        write(out, "metrics.json", overwrite=True)
    assert content(out) == {"a.txt": b"old", "metrics.json": b"mine"}
    with Results(out, overwrite=True) as results, pytest.raises(UserError, match=r"metrics\.json is there already"):
        results.write("metrics.json", b"new")
    assert content(out) == {"metrics.json": b"mine"}


def _symbolic(path, place):
    place.symlink_to(path)
    return place


def _hard(path, place):
    place.hardlink_to(path)
    return place


@pytest.mark.parametrize(
    "other",
    [
        lambda path, place: path,
        lambda path, place: path.parent / ".." / path.parent.name / path.name,
        lambda path, place: Path(os.path.relpath(path)),
        _symbolic,
        _hard,
        lambda path, place: _symbolic(path.parent, place) / path.name,
    ],
    ids=["itself", "dots", "relative", "symbolic link", "hard link", "linked folder"],
)
def test_what_is_read_is_not_replaced_by_no_path(tmp_path, other):
    out = tmp_path / "out"
    write(out, "a.txt", data=b"old")
    read = other(out / "a.txt", tmp_path / "place")
    with pytest.raises(UserError, match="which is read"):
        write(out, "a.txt", reads=[read], overwrite=True)
    with Results(out, overwrite=True) as results, pytest.raises(UserError, match="which is read"):
        results.reads([tmp_path / "absent", read])
    with pytest.raises(UserError, match="which is read"):
        refuse_to_replace([out / "absent", out / "a.txt"], reads=[read])
    assert content(out) == {"a.txt": b"old"}
    refuse_to_replace([out / "absent"], reads=[read])


def test_a_list_names_nothing_outside_its_folder(tmp_path):
    out = tmp_path / "out"
    write(out, "pictures/a.png", data=b"old")
    mine = tmp_path / "mine"
    mine.mkdir()
    for name in ("a.png", "b.png"):
        (mine / name).write_bytes(b"mine")
    lines = ["../mine/a.png", str(mine / "b.png"), "pictures/a.png", "", 3]
    (out / LIST).write_text("\n".join(map(json.dumps, lines)) + '\n"cut sho')
    # A folder of the user's own in place of the results'.
    (out / "pictures" / "a.png").unlink()
    (out / "pictures").rmdir()
    (out / "pictures").symlink_to(mine)
    write(out, "c.txt", overwrite=True)
    assert content(mine) == {"a.png": b"mine", "b.png": b"mine"}
    with pytest.raises(UserError, match="is there already"):
        write(out, "pictures/a.png", overwrite=True)
    assert content(mine) == {"a.png": b"mine", "b.png": b"mine"}


def test_a_list_that_is_a_link_is_none(tmp_path):
    (tmp_path / "mine").write_text('"a.txt"\n')
    out = tmp_path / "out"
    out.mkdir()
    (out / "a.txt").write_bytes(b"mine")
    (out / LIST).symlink_to(tmp_path / "mine")
    with pytest.raises(UserError, match="is not known as a command's results"):
        write(out, "a.txt", overwrite=True)
    assert (tmp_path / "mine").read_text() == '"a.txt"\n'


def test_two_commands_do_not_mix_their_files(tmp_path):
    with Results(tmp_path / "out") as first, Results(tmp_path / "out") as second:
        first.write("a.txt", b"first")
        with pytest.raises(UserError, match="another command has begun"):
            second.write("a.txt", b"second")
    assert content(tmp_path / "out") == {"a.txt": b"first"}


def test_a_folder_without_results_is_not_left(tmp_path):
    with pytest.raises(UserError, match="mistake"), Results(tmp_path / "out"):
        raise UserError("a mistake")
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "mine").mkdir()
    with Results(tmp_path / "mine"):
        pass
    assert list(tmp_path.iterdir()) == [tmp_path / "mine"]


def test_a_folder_that_cannot_be_written_to_is_told_before_the_work(tmp_path):
    (tmp_path / "file").write_bytes(b"mine")
    with pytest.raises(UserError, match=r"file: a folder to write to is needed, but this is a file"):
        Results(tmp_path / "file").__enter__()
    with pytest.raises(NotADirectoryError):
        Results(tmp_path / "file" / "out").__enter__()
    with pytest.raises(OSError, match="name too long"):
        Results(tmp_path / ("x" * 300)).__enter__()
    assert (tmp_path / "file").read_bytes() == b"mine"


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(errno.ENOSPC, "No space left on device")])
def test_what_ends_the_work_early_says_where_results_are(tmp_path, error):
    out = tmp_path / "out"

    def work():
        with Results(out) as results:
            results.write("a.txt", b"new")
            raise error

    with pytest.raises(UserError, match=f"what was written before is kept in {out}"):
        work()
    with pytest.raises(type(error)), Results(tmp_path / "none"):
        raise error


def test_a_growing_list_is_whole_after_every_item(tmp_path):
    out = tmp_path / "out"
    partial = out / "found.json.partial"
    added = []
    with Results(out) as results, results.json_list("found.json") as found:
        assert json.loads(partial.read_bytes()) == []
        for items in ([{"a": 1}, {"b": [2.5, None]}], [], ["\udc80", "ü"], [3]):
            found.add(items)
            added += items
            assert json.loads(partial.read_bytes()) == added
        with pytest.raises(TypeError):
            found.add([4, object()])
    assert json.loads((out / "found.json").read_bytes()) == added
    assert not partial.exists()


def test_a_list_that_cannot_grow_keeps_what_it_has(tmp_path, files_up_to):
    out = tmp_path / "out"

    def work():
        with Results(out) as results, results.json_list("found.json") as found, files_up_to(1000):
            for number in range(1000):
                found.add([number] * 7)

    with pytest.raises(UserError, match="file too large") as told_error:
        work()
    kept = json.loads((out / "found.json.partial").read_bytes())
    # 7 items of one to two digits, a comma and a line's end.
    assert kept == [number for number in range(len(kept) // 7) for _ in range(7)]
    assert len(kept) > 200
    assert str(out / "found.json") in str(told_error.value)
    assert not (out / "found.json").exists()


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS, errno.EACCES, errno.ENAMETOOLONG, errno.ENOTCONN])
def test_an_error_of_the_system_is_one_line(number):
    line = told(OSError(number, os.strerror(number), "x" * 5000))
    assert "\n" not in line
    assert len(line) < 400
    words = os.strerror(number)
    assert words[1:] in line
    assert told(OSError(number, os.strerror(number)), "some/place").startswith("some/place: ")
    assert is_lasting(OSError(number, "")) == (number in (errno.ENOSPC, errno.EROFS))


def test_an_error_of_the_system_is_found_in_a_librarys_own():
    full = OSError(errno.ENOSPC, "No space left on device")

    def wrapped(how, kind):
        try:
            try:
                raise full
            except OSError as error:
                if how == "from":
                    raise kind("writing failed") from error
                if how == "from None":
                    raise kind("writing failed") from None
                raise kind("writing failed")  # noqa: B904
        except Exception as error:
            return system_error(error)

    assert wrapped("from", ValueError) is full
    assert wrapped("", RuntimeError) is full
    assert wrapped("", OSError) is full
    assert wrapped("from None", RuntimeError) is None
    # A fault of the program while it handles an error is not the system's.
    assert wrapped("", TypeError) is None
    assert system_error(full) is full


def test_a_failed_write_of_torch_is_an_error_of_the_system(tmp_path, files_up_to):
    content = {"a": torch.zeros(100_000)}
    with (
        (tmp_path / "a.ckpt").open("wb") as file,
        files_up_to(100_000),
        pytest.raises(RuntimeError) as error,
        concerning("a.ckpt"),
    ):
        torch.save(content, file)
    fault = system_error(error.value)
    assert fault is not None
    assert (fault.errno, fault.filename) == (errno.EFBIG, "a.ckpt")


def test_a_failed_write_names_the_file_and_not_its_temporary_name(tmp_path, files_up_to):
    with pytest.raises(OSError, match="File too large") as error, files_up_to(1000):
        write_bytes(tmp_path / "a.bin", bytes(2000))
    assert error.value.filename == str(tmp_path / "a.bin")
    assert list(tmp_path.iterdir()) == []


def test_processes_of_one_command_write_into_one_folder(tmp_path):
    """The first looks at it and lists what all will write; the others see whether they are in the same."""
    with Results(tmp_path / "out", ["a.txt", "b.txt"]) as first, Results(tmp_path / "out", first=False) as other:
        with pytest.raises(UserError, match="give a folder that all machines share"):
            other.write("b.txt", b"b")
        first.announce(["b.txt"])
        other.write("b.txt", b"b")
        first.write("a.txt", b"a")
        with pytest.raises(UserError, match="is there already"):
            other.write("a.txt", b"b")
        with other.json_list("found.json"):
            pass
    assert [json.loads(line) for line in (tmp_path / "out" / LIST).read_text().splitlines()] == ["b.txt", "a.txt"]
    assert {path.name for path in (tmp_path / "out").iterdir()} == {LIST, "a.txt", "b.txt"}
