"""Every file that a user hands in, and the command line: each case ends in success or in the project's own error."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
GROUPS = ("images_and_annotations", "scans_and_sets", "settings_and_commands", "run_files")


def fuzz(group: str, cases: int, how: str, seconds: float) -> None:
    environment = {
        **os.environ,
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "OPENBLAS_NUM_THREADS": "1",
        "MALLOC_ARENA_MAX": "2",
    }
    done = subprocess.run(
        [sys.executable, "-m", "tests.fuzzing.child", group, str(cases), how],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        errors="replace",
        timeout=seconds,
    )
    assert done.returncode == 0, f"{done.stdout[-2000:]}\n{done.stderr[-12000:]}"


@pytest.mark.parametrize("group", GROUPS)
def test_some_hundreds_of_cases(group: str) -> None:
    fuzz(group, 100, "repeatable", 300)


@pytest.mark.slow
@pytest.mark.parametrize("group", GROUPS)
def test_thousands_of_cases(group: str) -> None:
    fuzz(group, int(os.environ.get("LATENTGNN_FUZZING_CASES", "3000")), "at random", 3 * 3600)
