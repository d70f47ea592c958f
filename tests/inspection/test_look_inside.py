"""The example: the block learns to look at the place that decides."""

import re
import runpy
from pathlib import Path

import pytest

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "look_inside.py"


def test_the_corner_looks_at_the_cue(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", [str(EXAMPLE), "--figure", str(tmp_path / "row.png")])
    runpy.run_path(str(EXAMPLE), run_name="__main__")
    shown = capsys.readouterr().out
    right, found, count = re.search(r"answers: (\d+)%.*? in (\d+) of (\d+) pictures", shown, re.DOTALL).groups()
    assert int(right) > 95
    assert int(found) > 0.9 * int(count)
    assert "query-independent" in shown
    assert (tmp_path / "row.png").read_bytes().startswith(b"\x89PNG")
