"""The program that measures shared nodes: what it writes. No test here looks at a time."""

import json
from pathlib import Path

import pytest

from benchmarks import sharding
from benchmarks.options import run


@pytest.mark.slow  # processes
def test_what_is_counted_is_what_the_layer_says(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(sharding.main, ["--parts", "bytes", "--out", str(tmp_path)]) == 0
    assert "Bytes of each all-reduce" in capsys.readouterr().out
    (path,) = tmp_path.glob("sharding-*.json")
    report = json.loads(path.read_text())
    # 64 latents of 32 channels in float32, with a weight each.
    assert report["layer"]["forward_bytes"] == 64 * 33 * 4
    assert report["layer"]["backward_bytes"] == 64 * 32 * 4
    assert [row["nodes"] for row in report["bytes"]] == [1000, 10_000, 100_000]
    for row in report["bytes"]:
        assert row["forward"] == [64 * 33 * 4]
        assert row["step"] == [64 * 33 * 4, 64 * 32 * 4]
    assert path.with_suffix(".md").is_file()
