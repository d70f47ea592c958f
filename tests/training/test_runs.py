import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from latentgnn.errors import UserError
from latentgnn.machine import processor_name
from latentgnn.training.config import TrainingConfig
from latentgnn.training.runs import RunFolder, is_first_process


def test_configuration_round_trip(tmp_path: Path) -> None:
    @dataclass
    class Config:
        blocks: dict[str, tuple[int, ...]]
        root: Path
        training: TrainingConfig

    run = RunFolder.create(tmp_path / "a" / "run", task="toy")
    run.write_config(vars(Config({"C4": (3, 4)}, Path("data"), TrainingConfig(steps=3))))
    read = yaml.safe_load((run.path / "config.yaml").read_text())
    assert read["blocks"] == {"C4": [3, 4]}
    assert read["root"] == "data"
    assert read["training"]["steps"] == 3
    assert read["training"]["schedule"]["milestones"] == []
    assert RunFolder.open(run.path).config == run.config == read


def test_texts_that_look_like_numbers_stay_texts(tmp_path: Path) -> None:
    run = RunFolder.create(tmp_path, task="toy")
    run.write_config({"number": 1e-5, "text": "1e-5", "name": "Zürich"})
    assert RunFolder.open(tmp_path).config == {"number": 1e-5, "text": "1e-5", "name": "Zürich"}


def test_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("latentgnn.training.runs.time.strftime", lambda layout: "20300102-030405")
    monkeypatch.setenv("LATENTGNN_RUN", "before")
    names = [str(RunFolder.create(task="toy").path) for _ in range(3)]
    assert names == [f"runs/toy-20300102-030405{end}" for end in ("", "-2", "-3")]


def test_folders_in_use_are_refused(tmp_path: Path) -> None:
    run = RunFolder.create(tmp_path / "run", task="toy")
    RunFolder.create(run.path, task="toy")  # empty: nothing to lose
    # What a run has before its first step can be begun again.
    (run.path / "data").mkdir()
    with pytest.raises(UserError, match="not empty and holds no run"):
        RunFolder.create(run.path, task="toy")
    run.write_config({})
    run.write_environment()
    RunFolder.create(run.path, task="toy")
    for name in ("log.txt", "notes.txt"):
        (run.path / name).touch()
        with pytest.raises(UserError, match="holds a run already"):
            RunFolder.create(run.path, task="toy")
        (run.path / name).unlink()
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.jpg").touch()
    with pytest.raises(UserError, match="not empty and holds no run"):
        RunFolder.create(tmp_path / "photos", task="toy")
    with pytest.raises(UserError, match="is a file"):
        RunFolder.create(tmp_path / "photos" / "cat.jpg", task="toy")


def test_opening(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="there is no run folder"):
        RunFolder.open(tmp_path / "absent")
    with pytest.raises(UserError, match=r"no config\.yaml"):
        RunFolder.open(tmp_path)
    (tmp_path / "config.yaml").write_text("a: [1")
    with pytest.raises(UserError, match=r"config\.yaml: line 1, column 6"):
        RunFolder.open(tmp_path)
    (tmp_path / "config.yaml").write_text("- 1")
    with pytest.raises(UserError, match=r"config\.yaml: expected a mapping of settings, got list"):
        RunFolder.open(tmp_path)


def test_environment(tmp_path: Path) -> None:
    run = RunFolder.create(tmp_path, task="toy")
    run.write_environment()
    record = json.loads((tmp_path / "environment.json").read_text())
    assert (
        record["packages"]["torch"] == torch.__version__.split("+")[0]
        or record["packages"]["torch"] == torch.__version__
    )
    assert record["packages"]["numpy"] == np.__version__
    assert record["cpu"]["cores"] == os.cpu_count()
    assert record["cpu"]["model"] == processor_name()
    assert record["command"] == sys.argv
    assert len(record["gpus"]) == torch.cuda.device_count()
    assert "earlier" not in record
    run.write_environment()
    run.write_environment()
    assert len(json.loads((tmp_path / "environment.json").read_text())["earlier"]) == 2


@pytest.mark.parametrize(
    ("variables", "first"),
    [
        ({}, True),
        ({"LOCAL_RANK": "1"}, False),
        ({"LOCAL_RANK": "0", "NODE_RANK": "1"}, False),
        ({"RANK": "0", "LOCAL_RANK": "0"}, True),
        ({"RANK": "8", "LOCAL_RANK": "0"}, False),
        ({"SLURM_PROCID": "3"}, False),
    ],
)
def test_first_process(variables: dict[str, str], first: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "SLURM_PROCID", "LOCAL_RANK", "NODE_RANK"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert is_first_process() is first


def test_other_processes_write_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LATENTGNN_RUN", str(tmp_path / "run"))
    monkeypatch.setenv("LOCAL_RANK", "1")
    run = RunFolder.create(task="toy")
    run.write_config({"a": 1})
    run.write_metrics({})
    run.write_environment()
    assert run.path == tmp_path / "run"
    assert run.config == {"a": 1}
    assert not run.path.exists()
    monkeypatch.delenv("LATENTGNN_RUN")
    with pytest.raises(UserError, match="needs a named run folder: give --out"):
        RunFolder.create(task="toy")


def test_importing_it_is_light() -> None:
    program = (
        "import sys, latentgnn.training.runs; print([m for m in ('torch', 'lightning', 'yaml') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert "lightning" not in done.stdout
    assert "yaml" not in done.stdout
