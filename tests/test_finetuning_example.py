"""The example that fine-tunes a classifier: on stripes, which it learns, and on a folder of pictures."""

import re
import runpy
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

EXAMPLE = Path(__file__).resolve().parents[1] / "examples" / "finetune_classifier.py"


def run(arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> str:
    monkeypatch.setattr("sys.argv", [str(EXAMPLE), *arguments])
    runpy.run_path(str(EXAMPLE), run_name="__main__")
    return capsys.readouterr().out


def test_stripes_are_learnt(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    shown = run([], monkeypatch, capsys)
    # A new block changes nothing, and then learns.
    assert "it moves the output by 0.0e+00" in shown
    assert "rates: trained 0.001, head 0.01, block 0.01" in shown
    accuracies = [float(text) for text in re.findall(r"accuracy (\S+),", shown)]
    assert len(accuracies) == 4
    assert accuracies[-1] > 0.8
    assert float(re.findall(r"gamma (\S+)", shown)[-1]) != 0


def test_a_folder_of_pictures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    rng = np.random.default_rng(0)
    for name in ("dark", "light"):
        (tmp_path / name).mkdir()
        for number in range(12):
            level = 60 if name == "dark" else 200
            pixels = rng.integers(level - 50, level + 50, (32, 40, 3), np.uint8)
            Image.fromarray(pixels).save(tmp_path / name / f"{number}.png")
    assert "epoch 0: loss" in run(["--data", str(tmp_path), "--epochs", "1"], monkeypatch, capsys)
