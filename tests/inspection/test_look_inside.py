"""The example: the block learns to look at the place that decides, and its rows differ."""

import re
import runpy
from pathlib import Path

import pytest

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "look_inside.py"


def test_corners_look_at_their_cue(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", [str(EXAMPLE), "--figure", str(tmp_path / "row.png")])
    runpy.run_path(str(EXAMPLE), run_name="__main__")
    shown = capsys.readouterr().out
    right, found, cases = re.search(r"right answers: (\d+)%.*? in (\d+) of (\d+) cases", shown, re.DOTALL).groups()
    assert int(right) > 90
    assert int(found) > 0.9 * int(cases)
    assert "query-independent" not in shown
    assert (tmp_path / "row.png").read_bytes().startswith(b"\x89PNG")
