"""Every file that a user hands in, and the command line: each case ends in success or in the project's own error."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
GROUPS = (
    "images_and_annotations",
    "image_formats",
    "labelled_images",
    "scans_and_sets",
    "settings_and_commands",
    "run_files",
)


def fuzz(group: str, cases: int, how: str, folder: Path, seconds: float) -> None:
    last = folder / "case.txt"
    # Threads reserve memory of their own, which the limit would count.
    threads = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "2"}
    environment = {**os.environ, **threads, "LATENTGNN_LAST_CASE": str(last), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "tests.fuzzing.child", group, str(cases), how],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        errors="replace",
        timeout=seconds,
    )
    told = f"{done.stdout[-2000:]}\n{done.stderr[-12000:]}"
    assert done.returncode == 0, f"{told}\nthe last case, in {last}: {last.read_text(encoding='utf-8')[:2000]}"


@pytest.mark.parametrize("group", GROUPS)
def test_some_hundreds_of_cases(tmp_path: Path, group: str) -> None:
    fuzz(group, 60, "repeatable", tmp_path, 300)


@pytest.mark.slow
@pytest.mark.parametrize("group", GROUPS)
def test_thousands_of_cases(tmp_path: Path, group: str) -> None:
    fuzz(group, int(os.environ.get("LATENTGNN_FUZZING_CASES", "3000")), "at random", tmp_path, 3 * 3600)
