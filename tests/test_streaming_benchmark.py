"""The benchmark of arrays larger than memory: what it measures and writes. No test here looks at a time."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks import streaming, streaming_case
from benchmarks.options import run


def in_process(module: str, arguments: list[str]) -> dict[str, Any]:
    assert module == "benchmarks.streaming_case"
    mode, nodes, *options = arguments
    text = dict(zip(options[::2], options[1::2], strict=True))
    return streaming_case.measure(mode, int(nodes), Path(text["--folder"]), int(text["--rounds"]))


def test_cases_are_measured_and_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streaming, "run_child", in_process)
    (tmp_path / "arrays").mkdir()
    common = ["--folder", str(tmp_path / "arrays"), "--out", str(tmp_path), "--rounds", "1"]
    assert run(streaming.main, ["--nodes", "500,700", *common]) == 0
    (written,) = tmp_path.glob("streaming-*.json")
    report = json.loads(written.read_text())
    assert [(case["mode"], case["nodes"]) for case in report["cases"]] == [
        *(("memory", 500), ("memory", 700)),
        *(("streaming", 500), ("streaming", 700)),
    ]
    for case in report["cases"]:
        assert case["resident"] >= case["before"] > 0
        assert all(each > 0 for each in case["nanoseconds"].values())
    assert report["bars"]["nodes"] == 700
    assert written.with_suffix(".png").read_bytes()[1:4] == b"PNG"
    assert "| 700 | in chunks |" in written.with_suffix(".md").read_text()
    assert sorted(path.name for path in (tmp_path / "arrays").iterdir()) == ["500.npy", "700.npy"]
    assert run(streaming.main, ["--nodes", "900", "--add-to", str(written), *common]) == 0
    (written,) = tmp_path.glob("streaming-*.json")
    assert [case["nodes"] for case in json.loads(written.read_text())["cases"]] == [500, 700, 900, 500, 700, 900]


def test_arrays_have_other_numbers_in_every_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streaming_case, "_ROWS", 4)
    streaming_case.make_array(tmp_path / "array.npy", 10)
    array = np.load(tmp_path / "array.npy")
    assert array.shape == (10, 32)
    assert array.dtype == np.float16
    assert not np.array_equal(array[:4], array[4:8])
    assert np.isfinite(array).all()
