"""``latentgnn explore``: which inputs it offers, and how it begins and ends."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import urllib.request
from pathlib import Path
from typing import Any

import pytest

from latentgnn.cli import main
from latentgnn.cli.settings import configuration_in_use
from tests.tasks.explore.pages import CATEGORIES
from tests.tasks.made_runs import (
    DETECTOR,
    NETWORK,
    SEGMENTER,
    write_detector,
    write_images,
    write_labelled,
    write_network,
    write_scans,
    write_segmenter,
)


def offered(run: Path, inputs: list[str]) -> Any:
    """The explorer that the command would serve; a view of its first input is made while its files are there."""
    task, config = configuration_in_use(run, [])
    found: list[Any] = []

    def serve(explorer: Any) -> None:
        found.append(explorer)
        if explorer.names:
            assert len(explorer.view(explorer.input(0))) > 1000

    task.commands.explore(config, run, inputs, serve=serve)
    return found[0]


def test_images_of_the_validation_set_or_those_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    images = write_images(tmp_path / "data", 2, CATEGORIES)
    data = {"root": str(images), "format": "coco", "categories": CATEGORIES}
    run = write_detector(tmp_path / "run", {**DETECTOR, "data": data})
    assert offered(run, []).names == ["0.png", "1.png"]
    assert offered(run, [str(images / "val" / "1.png")]).names == ["1.png"]
    capsys.readouterr()
    elsewhere = write_detector(tmp_path / "elsewhere", {**DETECTOR, "data": {**data, "root": str(tmp_path / "gone")}})
    assert offered(elsewhere, []).names == []
    assert "drop them on the page" in capsys.readouterr().out


def test_scans_of_the_validation_set_or_those_named(tmp_path: Path) -> None:
    scans = write_scans(tmp_path / "data", "ab")
    run = write_network(tmp_path / "run", {**NETWORK, "data": {**NETWORK["data"], "root": str(scans)}})
    assert offered(run, []).names == ["a", "b"]
    assert offered(run, [str(scans / "val" / "b.laz")]).names == ["b.laz"]


def test_labelled_images_of_the_validation_set_or_those_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = {**SEGMENTER["data"], "root": str(write_labelled(tmp_path / "data", 2))}
    run = write_segmenter(tmp_path / "run", {**SEGMENTER, "data": data})
    assert offered(run, []).names == ["0.png", "1.png"]
    image = tmp_path / "data" / "images" / "val" / "1.png"
    assert offered(run, [str(image)]).names == ["1.png"]
    shutil.rmtree(tmp_path / "data" / "labels")
    assert offered(run, []).names == []
    assert "drop them on the page" in capsys.readouterr().out


def test_a_model_without_blocks_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = write_detector(tmp_path / "run", {**DETECTOR, "model": {**DETECTOR["model"], "blocks": {}}})
    assert main(["explore", str(run), "--port", "0"]) == 1
    assert "has no LatentGNN blocks" in capsys.readouterr().err


def begin(arguments: list[str], folder: Path, *, lines: int) -> tuple[subprocess.Popen[str], str]:
    """The command as a process, and the address that it says within so many lines."""
    command = [sys.executable, "-m", "latentgnn", "explore", *arguments, "--port", "0"]
    source = Path(__file__).parents[3] / "src"
    environment = {**os.environ, "PYTHONPATH": str(source), "OMP_NUM_THREADS": "2"}
    process = subprocess.Popen(
        command, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    assert process.stdout is not None
    said = []
    for _ in range(lines):
        said.append(process.stdout.readline())
        if found := re.search(r"look at (http\S+)", said[-1]):
            return process, found[1]
    process.kill()
    raise AssertionError("".join(said))


def asked(address: str) -> Any:
    # By no proxy: urllib keeps those that an earlier test, or the machine, has named.
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with direct.open(f"{address}api/about", timeout=20) as answer:
        return json.load(answer)


def end(process: subprocess.Popen[str]) -> None:
    process.send_signal(signal.SIGINT)
    rest, _ = process.communicate(timeout=30)
    assert process.returncode == 0, rest
    assert rest == ""


def test_it_answers_until_it_is_interrupted(tmp_path: Path) -> None:
    images = write_images(tmp_path / "data", 1, CATEGORIES)
    run = write_detector(tmp_path / "run")
    process, address = begin([str(run), str(images / "val")], tmp_path, lines=5)
    try:
        assert asked(address)["names"] == ["0.png"]
    finally:
        end(process)


@pytest.mark.slow
def test_without_a_run_it_trains_one_once(tmp_path: Path) -> None:
    process, address = begin([], tmp_path, lines=200)
    try:
        assert asked(address)["categories"]
    finally:
        end(process)
    best = tmp_path / "runs" / "explore" / "metrics.json"
    assert json.loads(best.read_text())["metrics"]["bbox/AP50"] > 0.5
    written = best.stat().st_mtime_ns
    process, _ = begin([], tmp_path, lines=5)
    end(process)
    assert best.stat().st_mtime_ns == written
