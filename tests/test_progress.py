"""What is shown of work that takes long: a bar in a terminal, lines elsewhere if they are wanted."""

import sys

import pytest

from latentgnn import progress
from latentgnn.progress import counted, parts_done


def test_lines_where_there_is_no_terminal(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr(progress.time, "monotonic", lambda: now)
    with parts_done(lines="nodes") as update:
        now = 5.0
        update("gather", 100, 1000)
        # 500 in 10 seconds, and as many are left.
        now = 15.0
        update("gather", 600, 1100)
        now = 16.0
        update("gather", 700, 1100)
        now = 17.0
        update("gather", 1100, 1100)
        now = 30.0
        update("scatter", 10, 1100)
    assert capsys.readouterr().out.splitlines() == [
        "gather 600 of 1,100 nodes  left 10 s",
        "gather 1,100 of 1,100 nodes",
        "scatter 10 of 1,100 nodes",
    ]


def test_nothing_where_nothing_is_wanted(capsys: pytest.CaptureFixture[str]) -> None:
    items = [3, 4]
    assert counted(items, "evaluate") is items
    with parts_done() as update:
        update("a.png", 1, 1)
    assert capsys.readouterr() == ("", "")


def test_a_bar_in_a_terminal(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.setenv("TERM", "xterm")
    assert list(counted(iter([3, 4]), "evaluate", total=2)) == [3, 4]
    with parts_done() as update:
        update("a.png", 1, 2)
        update("b.png", 3, 4)
    shown = capsys.readouterr()
    assert shown.out == ""
    assert "evaluate" in shown.err
    assert "b.png" in shown.err
    assert "75%" in shown.err
