from pathlib import Path

import pytest

from latentgnn.errors import UserError
from latentgnn.tasks.inputs import noted, raise_faults, result_names


@pytest.mark.parametrize(
    ("paths", "names"),
    [
        ([], []),
        (["x.png"], ["x"]),
        (["a/x.png", "a/y.png"], ["x", "y"]),
        (["a/x.png", "b/x.png"], ["a/x", "b/x"]),
        (["a/x.png", "a/deep/x.png"], ["x", "deep/x"]),
        (["a/../b/x.png", "b/y.png"], ["x", "y"]),
        (["/one/x.png", "/two/x.png"], ["one/x", "two/x"]),
        # The suffix alone, case, and two ways to write an accent.
        (["x.png", "x.jpg", "X.png", "x-2.png"], ["x", "x-2", "X-3", "x-2-2"]),
        (["A/x.png", "a/x.png"], ["A/x", "a/x-2"]),
        (["e\u0301.png", "\u00e9.png"], ["e\u0301", "\u00e9-2"]),
        (["scan.v2.laz", "scan.v3.laz"], ["scan.v2", "scan.v3"]),
    ],
)
def test_results_lie_as_their_inputs_do(paths, names):
    assert [name.as_posix() for name in result_names([Path(path) for path in paths])] == names


def test_faults_are_noted_but_for_those_that_all_would_meet():
    faults = []
    for error in (
        *(UserError("a.png: torn"), OSError(27, "File too large", "b.png"), OSError(27, "File too large")),
        *(MemoryError(), OSError(12, "Cannot allocate memory"), RuntimeError("CUDA out of memory.\nTried 8 GiB")),
    ):
        with noted(faults, Path("c.png")):
            raise error
    for error in (
        *(OSError(28, "No space left on device"), BrokenPipeError(32, "Broken pipe"), ZeroDivisionError()),
        RuntimeError("sizes do not fit"),
    ):
        with pytest.raises(type(error)), noted(faults, Path("c.png")):
            raise error
    assert [fault.partition(":")[0] for fault in faults] == ["a.png", "b.png", *["c.png"] * 4]
    assert [fault.split("(")[1].split(")")[0] for fault in faults[3:]] == [
        "MemoryError",
        "[Errno 12] Cannot allocate memory",
        "CUDA out of memory.",
    ]
    with pytest.raises(
        UserError, match=r"6 of 7 images failed; the others are done, in out:\n  a\.png: torn\n  b\.png"
    ):
        raise_faults(faults, inputs=7, kind="image", out=Path("out"))
    with pytest.raises(UserError, match=r"^2 of 2 images failed:\n  a\n  b$"):
        raise_faults(["a", "b"], inputs=2, kind="image", out=Path("out"))
    with pytest.raises(UserError, match=r"^the image failed:\n  a$"):
        raise_faults(["a"], inputs=1, kind="image", out=Path("out"))
    raise_faults([], inputs=3, kind="image", out=Path("out"))
